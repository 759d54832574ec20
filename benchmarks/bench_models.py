"""Time of whole encoders against their softmax twins with SDPA: text against BERT, images against ViT.

    python benchmarks/bench_models.py                      # text and images, training steps and inference
    python benchmarks/bench_models.py --lengths 128 512 --variants selective
    python benchmarks/bench_models.py --bf16               # adds each model under bfloat16 autocast
    python benchmarks/bench_models.py --floor              # adds the twin with attention that costs nothing

All models of one case are timed in turn in one process. "ratio" is the time over the twin's in the same precision:
below 1, LION is faster. "over float32" is a model's time under autocast over its own time in float32. Dropout is 0, and
weights are random. Text: encoders of 2 layers of base width (768, 12 heads) without a head; a training step is forward
and backward of the mean output, without the optimizer step, which costs all models the same. Images: classifiers at 224
pixels of the same width and depth, and tiny ones (width 192, 3 heads, 12 layers).
"""

import argparse
import copy

import torch
from common import (
    ALL_VARIANTS,
    VARIANTS,
    alternate,
    count,
    image_models,
    output_folder,
    print_table,
    save,
    text_models,
    token_axis,
)
from transformers import AttentionInterface

from lion_hf.ops.checks import FORMATS


BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 12}


def train_step(model, inputs, bf16=False):
    def run():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(**inputs)[0]
        (outputs.float().mean() if outputs.dim() else outputs).backward()

    return run


def inference(model, inputs, bf16=False):
    def run():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(**inputs)

    return run


def no_mixing(module, query, key, value, *arguments, **options):
    """Replace attention: every token reads only itself, so that a step still trains all projections."""
    return (query + key + value).transpose(1, 2), None


AttentionInterface.register("floor", no_mixing)


def compare(name, models, inputs, arguments, rows):
    peer = next(iter(models))
    if arguments.floor:
        floor = copy.deepcopy(models[peer])
        floor.set_attn_implementation("floor")
        models = {peer: models[peer], "floor": floor, **models}
    for mode, wrap in (("train", train_step), ("inference", inference)):
        for model in models.values():
            model.train(mode == "train")
        precisions = (False, True) if arguments.bf16 else (False,)
        runs = {(k, bf16): wrap(m, inputs, bf16) for bf16 in precisions for k, m in models.items()}
        times = alternate(runs, arguments.seconds, arguments.rounds)
        for (model, bf16), seconds in times.items():
            rows.append(
                {
                    "case": name,
                    "mode": mode,
                    "precision": "bfloat16" if bf16 else "float32",
                    "model": model,
                    "ms": 1e3 * seconds,
                    "ratio": seconds / times[peer, bf16],
                    "over float32": seconds / times[model, False],
                }
            )
        print_table(rows[-len(times) :])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=count, nargs="*", default=[128, 512, 2048, 8192], help="tokens in a text")
    parser.add_argument("--variants", nargs="+", choices=ALL_VARIANTS, default=VARIANTS, help="default: those of LION")
    parser.add_argument("--tokens", type=count, default=1024, help="tokens in a batch (at least one row)")
    parser.add_argument("--layers", type=count, default=2, help="layers of text and base image models")
    parser.add_argument(
        "--masked_lm", action="store_true", help="time text models with a masked-LM head (vocabulary 30522)"
    )
    parser.add_argument("--format", choices=FORMATS, default="auto", help="format of LION's text models")
    parser.add_argument("--bf16", action="store_true", help="also time every model under bfloat16 autocast")
    parser.add_argument("--floor", action="store_true", help="also time the twin without its attention")
    parser.add_argument("--no_images", action="store_true", help="time text models only")
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum time for each comparison")
    parser.add_argument("--rounds", type=count, default=3, help="minimum number of repeats")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for length in arguments.lengths:
        shape = {**BASE, "num_hidden_layers": arguments.layers}
        models = text_models(length, arguments.variants, shape, arguments.masked_lm)
        for name, model in models.items():
            if name != "bert":
                model.config.format = arguments.format
        ids = torch.randint(1, 30000, (max(1, arguments.tokens // length), length))
        compare(f"text {length}", models, {"input_ids": ids}, arguments, rows)
    if not arguments.no_images:
        base = {**BASE, "num_hidden_layers": arguments.layers}
        for size, shape, batch in (("base", base, 4), ("tiny", TINY, 8)):
            models = image_models(arguments.variants, shape)
            inputs = {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.randint(0, 1000, (batch,))}
            compare(f"image {size} 224", models, inputs, arguments, rows)

    def picture(axis):
        steps = [row for row in rows if row["mode"] == "train" and row["case"].startswith("text")]
        for precision, style in {"float32": "o-", "bfloat16": "s--"}.items():
            for number, variant in enumerate(arguments.variants):
                chosen = [r for r in steps if (r["model"], r["precision"]) == (variant, precision)]
                if chosen:
                    lengths, ratios = zip(*((int(r["case"].split()[1]), r["ratio"]) for r in chosen), strict=True)
                    axis.plot(lengths, ratios, style, color=f"C{number}", label=f"{variant}, {precision}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(ylabel="training step / BERT with SDPA", title="below 1 is faster")
        token_axis(axis, arguments.lengths)
        if steps:
            axis.legend()

    save("bench_models", arguments.output, rows, picture)


if __name__ == "__main__":
    main()
