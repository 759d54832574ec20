"""The two models of a linearisation: an exact copy of the source, and the model whose layers become linear."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..convert.encoder import FAMILIES, from_encoder
from ..convert.sentences import transformer_folder
from ..convert.warm_start import family_of, source_config
from ..hub import hint_if_missing
from ..models.configuration_lion import LionVisionConfig
from ..models.lion_inputs import skipped_positions
from ..models.lion_options import rope_thetas, with_linear_rope
from ..nn.mixer import Mixer, head_windows


# Whether linear layers rotate queries and keys as the source's layers do; "auto": if these do. Without it, a small
# ModernBERT lost far more of its predictions (docs/linearize.md).
ROPES = ("auto", "yes", "no")


@dataclass
class Pair:
    """Source and result of a linearisation.

    Args:
        teacher: LION model with the source's attention in every layer, equal to the source, frozen.
        student: the same model with LION in `layers`.
        layers: numbers of the layers that are LION in the student, counted from 0.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    layers: list[int]


def kind_of(source: str) -> str:
    """Return "text" or "image". Raises ValueError if there is no encoder at a path that can be copied."""
    path = transformer_folder(source)
    if (hint := hint_if_missing(path)) is not None:
        raise ValueError(f"{source!r} is neither a folder nor a name on the Hub{hint}")
    if Path(path).is_file():
        raise ValueError(f"{source!r} is a file; give the folder of a checkpoint, or a name on the Hub")
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise ValueError(f"{source!r} is not a checkpoint folder: it has no config.json")
    return family_of(source_config(path, FAMILIES), source, FAMILIES).kind


def default_layers(softmax_layers: Sequence[int], local_layers: Sequence[int]) -> list[int]:
    """Return the layers that become LION by default: the global ones among local ones, or else every second one.

    Args:
        softmax_layers: layers with softmax attention over the whole text.
        local_layers: layers with softmax attention in a band.
    """
    return list(softmax_layers) if local_layers else list(softmax_layers)[::2]


def chosen_layers(asked: str, config: PreTrainedConfig) -> list[int]:
    """Return layer numbers in ascending order.

    Args:
        asked: "default", "all", or numbers separated by commas.
        config: configuration of a LION model that keeps every layer of its source.

    Raises:
        ValueError: if a number is no layer, or is given twice.
    """
    count = config.num_hidden_layers
    if asked == "all":
        return list(range(count))
    if asked == "default":
        return default_layers(config.softmax_layers, getattr(config, "local_layers", ()))
    try:
        layers = [int(number) for number in asked.replace(",", " ").split()]
    except ValueError:
        layers = []
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < count for layer in layers):
        raise ValueError(
            f"--layers is {asked!r}; the source has {count} layers, so it must be 'all', or different numbers from 0 "
            f"to {count - 1}, separated by commas"
        )
    return sorted(layers)


def chosen_rope(asked: str, config: PreTrainedConfig) -> bool:
    """Return whether queries and keys of the linear layers rotate as those of the source's layers do.

    Args:
        asked: "yes", "no", or "auto": if the source's layers rotate.
        config: configuration of a LION model that keeps every layer of its source.

    Raises:
        ValueError: if the source does not rotate and `asked` is "yes".
    """
    if asked not in ROPES:
        raise ValueError(f"--rope is {asked!r}; it must be one of {', '.join(ROPES)}")
    rotates = any(rope_thetas(config.rope_parameters))
    if asked == "yes" and not rotates:
        raise ValueError("--rope is 'yes', but the source has no rotary positions; leave --rope out")
    return rotates and asked != "no"


def default_windows(config: PreTrainedConfig) -> tuple[float, float]:
    """Return the numbers of tokens that the first and the last head read at the start."""
    if not isinstance(config, LionVisionConfig):
        return 16.0, 512.0
    rows, columns = config.grid_size
    return 4.0, max(4.0, rows * columns)


