"""Checks of option names and values that both configurations use."""

import difflib
import functools
import re
from typing import Any

import numpy as np
from transformers import BertConfig, GenerationConfig, ViTConfig


# Names that Transformers stores or stored in configurations, besides the fields of BERT and ViT.
_FOREIGN_NAMES = re.compile(
    r"_\w+|do_\w+|pooler_\w+|(\w+_)?token_ids?|position_embedding_type|classifier_activation|gradient_checkpointing|"
    r"(attn|experts)_implementation|(quantization|fusion|distributed)_config|auto_map|transformers_weights|torchscript|"
    r"tie_(encoder_decoder|last_hidden_states)|use_(return_dict|bfloat16)|pruned_heads|finetuning_task|prefix|"
    r"tokenizer_class|task_specific_params|cross_attention_hidden_size|output_past|tf_legacy_loss|per_layer_config"
)


@functools.lru_cache
def is_known(owner: type, name: str) -> bool:
    """Return whether a configuration class has an option of this name, or Transformers uses it elsewhere."""
    if name in dir(owner) or name in owner.__dataclass_fields__ or _FOREIGN_NAMES.fullmatch(name):
        return True
    twins = (BertConfig.__dataclass_fields__, ViTConfig.__dataclass_fields__, vars(GenerationConfig()))
    return any(name in names for names in twins)


@functools.lru_cache
def misspelt_option(owner: type, name: str) -> str | None:
    """Return the option of a configuration class whose name is close to an unknown name, or None."""
    near = [] if is_known(owner, name) else difflib.get_close_matches(name, owner.__dataclass_fields__, 1, 0.75)
    return near[0] if near else None


def plain(value: Any) -> Any:
    """Convert numpy numbers and arrays, also in containers, to Python's own. Other values stay as they are."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {plain(k): plain(v) for k, v in value.items()}
    return value


def sorted_layers(value: Any) -> list[int]:
    """Return layer numbers in ascending order. Raises ValueError for anything else."""
    value = [] if value is None else value
    if not isinstance(value, (list, tuple, range)) or any(type(layer) is not int or layer < 0 for layer in value):
        raise ValueError(
            f"softmax_layers is {value!r}; it must be a list of layer numbers, whole and counted from 0 ([0, 1] are "
            "the first two layers; negative numbers are not allowed)."
        )
    if len(set(value)) < len(value):
        raise ValueError(f"softmax_layers is {value!r}; it must contain each layer once.")
    return sorted(value)
