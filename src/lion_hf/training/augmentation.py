"""Random changes of training images: small shifts and mirroring, the DeiT recipe, mixup and cutmix.

The DeiT recipe is computed by kornia, or by timm where that is installed (the tests run kornia's path only: timm needs
torchvision, which they do without). All random numbers of an image come from its `Key`.
"""

import importlib.util
import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from .data import Key, random_numbers
from .errors import UserError


logger = logging.get_logger(__name__)


@dataclass
class AugmentationArguments:
    augment: Literal["none", "shift", "flip", "shift+flip", "deit"] = field(
        default="none", metadata={"help": "Random changes in training; deit is the recipe that the flags below set."}
    )
    augmentation_backend: Literal["auto", "kornia", "timm"] = field(
        default="auto",
        metadata={"help": "What computes --augment deit. auto: timm if it can be imported, else kornia."},
    )
    crop_scale: float = field(default=0.08, metadata={"help": "deit: smallest share of an image that a crop covers."})
    rand_augment: str = field(
        default="rand-m9-mstd0.5-inc1", metadata={"help": "deit: RandAugment in timm's notation, or none."}
    )
    color_jitter: float = field(
        default=0.3,
        metadata={"help": "deit: change of brightness, contrast, saturation; as in DeiT, only without RandAugment."},
    )
    random_erasing: float = field(default=0.25, metadata={"help": "deit: probability of a rectangle of noise."})
    repeated_augmentation: int = field(
        default=1, metadata={"help": "Readings of an image in a batch, each changed anew (an epoch stays as long)."}
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0: none. DeiT: 0.8."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of cutmix; 0: none. DeiT: 1."})
    mixup_prob: float = field(default=1.0, metadata={"help": "Probability that a batch is mixed at all."})
    mixup_switch_prob: float = field(default=0.5, metadata={"help": "Probability of cutmix where both are on."})

    def __post_init__(self):
        for name in ("color_jitter", "random_erasing", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; allowed is 0 to 1")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"--crop_scale is {self.crop_scale}; allowed is more than 0 and at most 1")
        if not (0 <= self.mixup < math.inf and 0 <= self.cutmix < math.inf):
            raise ValueError("--mixup and --cutmix must not be negative, and must be finite")
        if self.repeated_augmentation < 1:
            raise ValueError(f"--repeated_augmentation is {self.repeated_augmentation}; it must be at least 1")


@contextmanager
def seeded(seed: int):
    """Inside, torch (CPU), NumPy and Python draw from this seed; outside, as if nothing had been drawn, so that the
    model's own random numbers do not depend on the images and a resumed run finds them where they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators too
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


# ------------------------------------------------------------------------------------------------------ one image


def deit_augmentation(options: AugmentationArguments, processor, size: tuple[int, int]) -> Callable:
    """The recipe as a function from an RGB image to normalised pixels, which draws from the global generators."""
    norm = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    if choose_backend(options.augmentation_backend) == "timm":
        from timm.data import create_transform

        return create_transform(
            input_size=(3, *size),
            is_training=True,
            scale=(options.crop_scale, 1.0),
            color_jitter=options.color_jitter or None,
            auto_augment=None if options.rand_augment == "none" else options.rand_augment,
            interpolation=Image.Resampling(processor.resample).name.lower(),
            re_prob=options.random_erasing,
            re_mode="pixel",
            **norm,
        )
    from .kornia_augmentation import KorniaAugmentation

    chosen = ("crop_scale", "rand_augment", "color_jitter", "random_erasing")
    values = {name: getattr(options, name) for name in chosen}
    return KorniaAugmentation(size, resample=processor.resample, **values, **norm)


def choose_backend(wanted: str) -> str:
    """ "timm" or "kornia", which must be importable."""
    problem = None
    if wanted in ("auto", "timm"):
        try:
            import timm.data  # noqa: F401

            return "timm"
        except Exception as error:  # a torchvision that does not fit torch raises more than ImportError
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if wanted == "timm":
        raise UserError(f"--augmentation_backend timm: timm cannot be imported ({problem})")
    if importlib.util.find_spec("kornia") is None:
        raise UserError("--augment deit needs kornia or timm: pip install 'lion-hf[train]'")
    if problem:
        logger.warning_once(
            "The DeiT recipe is computed by kornia, since timm cannot be imported: the same operations and magnitudes, "
            "but in floating point where timm rounds to 8 bits after each, and with other random numbers. Say "
            "--augmentation_backend kornia to choose this."
        )
    return "kornia"


def shift_and_flip(pixels: Tensor, kind: str, padding: Tensor, draws: np.ndarray) -> Tensor:
    """Mirrors every second image and shifts each by up to an eighth of its side, as far as `kind` says.

    Args:
        pixels: (batch, channels, height, width).
        kind: "none", "shift", "flip" or "shift+flip".
        padding: colour of what is shifted in, (1, channels, 1, 1).
        draws: three random numbers from 0 to 1 for each image.
    """
    if "flip" in kind:
        mirrored = torch.from_numpy(draws[:, 0] < 0.5).view(-1, 1, 1, 1)
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    if "shift" in kind:
        height, width = pixels.shape[-2:]
        up, left = max(1, height // 8), max(1, width // 8)
        canvas = padding.expand(len(pixels), -1, height + 2 * up, width + 2 * left).clone()
        canvas[:, :, up:-up, left:-left] = pixels
        corners = (draws[:, 1:] * (2 * up + 1, 2 * left + 1)).astype(int).tolist()
        pixels = torch.stack([x[:, i : i + height, j : j + width] for x, (i, j) in zip(canvas, corners, strict=True)])
    return pixels


# -------------------------------------------------------------------------------------------------------- a batch


def mix(pixels: Tensor, targets: Tensor, options: AugmentationArguments, numbers: np.random.Generator) -> tuple:
    """Mixup or cutmix of a batch with itself in reverse order, one share and one box for all (DeiT's batch mode).

    Args:
        pixels: (batch, channels, height, width).
        targets: probabilities of the classes, (batch, classes).
        numbers: all random numbers come from it.
    """
    if numbers.random() >= options.mixup_prob:
        return pixels, targets
    cut = options.cutmix > 0 and (options.mixup == 0 or numbers.random() < options.mixup_switch_prob)
    alpha = options.cutmix if cut else options.mixup
    share = numbers.beta(alpha, alpha)
    others = pixels.flip(0)
    if cut:
        height, width = pixels.shape[-2:]
        rows, columns = (_part(side, math.sqrt(1 - share), numbers) for side in (height, width))
        pixels = pixels.clone()
        pixels[:, :, rows, columns] = others[:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        pixels = share * pixels + (1 - share) * others
    return pixels, share * targets + (1 - share) * targets.flip(0)


def _part(side: int, share: float, numbers: np.random.Generator) -> slice:
    """A share of a side around a random point, cut off at the border."""
    half, center = int(side * share) // 2, int(numbers.integers(side))
    return slice(max(0, center - half), min(side, center + half))


def batch_numbers(seed: int, keys: list[Key]) -> np.random.Generator:
    """Random numbers of a whole batch, apart from those of its images."""
    return random_numbers(seed, keys[0]._replace(repeat=keys[0].repeat + 2**32))
