"""Exponential moving average (EMA) of the weights, as in DeiT."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from .errors import user_errors


logger = logging.get_logger(__name__)


class Ema(TrainerCallback):
    """Average the weights after every optimizer step, starting from the weights at the start of training.

    The average covers about the last 1 / (1 - decay) steps: 25,000 with DeiT's 0.99996, of 375,000 in its recipe. In a
    much shorter run it stays close to the initial weights; a warning then suggests a decay.

    Args:
        decay: share of the old average that each step keeps.
        checkpoint: folder that training resumes from, if any; its average is in its subfolder "ema".
    """

    def __init__(self, decay: float, checkpoint: str | None):
        self.decay, self.checkpoint = decay, checkpoint
        self.average: AveragedModel | None = None

    def on_train_begin(self, args, state, control, model: PreTrainedModel, **kwargs):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self.average.update_parameters(model)  # the first call copies
        stored = Path(self.checkpoint or "") / "ema"
        if self.checkpoint and not stored.is_dir():
            logger.warning(
                f"{self.checkpoint} holds no averaged weights; the average starts from the weights of the checkpoint"
            )
        elif self.checkpoint:
            with torch.random.fork_rng(devices=[]), user_errors(f"cannot load {str(stored)!r}", OSError, ValueError):
                self.average.module.load_state_dict(type(model).from_pretrained(stored).state_dict())
        if state.max_steps * (1 - self.decay) < 3:
            logger.warning(
                f"--ema_decay {self.decay} averages about {1 / (1 - self.decay):,.0f} steps, but training has only "
                f"{state.max_steps:,}: the average stays close to the first weights. Try 1 - 10 / steps"
            )

    def on_optimizer_step(self, args, state, control, model: PreTrainedModel, **kwargs):
        self.average.update_parameters(model)

    @contextmanager
    def in_place_of(self, model: PreTrainedModel):
        """Replace the model's weights by the averaged ones inside the context."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: PreTrainedModel) -> None:
        for ours, theirs in zip(self.average.module.parameters(), model.parameters(), strict=True):
            ours.data, theirs.data = theirs.data, ours.data

    def save(self, folder: str | Path, processor) -> None:
        """Save the average to the subfolder "ema", from which `from_pretrained` loads it."""
        self.average.module.save_pretrained(Path(folder) / "ema")
        processor.save_pretrained(Path(folder) / "ema")
