"""Write the model cards: one per preset, and README.md with a table of them.

python model_cards/generate.py           # write them
python model_cards/generate.py --check   # write nothing; exit code 1 if files differ, and their names
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from flops import forward_flops
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template

from lion_hf import PRESETS, LionConfig, LionForImageClassification, LionForMaskedLM, LionVisionConfig
from lion_hf.models.lion_layers import stays_float32
from lion_hf.nn import variant_class
from lion_hf.training.errors import UserError
from lion_hf.training.recipes import expand, presets_of


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
FORMS = ("attention", "chunk")

# Limits of text models by whether they have a position table.
TEXT_LIMITS = {
    True: "Inputs have at most {} tokens (`max_position_embeddings`), because positions come from a learned table.",
    False: "Inputs of any length are accepted; quality beyond the recipe's 128 tokens is untested.",
}
IMAGE_LIMITS = "Any height and width divisible by {} are accepted; quality at sizes other than 224 pixels is untested."
# The input row of a card.
TEXT_INPUTS = {True: "English text, at most {} tokens", False: "English text of any length, trained on 128 tokens"}
IMAGE_INPUT = "images of 224 pixels a side; other sizes divisible by {} are accepted"

# Differences between text and image cards. `lengths` are those at which operations are counted.
TEXT = {
    "kind": "A masked language model",
    "baseline": "BERT",
    "task": "masked language modelling; fine-tuned for classification of texts and tokens, question answering",
    "config_class": "LionConfig",
    "recipes": "mlm",
    "script": "run_mlm.py",
    "flags": "",
    "pipeline_tag": "fill-mask",
    "lengths": (128, 2048),
    "metric": "masked accuracy on encyclopedia summaries",
    "results": "text",
    "example": "The lion [MASK] in the sun.",
    "corpus": "The recipe's text is a crawl of the English web, whose biases a trained model will repeat.",
}
IMAGE = {
    "kind": "An image classifier",
    "baseline": "ViT",
    "task": "image classification, 1,000 classes",
    "config_class": "LionVisionConfig",
    "recipes": "imagenet",
    "script": "run_image_classification.py",
    "flags": " --bf16",
    "pipeline_tag": "image-classification",
    "lengths": (None,),
    "metric": "top-1 accuracy on Fashion-MNIST",
    "results": "images",
    "example": "lion.jpg",
    "corpus": "The recipe's photographs and 1,000 classes are those of ImageNet-1k, with their biases.",
}
# Names on the Hub of data sets that recipes call by an alias.
DATASETS = {"imagenet-1k": "ILSVRC/imagenet-1k"}

USAGE = """\
from transformers import pipeline

import lion_hf  # registers LION with the Auto classes

model = pipeline("{task}", "{folder}")
for answer in model("{example}"):
    print(answer)"""


def generate() -> dict[str, str]:
    """Return the content of every generated file by name."""
    cards = {preset: facts(preset) for preset in PRESETS}
    files = {f"{preset}.md": render(values) for preset, values in cards.items()}
    by_kind = {
        kind: [values for values in cards.values() if values["pipeline_tag"] == table["pipeline_tag"]]
        for kind, table in (("text", TEXT), ("image", IMAGE))
    }
    template = Template((FOLDER / "readme_template.md").read_text(encoding="utf-8"))
    return files | {"README.md": template.render(by_kind) + "\n"}


def render(values: dict[str, Any]) -> str:
    """Render a card from the facts of its preset."""
    data = ModelCardData(
        language="en" if values["pipeline_tag"] == "fill-mask" else None,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=values["pipeline_tag"],
        tags=["lion", "linear-attention", values["variant"].split(",")[0].lower()],
        datasets=[values["dataset"]],
    )
    return str(ModelCard.from_template(data, template_path=str(FOLDER / "template.md"), **values)) + "\n"


def facts(preset: str) -> dict[str, Any]:
    """Return the values of the template for the card of a preset.

    Raises:
        ValueError: if no recipe trains the preset.
    """
    table = IMAGE if "patch_size" in PRESETS[preset] else TEXT
    config = (LionVisionConfig if table is IMAGE else LionConfig).from_preset(preset)
    recipe = recipe_of(preset, table["recipes"])
    if recipe is None:
        folder = f"examples/recipes/{table['recipes']}"
        raise ValueError(f"No file in {folder} has the preset {preset!r}; add it to a recipe first.")
    settings = expand(ROOT / recipe, preset)
    snake = getattr(config, "order", "normal") == "s"
    registered = variant_class(config.mask_type)
    variant = registered.label + (", snake" if snake else "")
    description = registered.description
    if snake:
        description += " Patches are read along two snake curves, by rows and by columns; both masks are averaged."
    dataset = settings["dataset_name"]
    paper = reported()["image" if table is IMAGE else "text"].get(preset.split("-")[2])
    return {
        "preset": preset,
        "config": config,
        **{name: table[name] for name in ("kind", "baseline", "task")},
        "input": input_of(config),
        "config_class": table["config_class"],
        "pipeline_tag": table["pipeline_tag"],
        "variant": variant,
        "variant_description": description,
        "flops": operations(config, table["lengths"]),
        "usage": USAGE.format(task=table["pipeline_tag"], folder=settings["output_dir"], example=table["example"]),
        "recipe": recipe,
        "script": f"examples/{table['script']}",
        "flags": table["flags"],
        "finetune": recipe_of(preset, "glue"),
        "dataset": DATASETS.get(dataset, dataset),
        "source": reported()["source"],
        "reported": paper,
        "reported_summary": summary(paper, variant, table["baseline"]),
        "ours": ours(table, variant),
        "limits": f"{limits(config)} {table['corpus']}",
        "keeps_float32": bool(registered.float32_weights),
        **sizes(config),
    }


def limits(config: LionConfig | LionVisionConfig) -> str:
    """Return the limits on the inputs of a model."""
    if config.model_type == "lion_vision":
        return IMAGE_LIMITS.format(config.patch_size)
    return TEXT_LIMITS[config.pos_emb].format(config.max_position_embeddings)


def input_of(config: LionConfig | LionVisionConfig) -> str:
    """Describe the inputs of a model in a few words."""
    if config.model_type == "lion_vision":
        return IMAGE_INPUT.format(config.patch_size)
    return TEXT_INPUTS[config.pos_emb].format(config.max_position_embeddings)


def summary(paper: dict[str, Any] | None, variant: str, baseline: str) -> str:
    """Put the paper's figures for a variant beside those of the softmax encoder, in one line."""
    if paper is None or variant not in paper["rows"]:
        return "none recorded here for this size"
    figures = zip(paper["columns"], paper["rows"][variant], paper["rows"][baseline], strict=True)
    return "; ".join(f"{column} {number} ({baseline}: {other})" for column, number, other in figures)


