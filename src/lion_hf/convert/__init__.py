"""Conversion of the authors' checkpoints, in both directions, and and of other encoders' weights."""

from ..nn.mixer import head_windows
from .bert import config_from_bert, from_bert
from .checkpoint import convert_checkpoint, reverse_checkpoint
from .encoder import config_from_encoder, from_encoder
from .names import convert_text_state_dict, convert_vision_state_dict
from .vit import config_from_vit, from_vit
from .warm_start import hidden_state_distillation_loss


__all__ = [
    "config_from_bert",
    "config_from_encoder",
    "config_from_vit",
    "convert_checkpoint",
    "convert_text_state_dict",
    "convert_vision_state_dict",
    "from_bert",
    "from_encoder",
    "from_vit",
    "head_windows",
    "hidden_state_distillation_loss",
    "reverse_checkpoint",
]
