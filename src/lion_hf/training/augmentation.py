"""Augmentation of training images: small shifts and mirroring, the DeiT recipe, mixup and cutmix.

The DeiT recipe is computed by timm if it can be imported, else by kornia. Only the kornia path is tested, since timm
requires torchvision. All random numbers of an image come from its `Key`.
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
    """Augmentation of training images."""

    _argument_group_name = "augmentation of training images"

    augment: Literal["none", "shift", "flip", "shift+flip", "deit"] = field(
        default="none",
        metadata={"help": "Augmentation in training. deit is the DeiT recipe, which the flags marked deit adjust."},
    )
    augmentation_backend: Literal["auto", "kornia", "timm"] = field(
        default="auto",
        metadata={"help": "Library that computes --augment deit. auto: timm if it can be imported, else kornia."},
    )
    crop_scale: float = field(
        default=0.08, metadata={"help": "deit: smallest share of the image area that a crop covers."}
    )
    rand_augment: str = field(
        default="rand-m9-mstd0.5-inc1", metadata={"help": "deit: RandAugment policy in timm's notation, or none."}
    )
    color_jitter: float = field(
        default=0.3,
        metadata={
            "help": "deit: range of brightness, contrast and saturation changes. Used only with --rand_augment none."
        },
    )
    random_erasing: float = field(
        default=0.25, metadata={"help": "deit: probability that a rectangle is filled with noise."}
    )
    repeated_augmentation: int = field(
        default=1,
        metadata={
            "help": "Copies of an image in a batch, each augmented differently. The length of an epoch does not change."
        },
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0 turns it off. DeiT: 0.8."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of cutmix; 0 turns it off. DeiT: 1."})
    mixup_prob: float = field(default=1.0, metadata={"help": "Probability that mixup or cutmix is applied to a batch."})
    mixup_switch_prob: float = field(
        default=0.5, metadata={"help": "Probability of cutmix if mixup and cutmix are both on."}
    )

    def __post_init__(self):
        for name in ("color_jitter", "random_erasing", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"--crop_scale is {self.crop_scale}; it must be greater than 0 and at most 1")
        if not (0 <= self.mixup < math.inf and 0 <= self.cutmix < math.inf):
            raise ValueError("--mixup and --cutmix must be finite and at least 0")
        if self.repeated_augmentation < 1:
            raise ValueError(f"--repeated_augmentation is {self.repeated_augmentation}; it must be at least 1")


@contextmanager
def seeded(seed: int):
    """Seed torch (CPU), NumPy and Python inside the context, and restore their states on exit.

    The model's own random numbers then do not depend on the images, and a resumed run continues them unchanged.
    """
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
    """Return the DeiT recipe: a function from an RGB image to normalised pixels that uses the global generators."""
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
    """Return "timm" or "kornia", whichever of the wanted ones can be imported."""
    problem = None
    if wanted in ("auto", "timm"):
        try:
            import timm.data  # noqa: F401

            return "timm"
        except Exception as error:  # a torchvision built for another torch raises other errors than ImportError
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if wanted == "timm":
        raise UserError(f"--augmentation_backend timm requires timm, which cannot be imported ({problem})")
    if importlib.util.find_spec("kornia") is None:
        raise UserError("--augment deit requires kornia or timm: pip install 'lion-hf[train]'")
    if problem:
        logger.warning_once(
            "The DeiT recipe is computed by kornia, because timm cannot be imported. Operations and magnitudes are the "
            "same, but kornia computes in floating point, where timm rounds to 8 bits after each operation, and the "
            "random numbers differ. Set --augmentation_backend kornia to silence this warning."
        )
    return "kornia"


def shift_and_flip(pixels: Tensor, kind: str, padding: Tensor, draws: np.ndarray) -> Tensor:
    """Mirror each image with probability one half and shift it by up to an eighth of its side, depending on `kind`.

    Args:
        pixels: (batch, channels, height, width).
        kind: "none", "shift", "flip" or "shift+flip".
        padding: colour of the pixels that are shifted in, (1, channels, 1, 1).
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
    """Apply mixup or cutmix to a batch and its reverse, with one share and one box for all images (DeiT's batch mode).

    Args:
        pixels: (batch, channels, height, width).
        targets: probabilities of the classes, (batch, classes).
        numbers: generator of all random numbers.
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
    """Return the slice that covers a share of a side around a random point, cut off at the border."""
    half, center = int(side * share) // 2, int(numbers.integers(side))
    return slice(max(0, center - half), min(side, center + half))


def batch_numbers(seed: int, keys: list[Key]) -> np.random.Generator:
    """Return the generator of a whole batch, which is independent of those of its images."""
    return random_numbers(seed, keys[0]._replace(repeat=keys[0].repeat + 2**32))
