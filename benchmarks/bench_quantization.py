"""LION in 8 bits on a CPU with torchao: accuracy, size and time compared with float32.

    pip install 'lion-hf[quantization]'
    python benchmarks/bench_quantization.py              # about 5 minutes on two CPU cores
    python benchmarks/bench_quantization.py --compile    # also times compiled models; needs a C++ compiler

Accuracy is that of a LION-D classifier on the 360 test digits of scikit-learn. The script trains it for about a minute
unless --model names a folder. Time and size are those of a text encoder of base width with random weights, on eight
rows of 128 tokens; all candidates are timed in turn. All linear layers become int8 except the layers of the decays: a
decay close to 1 needs more than 8 bits, and these layers hold a thousandth of the weights. The size is that of the
layers, without embeddings.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch
from common import alternate, count, output_folder, print_table, save
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lion_hf import LionConfig, LionModel


RECIPES = {"int8 weights": Int8WeightOnlyConfig, "int8 weights and activations": Int8DynamicActivationInt8WeightConfig}


def quantized(model: nn.Module, recipe: str) -> nn.Module:
    model = copy.deepcopy(model)
    quantize_(model, RECIPES[recipe]())
    return model


def megabytes(model: nn.Module) -> float:
    """Return the size of the weights in MiB, as torchao stores them: one byte per weight, and a scale per row."""
    parts = []
    for parameter in model.parameters():
        names = getattr(parameter, "tensor_data_names", None)
        parts += [getattr(parameter, name) for name in names] if names else [parameter]
    return sum(part.numel() * part.element_size() for part in parts) / 2**20


def trained_digits(folder: str) -> None:
    import run_image_classification

    run_image_classification.main(["--output_dir", folder, "--mask_type=decay", "--save_strategy=no"])


def accuracy(model: nn.Module, inputs: dict, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    with torch.inference_mode():
        logits = model(**inputs).logits
    return (logits.argmax(-1) == labels).float().mean().item(), logits


def accuracies(folder: str) -> list[dict[str, object]]:
    """Return one row per precision: top-1 accuracy on the test digits, and the error of the logits against float32."""
    from lion_hf.training.images import ImageArguments, load_digits

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    _, test = load_digits(ImageArguments(), seed=0)
    inputs = AutoImageProcessor.from_pretrained(folder)(test["image"][:], return_tensors="pt")
    labels = torch.tensor(test["label"][:])
    top1, expected = accuracy(model, inputs, labels)
    rows = [{"precision": "float32", "top-1 %": 100 * top1, "same answer %": 100.0, "logits' error %": 0.0}]
    for recipe in RECIPES:
        top1, logits = accuracy(quantized(model, recipe), inputs, labels)
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
        error = ((logits - expected).norm() / expected.norm()).item()
        rows.append(
            {"precision": recipe, "top-1 %": 100 * top1, "same answer %": 100 * same, "logits' error %": 100 * error}
        )
    return rows


def speeds(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return one row per precision: size of the layers, milliseconds eager and, with --compile, compiled."""
    config = LionConfig.from_preset(arguments.preset, num_hidden_layers=arguments.layers)
    models = {"float32": LionModel(config, add_pooling_layer=False).eval()}
    models |= {recipe: quantized(models["float32"], recipe) for recipe in RECIPES}
    rows = [{"precision": name, "layers MiB": megabytes(model.layers)} for name, model in models.items()]
    ids = torch.randint(1, config.vocab_size, (8, 128))

    def forward(model):
        def run():
            with torch.inference_mode():
                model(input_ids=ids)

        return run

    for kind in ("eager", "compiled") if arguments.compile else ("eager",):
        wrapped = {name: torch.compile(model) if kind == "compiled" else model for name, model in models.items()}
        times = alternate({name: forward(model) for name, model in wrapped.items()}, arguments.seconds)
        for row, seconds in zip(rows, times.values(), strict=True):
            row |= {f"{kind} ms": 1e3 * seconds, f"{kind} / float32": seconds / times["float32"]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a digits classifier; default: train one")
    parser.add_argument("--preset", default="lion-s-base", help="preset of the text encoder that is timed")
    parser.add_argument("--layers", type=count, default=2, help="layers of this encoder")
    parser.add_argument("--compile", action="store_true", help="also time compiled models")
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum time for each comparison")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.model:
            trained_digits(folder)
        rows = accuracies(arguments.model or folder)
    for row, more in zip(rows, speeds(arguments), strict=True):
        row |= more
    print_table(rows)

    def picture(axis):
        axis.bar([row["precision"] for row in rows], [row["eager ms"] for row in rows])
        axis.set(ylabel="ms for eight rows of 128 tokens", title=f"{arguments.preset}, {arguments.layers} layers")

    save("bench_quantization", arguments.output, rows, picture)


if __name__ == "__main__":
    main()
