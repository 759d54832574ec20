"""Checkpoints: find the one to resume from, and check that it fits the model and the disk."""

import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..hub import weight_files
from .arguments import LionTrainingArguments
from .errors import UserError, require_disk, require_path
from .models import existing_config


logger = logging.get_logger(__name__)

# Options that may differ between a checkpoint and the run that resumes it.
COMPUTATION = {"format", "chunk_size", "unpad", "use_cache", "sparse_prediction", "sparse_pred_ignore_index"}


def checkpoint_to_resume(training: LionTrainingArguments) -> str | None:
    """Return the checkpoint folder to resume from: the given one, or the last complete one, or None."""
    wanted = training.resume_from_checkpoint
    if not training.do_train or str(wanted).lower() in ("no", "false"):
        return None
    if wanted is not None and wanted.lower() != "true":
        problem = incompleteness(Path(wanted))
        if problem:
            raise UserError(f"--resume_from_checkpoint {wanted!r} is not a complete checkpoint: {problem}")
        return wanted
    return last_checkpoint(training.output_dir)


def start_of_decay(decay_from: str | None, training: LionTrainingArguments) -> str | None:
    """Return the checkpoint of the stable phase that a decay continues, and set `max_steps` to the end of the decay.

    `learning_rate` becomes the peak of the stable phase, which the schedule of the checkpoint has.

    Args:
        decay_from: that checkpoint, or a run whose last one it is; None for a run that starts in another way.
        training: the arguments, with whole `decay_steps`.

    Raises:
        UserError: for a folder without a complete checkpoint, or one without the state of the optimizer.
    """
    if decay_from is None:
        return None
    if training.decay_steps < 1:
        raise UserError(f"--decay_from requires --decay_steps of at least 1, not {training.decay_steps:g}")
    folder = last_checkpoint(require_path(decay_from, "--decay_from")) or decay_from
    problem = incompleteness(Path(folder))
    if problem is None and not (Path(folder) / "optimizer.pt").is_file() and not training.deepspeed:
        problem = "optimizer.pt is missing"
    if problem:
        raise UserError(f"--decay_from {decay_from!r} is not a complete checkpoint: {problem}")
    state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
    training.max_steps = state.global_step + int(training.decay_steps)
    schedule = Path(folder) / "scheduler.pt"
    if schedule.is_file():
        training.learning_rate = torch.load(schedule, map_location="cpu", weights_only=True)["base_lrs"][0]
    return str(folder)


def last_checkpoint(run: str | Path) -> str | None:
    """Return the last complete checkpoint in the folder of a run, or None."""
    folders = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdigit()
    }
    for _, folder in sorted(folders.items(), reverse=True):
        problem = incompleteness(folder)
        if problem is None:
            return str(folder)
        logger.warning(f"skipping {folder}, which is incomplete: {problem}")
    return None


def incompleteness(folder: Path) -> str | None:
    """Return why a checkpoint folder is incomplete (for example if writing it was interrupted), or None."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # written last
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({type(error).__name__})"
    try:
        weights = weight_files(folder)
    except (OSError, ValueError) as error:
        return f"its index cannot be read ({error})"
    for file in sorted({*weights, *folder.glob("*.safetensors")}):
        if not file.is_file():
            return f"{file.name} is missing"
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name} is damaged ({error})"
    for file in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is damaged"
    return None


def check_resumable(checkpoint: str, auto_class, config: PreTrainedConfig) -> None:
    """Raise a `UserError` if the checkpoint holds a model of another type, size or classes.

    Options of the computation may differ, as may ids of special tokens, which the Trainer copies from the tokenizer.
    """
    stored = existing_config(checkpoint, auto_class)
    own = set(type(config).__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    own = {name for name in own if not name.endswith("_token_id")} - COMPUTATION
    for name in ("model_type", *sorted(own), "id2label", "problem_type"):
        before, now = getattr(stored, name, None), getattr(config, name, None)
        if before != now:
            raise UserError(
                f"{checkpoint!r} holds another model: {name} is {before!r} there and {now!r} here. Use another "
                "--output_dir, or --resume_from_checkpoint no to start from scratch"
            )


def check_disk(training: TrainingArguments, model: PreTrainedModel, copies: int = 1) -> None:
    """Raise a `UserError` if the disk has no room for the final model and the checkpoints with AdamW's two states.

    Each save writes `copies` of the weights.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = 0 if training.save_strategy == "no" else (training.save_total_limit or 1) + 1
    require_disk(training.output_dir, copies * weights + (2 + copies) * weights * kept)
