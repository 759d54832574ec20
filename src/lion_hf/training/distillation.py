"""Distillation as in DeiT, without a distillation token: the student also learns the outputs of a teacher."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig

from .errors import UserError, user_errors
from .models import existing_config


@dataclass
class DistillationArguments:
    """Distillation from a trained image classifier."""

    _argument_group_name = "distillation"

    teacher: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the image classifier to learn from. DeiT: facebook/regnet-y-160."},
    )
    distillation: Literal["soft", "hard"] | None = field(
        default=None,
        metadata={"help": "Target: the teacher's probabilities (soft) or its most likely class (hard). Default: hard."},
    )
    distillation_alpha: float = field(default=0.5, metadata={"help": "Weight of the teacher in the loss, from 0 to 1."})
    distillation_tau: float = field(default=1.0, metadata={"help": "Temperature of soft distillation."})

    def __post_init__(self):
        if self.distillation and not self.teacher:
            raise ValueError("--distillation requires --teacher, the model to learn from")
        self.distillation = self.distillation or "hard"
        if not 0 <= self.distillation_alpha <= 1:
            raise ValueError(f"--distillation_alpha is {self.distillation_alpha}; it must be from 0 to 1")
        if not 0 < self.distillation_tau < math.inf:
            raise ValueError(f"--distillation_tau is {self.distillation_tau}; it must be positive and finite")


def distillation_losses(
    losses: Tensor, logits: Tensor, teacher_logits: Tensor, kind: str, alpha: float, tau: float
) -> Tensor:
    """Return losses per image, (batch,): (1 - alpha) * losses + alpha * the loss against the teacher.

    That loss is the cross entropy with the teacher's most likely class ("hard"), or tau^2 times the Kullback-Leibler
    divergence of the two distributions at temperature tau, summed over the classes ("soft", as in the DeiT paper).
    """
    if kind == "hard":
        taught = F.cross_entropy(logits, teacher_logits.argmax(-1), reduction="none")
    else:
        student, teacher = (F.log_softmax(x / tau, -1) for x in (logits, teacher_logits))
        taught = tau**2 * F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return (1 - alpha) * losses + alpha * taught


class Teacher:
    """A frozen classifier that reads the pixels of the student in its own normalisation.

    Args:
        options: `options.teacher` is its Hub name or folder.
        student: configuration of the student, which must have the same classes.
        processor: image processor of the student.
        size: height and width of the images.
        device: device of the teacher.
    """

    def __init__(
        self, options: DistillationArguments, student: PreTrainedConfig, processor, size: tuple[int, int], device
    ):
        name, self.options = options.teacher, options
        config = existing_config(name, AutoModelForImageClassification, "--teacher")
        check_classes(name, config, student)
        with user_errors(f"cannot load the teacher {name!r}", OSError, ValueError):
            self.model = AutoModelForImageClassification.from_pretrained(name).eval().requires_grad_(False).to(device)
            known = AutoImageProcessor.from_pretrained(name, backend="pil")
        (mean, std), (their_mean, their_std) = normalization(processor, device), normalization(known, device)
        self.scale, self.shift = std / their_std, (mean - their_mean) / their_std
        with user_errors(f"the teacher {name!r} does not accept images of {size[0]} x {size[1]} pixels", Exception):
            self.logits(torch.zeros(1, 3, *size, device=device))

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        return self.model(pixels * self.scale + self.shift).logits.float()

    def losses(self, losses: Tensor, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return losses per image with the teacher's part, see `distillation_losses`."""
        kind, alpha, tau = (getattr(self.options, f"distillation{name}") for name in ("", "_alpha", "_tau"))
        return distillation_losses(losses, logits, teacher_logits, kind, alpha, tau)


def normalization(processor, device) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation, (1, 3, 1, 1), with which a processor normalises."""
    values = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return tuple(torch.tensor(x, device=device).view(1, -1, 1, 1) for x in values)


def check_classes(name: str, teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raise a `UserError` if teacher and student do not have the same classes in the same order."""
    if teacher.num_labels != student.num_labels:
        raise UserError(
            f"the teacher {name!r} has {teacher.num_labels} classes, the student {student.num_labels}; "
            "both must have the same classes"
        )
    theirs, ours = ([config.id2label[i] for i in range(config.num_labels)] for config in (teacher, student))
    if theirs != ours and set(theirs) == set(ours):
        raise UserError(f"the teacher {name!r} has the student's classes in another order ({theirs[0]!r} comes first)")