def load_pair(
    source: str,
    layers: str = "default",
    mask_type: str = "selective",
    windows: Sequence[float] | None = None,
    context: int | None = None,
    *,
    rope: str = "auto",
    image_size: Sequence[int] | None = None,
) -> Pair:
    """Load a source and build the model that is to become linear.

    The student has the source's weights in every layer. The layers that become LION have in addition a learned feature
    map, which starts at the logits of softmax attention, and decays, which start from `windows`. Their outputs are
    divided by their row sums, as in softmax attention.

    Args:
        source: folder or Hub name of an encoder.
        layers: as in `chosen_layers`.
        mask_type: the variant of the linear layers.
        windows: numbers of tokens that heads read at the start: (smallest, largest), or one per head. Default: (16,
            512), for images (4, number of patches).
        context: number of positions of the student; None for that of the source. Further positions repeat the
            source's table. Only for text.
        rope: as in `chosen_rope`.
        image_size: (height, width) of the images in pixels; None for those of the source. Only for images.

    Raises:
        ValueError: if the source cannot be copied, or an argument is invalid.
    """
    if kind_of(source) == "image" and context is not None:
        raise ValueError(f"--context is {context}, but {source!r} is an image model; leave it out")
    options = {} if image_size is None else {"image_size": image_size}
    teacher = from_encoder(
        transformer_folder(source), mask_type, layers=[], attention_probs_dropout_prob=0.0, **options
    )
    teacher = teacher.float().eval().requires_grad_(False)
    chosen = chosen_layers(layers, teacher.config)
    windows = default_windows(teacher.config) if windows is None else windows
    student = student_of(teacher, chosen, windows, chosen_rope(rope, teacher.config))
    if context is not None:
        extend_positions(student, context)
    return Pair(teacher, student, chosen)


def student_of(
    teacher: PreTrainedModel, layers: Sequence[int], windows: Sequence[float], rope: bool = False
) -> PreTrainedModel:
    """Return the teacher with LION in `layers`, see `load_pair`; `rope`: whether these rotate as the teacher's do."""
    config = copy.deepcopy(teacher.config)
    if rope:
        local = getattr(config, "local_layers", ())
        config.rope_parameters = with_linear_rope(config.rope_parameters, local, config.num_hidden_layers)
    for name in ("softmax_layers", "local_layers"):
        if hasattr(config, name):
            setattr(config, name, [layer for layer in getattr(config, name) if layer not in layers])
    config.feature_map, config.normalize = "hedgehog", True
    config.output_norm = "none"
    if hasattr(config, "layer_norm_after"):  # images have none
        config.layer_norm_after = False
    student = type(teacher)(config)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    parts = ("q_feature.", "k_feature.", *_own_names(student))
    new = [name for name in missing if not name.split(".mixer.")[-1].startswith(parts)]
    if new or unexpected:
        raise ValueError(f"these weights of the layers do not fit: {[*new, *unexpected]}")
    for layer in layers:
        mixer = student.base_model.layers[layer].mixer
        mixer.set_windows(head_windows(windows, mixer.num_heads))
    return student.eval()


def _own_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the beginnings of the names of the weights of variants."""
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return tuple({name for mixer in mixers for name in mixer.weight_names()})


@torch.no_grad()
def extend_positions(model: PreTrainedModel, context: int) -> None:
    """Let a model read up to `context` tokens: its position table, if it has one, is repeated to that length.

    Raises:
        ValueError: if the model reads more tokens already.
    """
    config, known, skipped = model.config, positions(model.config), skipped_positions(model.config)
    if context < known:
        raise ValueError(f"--context is {context}, but the source reads {known} tokens; give at least that")
    config.max_position_embeddings = context + skipped
    embedding = model.base_model.embeddings
    table = getattr(embedding, "position_embeddings", None)
    if table is None:
        return
    rows = torch.cat([torch.arange(skipped), skipped + torch.arange(context) % known])
    embedding.position_embeddings = nn.Embedding(len(rows), table.embedding_dim, dtype=table.weight.dtype)
    embedding.position_embeddings.weight.copy_(table.weight[rows])


def positions(config: PreTrainedConfig) -> int:
    """Return how many tokens of a text a model can read."""
    return config.max_position_embeddings - skipped_positions(config)
