"""Draw the decays that trained LION models have learned.

    python examples/draw_decays.py outputs/mlm-d outputs/mlm-s --text "The cat sat on the mat." --output decays.png
    python examples/draw_decays.py outputs/fashion-s --image shirt.png --output decays.png

LION-D has one decay per layer and head. LION-S computes a decay for each token: the picture shows the mean over the
heads for each token of the text, or each patch of the image.
"""

import argparse
from pathlib import Path

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import torch
from matplotlib import pyplot as plt
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
)

from lion_hf.nn import Mixer, variant_class
from lion_hf.training.errors import UserError, run, user_errors
from lion_hf.training.models import existing_config


def layer_decays(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Return the decays of each layer that has any; of decays per channel, the mean over the channels.

    Variants with a decay per head: (layers, scans * heads). Variants with a decay per token: (layers, tokens), the mean
    over heads and scans for one input, without the class token of an image.
    """
    layers: list[torch.Tensor] = []

    def keep(mixer: Mixer, arguments: tuple) -> None:
        scans = [recurrence.log_decay.exp() for recurrence in mixer.recurrences(arguments[0])]
        if mixer.variant.decay in ("channel", "token_channel"):
            scans = [decay.mean(-1) for decay in scans]
        by_head = mixer.variant.decay in ("head", "channel")
        layers.append(torch.cat(scans) if by_head else torch.cat(scans).mean((0, 1))[mixer.prefix_tokens :])

    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    with torch.no_grad():
        if inputs:
            hooks = [mixer.register_forward_pre_hook(keep) for mixer in mixers]
            model(**inputs)
            for hook in hooks:
                hook.remove()
        else:  # the decays of heads are the same for every input
            for mixer in mixers:
                keep(mixer, (torch.zeros(1, 1, mixer.dim),))
    return torch.stack(layers)


def decaying_layers(model: PreTrainedModel) -> list[int]:
    """Return the numbers, from 1, of the layers with decays: all but the softmax layers of a hybrid."""
    config = model.config
    return [i + 1 for i in range(config.num_hidden_layers) if i not in config.softmax_layers]


def draw_decays(folders: list[Path], path: Path, text: str | None = None, image: Image.Image | None = None) -> None:
    """Draw a picture with one row per model.

    Raises:
        UserError: if a model has no decays, or if a LION-S model lacks the text or image that it needs.
    """
    models = [load(folder) for folder in folders]
    figure = plt.figure(figsize=(9, 2.9 * len(models)), layout="constrained")
    rows = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for row, folder, model in zip(rows, folders, models, strict=True):
        is_image = model.config.model_type == "lion_vision"
        kind = "image" if is_image else "text"
        variant = variant_class(model.config.mask_type)
        if variant.decay is None:
            raise UserError(f"{str(folder)!r} is a {variant.label} model, which has no decays to draw")
        layers = decaying_layers(model)
        if not layers:
            raise UserError(f"{str(folder)!r} has softmax attention in every layer, so it has no decays to draw")
        if variant.decay in ("head", "channel"):
            row.suptitle(f"{variant.label}, {kind}: decay of each layer and head", fontsize=10)
            values = layer_decays(model)
            axis = heat_map(row.subplots(), values, layers)
            axis.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
            axis.set_xlabel(
                "head" + (" (first scan, then second)" if getattr(model.config, "order", "") == "s" else "")
            )
        elif is_image:
            if image is None:
                raise UserError(f"{str(folder)!r} computes its decays from an image; give one with --image")
            row.suptitle(f"{variant.label}, image: mean decay of each patch, by layer", fontsize=10)
            draw_image(row, model, AutoImageProcessor.from_pretrained(folder), image)
        else:
            if not text:
                raise UserError(f"{str(folder)!r} computes its decays from a text; give one with --text")
            row.suptitle(f"{variant.label}, text: mean decay of each token, by layer", fontsize=10)
            inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True)
            axis = heat_map(row.subplots(), layer_decays(model, **inputs), layers)
            tokens = inputs.tokens()
            axis.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=8)
        shown = plt.cm.ScalarMappable(cmap="viridis", norm=plt.Normalize(0, 1))
        row.colorbar(shown, ax=row.axes, label="decay (1 keeps everything)", shrink=0.9)
    with user_errors(f"cannot write {path}", OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    plt.close(figure)


def heat_map(axis, values: torch.Tensor, layers: list[int]):
    """Draw one row per layer, with numbers in the cells if they fit."""
    axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    if values.shape[1] <= 16:
        for layer, line in enumerate(values.tolist()):
            for i, value in enumerate(line):
                axis.text(i, layer, f"{value:.2f}", ha="center", va="center", color="k" if value > 0.5 else "w")
    axis.set_yticks(range(len(values)), layers)
    axis.set_ylabel("layer")
    return axis


def draw_image(row, model: PreTrainedModel, processor, image: Image.Image) -> None:
    inputs = processor(image.convert("RGB"), return_tensors="pt")
    values = layer_decays(model, **inputs)
    height, width = (side // model.config.patch_size for side in inputs["pixel_values"].shape[-2:])
    axes = row.subplots(1, len(values) + 1)
    axes[0].imshow(image, cmap="gray")
    axes[0].set_title("input", fontsize=9)
    for layer, axis, line in zip(decaying_layers(model), axes[1:], values, strict=True):
        axis.imshow(line.reshape(height, width), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"layer {layer}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()


def load(folder: str | Path) -> PreTrainedModel:
    config = existing_config(str(folder), AutoModel)
    kinds = {"lion": AutoModelForMaskedLM, "lion_vision": AutoModelForImageClassification}
    if config.model_type not in kinds:
        raise UserError(f"{str(folder)!r} is a {config.model_type!r} model; only LION models have decays")
    return kinds[config.model_type].from_pretrained(folder).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of trained models, one row of the picture each")
    parser.add_argument("--text", help="input of LION-S text models")
    parser.add_argument("--image", type=Path, help="input of LION-S image models, an image file")
    parser.add_argument("--output", type=Path, default=Path("decays.png"), help="PNG to write (default: decays.png)")
    arguments = parser.parse_args()
    image = None
    if arguments.image:
        try:
            image = Image.open(arguments.image)
            image.load()
        except OSError as error:
            raise UserError(f"cannot read --image {str(arguments.image)!r}: {error}") from error
    draw_decays(arguments.models, arguments.output, arguments.text, image)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
