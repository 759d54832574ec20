"""Layer-wise distillation of a warm-started model from the softmax encoder that provided its weights."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..convert import from_encoder, hidden_state_distillation_loss
from ..convert.encoder import FAMILIES
from ..models.modeling_lion import LionModel
from ..models.modeling_lion_vision import LionVisionModel
from .arguments import ModelArguments
from .errors import user_errors
from .models import ALL_BECOME_LION


# Inputs of an encoder among the entries of a batch.
_ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


def frozen_encoder(name: str, device: torch.device) -> PreTrainedModel:
    """Return the encoder of a checkpoint. Its hidden states are those of a LION: of the embeddings and of each layer.

    Sources differ in the inputs that they accept and in what they call hidden states. A LION that keeps every layer of
    the source computes the same, so it is the teacher, except for BERT and ViT, which agree with LION in both.
    """
    with user_errors(f"cannot load the teacher {name!r}", OSError, ValueError):
        kind = AutoConfig.from_pretrained(name).model_type
        if kind in FAMILIES and kind not in ALL_BECOME_LION:
            base = LionModel if FAMILIES[kind].kind == "text" else LionVisionModel
            model = from_encoder(name, layers=[], model_class=base).float()
        else:
            model = AutoModel.from_pretrained(name)
    return model.eval().requires_grad_(False).to(device)


class HiddenStateTeacher:
    """The frozen encoder of a checkpoint.

    Args:
        name: Hub name or folder of the checkpoint.
        weight: weight of the distance in the loss.
        device: device of the encoder.
    """

    def __init__(self, name: str, weight: float, device: torch.device):
        self.model = frozen_encoder(name, device)
        self.weight = weight

    @classmethod
    def of(cls, arguments: ModelArguments, device: torch.device) -> "HiddenStateTeacher | None":
        """Return the teacher for `--warm_start_distillation`, or None if that is 0."""
        weight = arguments.warm_start_distillation
        return cls(arguments.warm_start, weight, device) if weight else None

    def loss(self, student: tuple[Tensor, ...], inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        """Return the weighted distance of the hidden states.

        Each row is weighted by its number of labels, so that the parts of an optimizer step add up to the same sum
        however it is split into batches. Filler rows, labelled -100, do not count.

        Args:
            student: hidden states of the student.
            inputs: the batch, with "labels" (batch, ...).
            num_items_in_batch: labels in the optimizer step. Default: those of this batch.
        """
        with torch.no_grad():
            read = {name: inputs[name] for name in _ENCODER_INPUTS if name in inputs}
            if "pixel_values" in read:  # the student may be trained at another size
                read["interpolate_pos_encoding"] = True
            teacher = self.model(**read, output_hidden_states=True).hidden_states
        labels = inputs["labels"]
        counts = (labels != -100).reshape(len(labels), -1).sum(1)
        rows = hidden_state_distillation_loss(student, teacher, inputs.get("attention_mask"))
        items = counts.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return self.weight * (rows * counts).sum() / items.to(rows.device).clamp(min=1)
