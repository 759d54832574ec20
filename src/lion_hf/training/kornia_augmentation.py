"""DeiT's augmentation of a training image, computed by kornia (and Pillow, which crops and resizes)."""

import re

import numpy as np
import torch
from kornia import enhance
from kornia.augmentation import ColorJitter, RandomErasing
from kornia.augmentation.random_generator import ResizedCropGenerator
from kornia.geometry.transform import get_rotation_matrix2d, warp_affine
from PIL import Image
from torch import Tensor

from .errors import UserError


def _move(pixels: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Move pixels by a 2 x 3 matrix (source to target); pixels from outside the image have the colour `fill`."""
    size = tuple(pixels.shape[-2:])
    moved = warp_affine(pixels, matrix[None], size, mode="bicubic", padding_mode="fill", fill_value=fill)
    return moved.clamp(0, 1)


def _rotate(pixels: Tensor, degrees: float, fill: Tensor) -> Tensor:
    height, width = pixels.shape[-2:]
    center = torch.tensor([[(width - 1) / 2, (height - 1) / 2]])
    return _move(pixels, get_rotation_matrix2d(center, torch.tensor([degrees]), torch.ones(1, 2))[0], fill)


def _shift(pixels: Tensor, share: float, axis: int, fill: Tensor) -> Tensor:
    matrix = torch.eye(2, 3)
    matrix[axis, 2] = share * pixels.shape[-1 - axis]
    return _move(pixels, matrix, fill)


def _shear(pixels: Tensor, factor: float, axis: int, fill: Tensor) -> Tensor:
    matrix = torch.eye(2, 3)
    matrix[axis, 1 - axis] = factor
    return _move(pixels, matrix, fill)


# The fifteen operations of RandAugment in the "increasing" form (inc1), as functions of the pixels (1, 3, height,
# width) from 0 to 1, the magnitude m from 0 to 1, a random sign s and the colour of pixels from outside the image.
OPERATIONS = {
    "auto_contrast": lambda x, m, s, fill: enhance.normalize_min_max(x),
    "equalize": lambda x, m, s, fill: enhance.equalize(x),
    "invert": lambda x, m, s, fill: enhance.invert(x),
    "rotate": lambda x, m, s, fill: _rotate(x, 30 * m * s, fill),
    "posterize": lambda x, m, s, fill: enhance.posterize(x, 4 - int(4 * m)),
    "solarize": lambda x, m, s, fill: enhance.solarize(x, 1 - m),
    "solarize_add": lambda x, m, s, fill: torch.where(x < 0.5, (x + 110 / 255 * m).clamp(max=1), x),
    "color": lambda x, m, s, fill: enhance.adjust_saturation_with_gray_subtraction(x, 1 + 0.9 * m * s),
    "contrast": lambda x, m, s, fill: enhance.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * m * s),
    "brightness": lambda x, m, s, fill: enhance.adjust_brightness_accumulative(x, 1 + 0.9 * m * s),
    "sharpness": lambda x, m, s, fill: enhance.sharpness(x, 1 + 0.9 * m * s),
    "shear_x": lambda x, m, s, fill: _shear(x, 0.3 * m * s, 0, fill),
    "shear_y": lambda x, m, s, fill: _shear(x, 0.3 * m * s, 1, fill),
    "translate_x": lambda x, m, s, fill: _shift(x, 0.45 * m * s, 0, fill),
    "translate_y": lambda x, m, s, fill: _shift(x, 0.45 * m * s, 1, fill),
}


def rand_augment_options(name: str) -> tuple[float, float, int]:
    """Return magnitude, its standard deviation and the number of operations of a policy such as "rand-m9-mstd0.5-inc1".

    The notation is timm's.
    """
    parts = [re.fullmatch(r"(m|mstd|n|inc)(\d+\.?\d*)", part) for part in name.split("-")[1:]]
    if not name.startswith("rand-") or None in parts:
        raise UserError(f"--rand_augment is {name!r}; it must be none, or a policy such as rand-m9-mstd0.5-inc1")
    values = {"m": 10.0, "mstd": 0.0, "n": 2.0, "inc": 0.0} | {part[1]: float(part[2]) for part in parts}
    if values["inc"] != 1:
        raise UserError(f"--rand_augment is {name!r}; kornia supports only the increasing form: add -inc1")
    return values["m"], values["mstd"], int(values["n"])


class KorniaAugmentation:
    """Random resized crop, mirroring, RandAugment or else colour jitter, and erasing.

    All random numbers are drawn from torch's generator.

    Args:
        size: (height, width) of the result.
        crop_scale: smallest share of the image area that a crop covers.
        rand_augment: such as "rand-m9-mstd0.5-inc1", or "none".
        color_jitter: brightness, contrast and saturation change by up to this share. Used only without RandAugment.
        random_erasing: probability that a rectangle is filled with noise.
        mean, std: mean and standard deviation of the normalisation.
        resample: Pillow's filter for the crop.
    """

    def __init__(
        self,
        size: tuple[int, int],
        crop_scale: float,
        rand_augment: str,
        color_jitter: float,
        random_erasing: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        resample: int,
    ):
        self.size, self.resample = size, resample
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self.boxes = ResizedCropGenerator(size, scale=(crop_scale, 1.0), ratio=(3 / 4, 4 / 3))
        self.rand = None if rand_augment == "none" else rand_augment_options(rand_augment)
        self.jitter = ColorJitter(color_jitter, color_jitter, color_jitter) if color_jitter else None
        self.random_erasing = random_erasing
        # Marks a rectangle with ones, because kornia fills it with one colour and DeiT with noise.
        self.rectangle = RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=1.0, p=1.0)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return normalised pixels (3, height, width) of an RGB image."""
        pixels = self.crop(image)
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        if self.rand is not None:
            pixels = self.rand_augment(pixels)
        elif self.jitter is not None:
            pixels = self.jitter(pixels)
        pixels = enhance.normalize(pixels, self.mean, self.std)
        if torch.rand(()) < self.random_erasing:
            erased = self.rectangle(torch.zeros(1, 1, *self.size)) == 1
            pixels = torch.where(erased, torch.randn_like(pixels), pixels)
        return pixels[0]

    def crop(self, image: Image.Image) -> Tensor:
        corners = self.boxes((1, 3, image.height, image.width))["src"][0].int()
        (left, top), (right, bottom) = corners[0].tolist(), (corners[2] + 1).tolist()
        part = image.crop((left, top, right, bottom)).resize(self.size[::-1], self.resample)
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)[None].float() / 255

    def rand_augment(self, pixels: Tensor) -> Tensor:
        """Apply each operation with probability one half, at a newly drawn magnitude."""
        magnitude, deviation, count = self.rand
        operations = list(OPERATIONS.values())
        for chosen in torch.randint(len(operations), (count,)).tolist():
            m = float((magnitude + deviation * torch.randn(())).clamp(0, 10)) / 10
            sign = 1.0 if torch.rand(()) < 0.5 else -1.0
            if torch.rand(()) < 0.5:
                pixels = operations[chosen](pixels, m, sign, self.mean)
        return pixels
