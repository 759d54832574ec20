"""The Trainer with LION's optimizer groups and schedules, and batches independent of the number of processes."""

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, get_constant_schedule_with_warmup
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from ..nn.mixer import Mixer
from .data import EpochBatchSampler, EpochDataLoader, KeyedRows, collate_keyed
from .errors import UserError
from .hidden_teacher import HiddenStateTeacher


class LionTrainer(Trainer):
    """Trainer with LION's optimizer groups and schedules with a floor.

    Batches do not depend on the number of processes (see `EpochBatchSampler`).

    Args:
        repeats: readings of every training row side by side (repeated augmentation).
        kwargs: as for `Trainer`. A data collator with the attribute `uses_keys = True` gets the `Key` of each training
            row as "key" and draws all random numbers from it.
        hidden_teacher: see `HiddenStateTeacher`.
    """

    def __init__(self, *args, repeats: int = 1, hidden_teacher: HiddenStateTeacher | None = None, **kwargs):
        smoothing = kwargs["args"].label_smoothing_factor
        kwargs.setdefault("compute_loss_func", partial(summed_loss, label_smoothing=smoothing))
        super().__init__(*args, **kwargs)
        self.repeats = repeats
        self.hidden_teacher = hidden_teacher
        self.restored: str | None = None
        self.decay_start = math.inf
        self._last_log, self._evaluation_time = None, 0.0

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay.

        With `decay_all` these are all parameters; otherwise all but biases, norms, class token, position table, 1-D
        parameters, and those that a variant excludes.
        """
        sizes = {name: parameter.dim() for name, parameter in model.named_parameters(remove_duplicate=False)}
        if self.args.decay_all:
            return list(sizes)
        mixers = [x for x in model.modules() if isinstance(x, Mixer) and not x.variant.weight_decay]
        spared = {"cls_token", "position_embeddings", *(name for mixer in mixers for name in mixer.variant_weights)}
        names = super().get_decay_parameter_names(model)
        return [name for name in names if sizes[name] > 1 and spared.isdisjoint(name.split("."))]

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        # torch-optimi would choose its Triton kernels, where Triton is installed, for parameters on a CPU too.
        for group in optimizer.param_groups if self.args.device.type == "cpu" else ():
            if "triton" in group and group["triton"] is None:
                group["triton"] = False
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        args = self.args
        if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            self._set_decay(num_training_steps)
        # Without a decay the rate stays at its peak even after the last step, whose checkpoint may be decayed from.
        if self.lr_scheduler is None and self.decay_start == num_training_steps:
            warmup = args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = get_constant_schedule_with_warmup(optimizer or self.optimizer, warmup)
            self._created_lr_scheduler = True
        if self.lr_scheduler is None and (args.lr_floor or args.lr_warmup_start):
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                partial(
                    learning_rate_share,
                    kind=args.lr_scheduler_type.value,
                    warmup=args.get_warmup_steps(num_training_steps),
                    total=num_training_steps,
                    floor=args.lr_floor,
                    start=args.lr_warmup_start,
                ),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _set_decay(self, num_training_steps: int) -> None:
        """Set the length of the decay in the arguments of the schedule, and the step in which it starts."""
        given = dict(self.args.lr_scheduler_kwargs or {})
        if self.args.decay_steps or "num_decay_steps" not in given:
            given["num_decay_steps"] = whole_steps(self.args.decay_steps, num_training_steps)
        self.args.lr_scheduler_kwargs = given
        self.decay_start = num_training_steps - given["num_decay_steps"]
        if given.get("num_stable_steps") is not None:
            self.decay_start = self.args.get_warmup_steps(num_training_steps) + given["num_stable_steps"]

    def get_train_dataloader(self):
        dataset, args = self.train_dataset, self.args
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return super().get_train_dataloader()
        sampler = EpochBatchSampler(
            len(dataset),
            self._train_batch_size,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            rank=args.process_index,
            world_size=args.world_size,
            repeats=self.repeats,
            drop_last=args.dataloader_drop_last,
        )
        collator = self.data_collator
        return EpochDataLoader(
            KeyedRows(dataset),
            batch_sampler=sampler,
            collate_fn=partial(collate_keyed, collator, getattr(collator, "uses_keys", False)),
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Return the batches of an optimizer step as `Trainer` does.

        A data collator with a method `training_batch` changes each of them first. It learns whether the decay of the
        schedule has begun, which loaders that work ahead cannot know.
        """
        change = getattr(self.data_collator, "training_batch", None)
        if change is not None:
            epoch_iterator = map(partial(change, decaying=self.state.global_step >= self.decay_start), epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Return the loss of `Trainer`, plus the distance to the teacher's hidden states in training."""
        if self.hidden_teacher is None or not model.training:
            return self._task_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = {**inputs, "output_hidden_states": True}
        loss, outputs = self._task_loss(model, asked, True, num_items_in_batch)
        taught = self.hidden_teacher.loss(outputs.hidden_states, inputs, num_items_in_batch)
        loss = loss + self.summed_over_devices(taught, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, model, inputs, return_outputs: bool, num_items_in_batch):
        """Return the loss of `Trainer`. With `sparse_prediction` it is the model's own, which selects the logits."""
        config = getattr(self.model, "config", None)
        if not getattr(config, "sparse_prediction", False) or "labels" not in inputs:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if num_items_in_batch is not None and self.args.n_gpu > 1:
                # Trainer expects one loss for each device of DataParallel, but `summed_loss` is that of all.
                loss = loss / self.args.n_gpu
            return (loss, outputs) if return_outputs else loss
        items = {}
        if num_items_in_batch is not None:  # a step may have no label at all
            items["num_items_in_batch"] = torch.as_tensor(num_items_in_batch).clamp(min=1)
        outputs = model(**inputs, **items)
        # DataParallel returns one loss for each of its devices.
        loss = outputs["loss"].sum() if items else outputs["loss"].mean()
        if self.args.label_smoothing_factor:
            labels = inputs["labels"]
            labels = labels[labels != config.sparse_pred_ignore_index]
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        loss = self.summed_over_devices(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def summed_over_devices(self, loss: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """Scale a loss that was divided by the labels of all processes, because gradients are averaged over these.

        Without `average_tokens_across_devices`, Trainer divides the number of labels by the devices of DataParallel.
        """
        if num_items_in_batch is None:
            return loss
        if self.args.average_tokens_across_devices:
            return loss * self.accelerator.num_processes
        return loss / max(1, self.args.n_gpu)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Log before every evaluation and save, and at the end.

        Every step then counts in exactly one logged loss, even if training stops at a checkpoint and resumes later.
        """
        if self.args.logging_strategy != IntervalStrategy.NO:
            last = self.state.global_step >= self.state.max_steps
            self.control.should_log |= last or self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the throughput since the last logged loss; make `train_loss` the mean over all steps, resumed or not."""
        if "train_loss" in logs:
            logs["train_loss"] = mean_loss(self.state.log_history, logs["train_loss"])
        now = (time.perf_counter() - self._evaluation_time, self.state.global_step)
        if "loss" in logs:
            if self._last_log is not None and now[1] > self._last_log[1]:
                samples = (now[1] - self._last_log[1]) * self.get_total_train_batch_size(self.args)
                logs["samples_per_second"] = samples / (now[0] - self._last_log[0])
            self._last_log = now
        super().log(logs, start_time)

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        best = self.args.metric_for_best_model if self.args.load_best_model_at_end else None
        if best and metric_key_prefix == "eval" and f"eval_{best.removeprefix('eval_')}" not in metrics:
            raise UserError(f"--metric_for_best_model is {best!r}; it must be one of {', '.join(metrics)}")
        return metrics

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate as in Transformers, without changing the random numbers of training.

        A run that resumes from a checkpoint of the same step skips the evaluation, and must draw the same numbers.
        """
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # the loader draws a seed
            output = super().evaluation_loop(*args, **kwargs)
        self._evaluation_time += time.perf_counter() - start
        return output

    def _issue_warnings_after_load(self, load_result) -> None:
        """Warn as in Transformers, but not about tied weights, which are stored once under one of their names."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def predictions(self, rows, kept: Callable) -> np.ndarray:
        """Return `kept(logits)` for rows without labels."""
        usual = self.compute_metrics, self.preprocess_logits_for_metrics
        self.compute_metrics, self.preprocess_logits_for_metrics = None, kept
        try:
            return self.predict(rows).predictions
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = usual

    def is_finished(self, checkpoint: str) -> bool:
        """Return whether the checkpoint is the end of training."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state.global_step >= steps

    def restore(self, checkpoint: str) -> None:
        """Load weights and history of a finished run from its last checkpoint, whose folder `restored` then is.

        With `load_best_model_at_end`, these are the weights of the best checkpoint, as at the end of training.
        """
        self.restored = checkpoint
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is not None and not Path(best).is_dir():  # the folder of the run was moved
            best = str(Path(checkpoint).with_name(Path(best).name))
            if not Path(best).is_dir():
                raise UserError(
                    f"--load_best_model_at_end: the best checkpoint of the finished run, {Path(best).name}, is no "
                    f"longer in {Path(best).parent}; leave the flag out to evaluate the last one"
                )
        self._load_from_checkpoint(best or checkpoint)


def mean_loss(history: list[dict[str, float]], otherwise: float) -> float:
    """Return the mean of the logged losses, weighted by their steps; `otherwise` if none was logged."""
    logged = [(0, 0.0)] + [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if len(logged) == 1:
        return otherwise
    total = sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logged))
    return total / logged[-1][0]


def summed_loss(outputs, labels: torch.Tensor, num_items_in_batch=None, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross entropy, or squared error of fractional labels, divided by the labels of an optimizer step.

    It replaces the model's own loss, which may be a mean over each batch and would then count once per accumulated
    batch and process. Labels of -100, such as those of a filler, do not count.

    Args:
        outputs: outputs with "logits" (batch, ..., classes), or (batch, 1) for squared error.
        labels: (batch, ...).
        num_items_in_batch: labels in the optimizer step. Default: those of this batch.
        label_smoothing: share of the target that is spread over all classes.
    """
    logits, counted = outputs["logits"].float(), labels != -100
    if labels.is_floating_point():
        total = ((logits.view_as(labels) - labels) ** 2)[counted].sum()
    else:
        total = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
        )
    items = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / items.to(total.device).clamp(min=1)


def whole_steps(steps: float, total: int) -> int:
    """Return a number of steps, of which a value below 1 is a share of all steps, rounded up as in `Trainer`."""
    return math.ceil(steps * total) if steps < 1 else int(steps)


def learning_rate_share(step: int, *, kind: str, warmup: int, total: int, floor: float, start: float) -> float:
    """Return the learning rate as a share of its peak.

    It rises from `start` in `warmup` steps, then falls linearly or as a cosine to `floor` at step `total`.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    rest = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (1 - floor) * rest
