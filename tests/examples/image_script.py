"""Helpers for tests of the image script: flags, a small run in this process, images, and a collator."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil


EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "recipes" / "imagenet"
MODEL = ["--hidden_size=16", "--num_hidden_layers=2", "--num_attention_heads=2"]
TINY = [
    "--disable_tqdm=true",
    "--use_cpu=true",
    "--augmentation_backend=kornia",
    "--per_device_train_batch_size=8",
    "--save_strategy=no",
    "--eval_strategy=no",
]
DIGITS = ["--max_train_samples=24", "--max_eval_samples=12"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def train(folder, *flags):
    """Run the script in this process and return the metrics."""
    import run_image_classification

    model = [] if any(flag.startswith("--model_name_or_path") for flag in flags) else MODEL
    return run_image_classification.main([f"--output_dir={folder}", *TINY, *model, *flags])


def picture(seed=0, size=(48, 40)):
    """A smooth random RGB image of size (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def collator(bad_images="error", classes=10, size=16, crop=False, length=100, **options):
    from datasets import Dataset

    from lion_hf.training.augmentation import AugmentationArguments
    from lion_hf.training.data import Key
    from lion_hf.training.images import ImageCollator

    sizes = {"size": {"height": size, "width": size}}
    if crop:
        sizes = {"size": {"shortest_edge": round(size / 0.875)}, "do_center_crop": True}
        sizes["crop_size"] = {"height": size, "width": size}
    processor = ViTImageProcessorPil(**sizes, **IMAGENET, resample=Image.Resampling.BICUBIC, do_convert_rgb=True)
    part = Dataset.from_dict({"source_row": list(range(length))})
    options = AugmentationArguments(augmentation_backend="kornia", **options)
    made = ImageCollator(processor, options, classes, 17, bad_images, training=part, validation=part)
    rows = [{"image": encoded(i), "label": i % classes, "source_row": i, "key": Key(2, i)} for i in range(8)]
    return made, rows


def encoded(seed):
    import io

    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