def operations(
    config: LionConfig | LionVisionConfig, lengths: tuple[int | None, ...]
) -> list[tuple[str, float, float]]:
    """Return (input, GFLOP in the attention form, GFLOP in the chunk form) for each length; None means an image."""
    rows = []
    for length in lengths:
        label = f"{length} tokens" if length else "224 pixels"
        if length and config.pos_emb and length > config.max_position_embeddings:
            label += f" (with `max_position_embeddings={length}`)"
        rows.append((label, *(forward_flops(config, form, length) / 1e9 for form in FORMS)))
    return rows


def sizes(config: LionConfig | LionVisionConfig) -> dict[str, float]:
    """Return the parameters of the model with its head, and MiB of its weights as `from_pretrained` loads them."""
    with torch.device("meta"):
        model = (LionForImageClassification if config.model_type == "lion_vision" else LionForMaskedLM)(config)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}  # tied weights once
    decays = sum(count for name, count in counts.items() if stays_float32(model, name))
    total = sum(counts.values())
    return {"parameters": total, "float32_mib": 4 * total / 2**20, "bfloat16_mib": 2 * (total + decays) / 2**20}


def recipe_of(preset: str, folder: str) -> str | None:
    """Return the path, relative to the root, of the recipe that trains a preset, if there is one."""
    for path in sorted((ROOT / "examples/recipes" / folder).glob("*.yaml")):
        if preset in presets_of(path):
            return path.relative_to(ROOT).as_posix()
    return None


@cache
def reported() -> dict[str, Any]:
    """Return the paper's results; numbers are strings with the digits that it prints."""
    return yaml.load((FOLDER / "reported.yaml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def ours(table: dict[str, Any], variant: str) -> dict[str, Any] | None:
    """Return this project's results with a small model of a variant, if there are any."""
    path = ROOT / f"examples/results/{table['results']}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if variant not in rows:
        return None
    row = rows[variant]
    return {
        "accuracy": f"{100 * mean(row['accuracy']):.2f} ± {100 * stdev(row['accuracy']):.2f} %",
        "loss": f"{mean(row['loss']):.3f} ± {stdev(row['loss']):.3f} nats",
        "seeds": len(row["seeds"]),
        "metric": table["metric"],
        "table": path.relative_to(ROOT).with_suffix(".md").as_posix(),
        "command": row["command"],
    }


def differing(files: dict[str, str], folder: Path) -> list[str]:
    """Return the names of files that are missing, different, or cards without a preset."""
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    cards = {name for name in present if name.startswith("lion-")}
    return sorted(name for name in files.keys() | cards if files.get(name) != present.get(name))


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; list the files that are not up to date")
    check = parser.parse_args(arguments).check
    try:
        files = generate()
    except (UserError, ValueError, OSError) as error:
        parser.error(str(error))
    names = differing(files, folder)
    for name in names:
        path = folder / name
        if check:
            print(f"differs: {path}")
        elif name in files:
            path.write_text(files[name], encoding="utf-8")
            print(f"written: {path}")
        else:
            path.unlink()
            print(f"removed: {path}")
    if check and names:
        print("Run: python model_cards/generate.py", file=sys.stderr)
    return int(check and bool(names))


if __name__ == "__main__":
    sys.exit(main())
