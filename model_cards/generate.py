"""Writes the model cards: one per preset, and README.md with a table of them.

python model_cards/generate.py           # writes them
python model_cards/generate.py --check   # exit code 1 and the names of the files that differ
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

# Limits of text models with a position table, and of all others.
TEXT_LIMITS = {
    True: "At most {} tokens (`max_position_embeddings`), since positions come from a learned table.",
    False: "Any length is accepted; quality beyond the recipe's 128 tokens is untested.",
}
IMAGE_LIMITS = "Any height and width divisible by {} are accepted; quality away from 224 pixels is untested."

# What text and image cards say differently. `lengths` are those at which operations are counted.
TEXT = {
    "kind": "A masked language model: BERT",
    "config_class": "LionConfig",
    "recipes": "mlm",
    "script": "run_mlm.py",
    "flags": "",
    "pipeline_tag": "fill-mask",
    "lengths": (128, 2048),
    "metric": "masked accuracy on encyclopedia summaries",
    "results": "text",
    "input": "The lion [MASK] in the sun.",
    "corpus": "The recipe's text is a crawl of the English web: a trained model will repeat its biases.",
}
IMAGE = {
    "kind": "An image classifier: ViT",
    "config_class": "LionVisionConfig",
    "recipes": "imagenet",
    "script": "run_image_classification.py",
    "flags": " --bf16",
    "pipeline_tag": "image-classification",
    "lengths": (None,),
    "metric": "top-1 accuracy on Fashion-MNIST",
    "results": "images",
    "input": "lion.jpg",
    "corpus": "The recipe's 1,000 classes and photographs are those of ImageNet-1k, with their biases.",
}
# The names of the Hub for what the recipes call by an alias.
DATASETS = {"imagenet-1k": "ILSVRC/imagenet-1k"}

USAGE = """\
from transformers import pipeline

import lion_hf  # makes the Auto classes know LION

model = pipeline("{task}", "{folder}")
for answer in model("{input}"):
    print(answer)"""


def generate() -> dict[str, str]:
    """Content of every generated file by name."""
    cards = {preset: facts(preset) for preset in PRESETS}
    files = {f"{preset}.md": render(values) for preset, values in cards.items()}
    by_kind = {
        kind: [values for values in cards.values() if values["pipeline_tag"] == table["pipeline_tag"]]
        for kind, table in (("text", TEXT), ("image", IMAGE))
    }
    template = Template((FOLDER / "readme_template.md").read_text(encoding="utf-8"))
    return files | {"README.md": template.render(by_kind) + "\n"}


def render(values: dict[str, Any]) -> str:
    """A card from the facts of its preset."""
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
    """All that the card of a preset says.

    Raises:
        ValueError: if no recipe trains the preset.
    """
    table = IMAGE if "patch_size" in PRESETS[preset] else TEXT
    config = (LionVisionConfig if table is IMAGE else LionConfig).from_preset(preset)
    recipe = recipe_of(preset, table["recipes"])
    if recipe is None:
        folder = f"examples/recipes/{table['recipes']}"
        raise ValueError(f"No file in {folder} has the preset {preset!r}; add it to one before its card.")
    settings = expand(ROOT / recipe, preset)
    snake = getattr(config, "order", "normal") == "s"
    registered = variant_class(config.mask_type)
    variant = registered.label + (", snake" if snake else "")
    description = registered.description
    if snake:
        description += " Patches are read along two snake curves, by rows and by columns, and both masks are averaged."
    dataset = settings["dataset_name"]
    return {
        "preset": preset,
        "config": config,
        "kind": table["kind"],
        "config_class": table["config_class"],
        "pipeline_tag": table["pipeline_tag"],
        "variant": variant,
        "variant_description": description,
        "flops": operations(config, table["lengths"]),
        "usage": USAGE.format(task=table["pipeline_tag"], folder=settings["output_dir"], input=table["input"]),
        "recipe": recipe,
        "script": f"examples/{table['script']}",
        "flags": table["flags"],
        "finetune": recipe_of(preset, "glue"),
        "dataset": DATASETS.get(dataset, dataset),
        "source": reported()["source"],
        "reported": reported()["image" if table is IMAGE else "text"].get(preset.split("-")[2]),
        "ours": ours(table, variant),
        "limits": f"{limits(config)} {table['corpus']}",
        "keeps_float32": bool(registered.float32_weights),
        **sizes(config),
    }


def limits(config: LionConfig | LionVisionConfig) -> str:
    """What inputs a model takes."""
    if config.model_type == "lion_vision":
        return IMAGE_LIMITS.format(config.patch_size)
    return TEXT_LIMITS[config.pos_emb].format(config.max_position_embeddings)


def operations(
    config: LionConfig | LionVisionConfig, lengths: tuple[int | None, ...]
) -> list[tuple[str, float, float]]:
    """(input, GFLOP in the attention form, GFLOP in the chunk form) for each length; None is an image's."""
    rows = []
    for length in lengths:
        label = f"{length} tokens" if length else "224 pixels"
        if length and config.pos_emb and length > config.max_position_embeddings:
            label += f" (with `max_position_embeddings={length}`)"
        rows.append((label, *(forward_flops(config, form, length) / 1e9 for form in FORMS)))
    return rows


def sizes(config: LionConfig | LionVisionConfig) -> dict[str, float]:
    """Parameters of the model with its head, and MiB of its weights as `from_pretrained` loads them."""
    with torch.device("meta"):
        model = (LionForImageClassification if config.model_type == "lion_vision" else LionForMaskedLM)(config)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}  # tied weights once
    decays = sum(count for name, count in counts.items() if stays_float32(model, name))
    total = sum(counts.values())
    return {"parameters": total, "float32_mib": 4 * total / 2**20, "bfloat16_mib": 2 * (total + decays) / 2**20}


def recipe_of(preset: str, folder: str) -> str | None:
    """Path below the root of the recipe that trains a preset, if there is one."""
    for path in sorted((ROOT / "examples/recipes" / folder).glob("*.yaml")):
        if preset in presets_of(path):
            return path.relative_to(ROOT).as_posix()
    return None


@cache
def reported() -> dict[str, Any]:
    """What the paper reports; numbers as strings, with the digits that it prints."""
    return yaml.load((FOLDER / "reported.yaml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def ours(table: dict[str, Any], variant: str) -> dict[str, Any] | None:
    """What this project measured with a small model of a variant, if it did."""
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
    """Names of the files that are missing, different, or cards of no preset."""
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    cards = {name for name in present if name.startswith("lion-")}
    return sorted(name for name in files.keys() | cards if files.get(name) != present.get(name))


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; name the files that are not up to date")
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
