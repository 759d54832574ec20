"""The training of a linearisation: two stages, progress, and a state from which an interrupted run goes on."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from .losses import LayerErrors, end_loss, states
from .models import Pair


STATE = "linearize_state.pt"
# Seconds between two savings of the state, and between two lines of progress.
_SAVE_EVERY, _SAY_EVERY = 120, 15
# Share of a stage in which learning rates rise.
_WARM_UP = 0.1
_MAX_NORM = 1.0
MIXED_PRECISIONS = ("auto", "no", "bf16")


@dataclass
class Recipe:
    """Options of the training that decide its result.

    Args:
        steps: number of steps of both stages, at most.
        minutes: time of both stages, at most; 0 for no limit.
        first_share: share of the first stage in steps or time, in [0, 1].
        learning_rate: peak learning rate of the second stage.
        map_learning_rate: peak learning rate of feature maps in the first stage.
        layer_learning_rate: peak learning rate of projections in the first stage.
        max_length: maximum number of tokens of a piece of text. Images do not use it.
        batch_size: number of pieces of text, or of images, in a batch.
        mask_share: share of the tokens that the tokenizer's mask token replaces in training, in [0, 1].
        seed: seed of the order of the text or images.
        mixed_precision: "bf16" trains under autocast to bfloat16, with weights in float32; "no" in float32; "auto" in
            bfloat16 where the device computes in it. Measurements are always in float32.
    """

    steps: int = 3000
    minutes: float = 30.0
    first_share: float = 0.5
    learning_rate: float = 2e-4
    map_learning_rate: float = 0.1
    layer_learning_rate: float = 2e-3
    max_length: int = 128
    batch_size: int = 32
    mask_share: float = 0.0
    seed: int = 17
    mixed_precision: str = "auto"

    def __post_init__(self):
        for name in ("steps", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "map_learning_rate", "layer_learning_rate", "minutes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be a finite number, 0 or more")
        for name in ("first_share", "mask_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be from 0 to 1")
        if self.mixed_precision not in MIXED_PRECISIONS:
            allowed = ", ".join(MIXED_PRECISIONS)
            raise ValueError(f"--mixed_precision is {self.mixed_precision!r}; it must be one of {allowed}")


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: number of steps that are done.
        second: whether the second stage has begun.
        seconds: time of the steps that are done.
        log: (stage, step, loss) of each line of progress.
        before: the measurements before the training.
    """

    step: int = 0
    second: bool = False
    seconds: float = 0.0
    log: list[tuple[int, int, float]] = field(default_factory=list)
    before: dict[str, object] = field(default_factory=dict)

    def share(self, recipe: Recipe) -> float:
        """Return the share of the run that is done, in steps or in time, whichever is larger."""
        timed = self.seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
        return min(max(self.step / recipe.steps, timed), 1.0)


class Data(Protocol):
    """What a run learns from: `Pieces` of text, or `Images`. `training` and `held_out` are its parts."""

    training: Sequence
    held_out: Sequence

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the inputs of a step, which depend on the step alone."""

    def measuring(self) -> list[dict[str, Tensor]]:
        """Return the inputs to measure on."""


class Linearizer:
    """Trains the student of a pair.

    Args:
        pair: source and student.
        data: the text or images.
        recipe: options of the training.
        pooling: how a sentence encoder pools; None if the source is none.
        folder: where the state is kept; None to keep none.
        identity: what else the state must agree with, such as the name of the source.
        say: receives lines of progress.
    """

    def __init__(
        self,
        pair: Pair,
        data: Data,
        recipe: Recipe,
        *,
        pooling: str | None = None,
        folder: Path | None = None,
        identity: dict[str, object] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.pair, self.data, self.recipe, self.pooling, self.say = pair, data, recipe, pooling, say
        self.folder, self.progress = folder, Progress()
        self.identity = fingerprint({**asdict(recipe), **(identity or {})})
        self.device = pair.student.device
        self.bf16 = recipe.mixed_precision == "bf16" or (
            recipe.mixed_precision == "auto" and computes_in_bf16(self.device.type)
        )
        self._start_stage()

    def _start_stage(self) -> None:
        recipe, student = self.recipe, self.pair.student
        student.requires_grad_(False)
        if self.progress.second:
            maps, others = split_parameters(student.base_model, linear_mixers(self.pair))
            rates = (recipe.learning_rate * 10, recipe.learning_rate)
        else:
            mixers = nn.ModuleList(linear_mixers(self.pair))
            maps, others = split_parameters(mixers, mixers)
            rates = (recipe.map_learning_rate, recipe.layer_learning_rate)
        groups = [{"params": p, "lr": 0.0, "peak": rate} for p, rate in zip((maps, others), rates, strict=True)]
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        self.optimizer = AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98), eps=1e-8)

    def train(self) -> None:
        """Train to the end. An interruption saves the state first."""
        said = saved = time.monotonic()
        losses: list[float] = []
        try:
            while (share := self.progress.share(self.recipe)) < 1:
                if not self.progress.second and share >= self.recipe.first_share:
                    self.progress.second, losses = True, []
                    self._start_stage()
                started = time.monotonic()
                losses.append(self._step(share))
                now = time.monotonic()
                self.progress.seconds += now - started
                self.progress.step += 1
                if now - said > _SAY_EVERY:
                    self._report(losses)
                    said, losses = now, []
                if now - saved > _SAVE_EVERY:
                    self.save_state()
                    saved = now
        except KeyboardInterrupt:
            self.save_state()
            raise
        if losses:
            self._report(losses)

    def _step(self, share: float) -> float:
        first = self.recipe.first_share
        done = (share - first) / max(1 - first, 1e-9) if self.progress.second else share / max(first, 1e-9)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (done + 1 / self.recipe.steps) / _WARM_UP) * (1 - 0.98 * done)
        batch = {name: x.to(self.device) for name, x in self.data.batch(self.progress.step).items()}
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.progress.second:
                loss = end_loss(self.pair, batch, self.pooling)
            else:
                with torch.no_grad(), LayerErrors(self.pair, backward=True) as comparison:
                    states(self.pair.teacher, batch)
                loss = sum(comparison.errors.values()) / len(self.pair.layers)
        if self.progress.second:
            loss.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], _MAX_NORM)
        self.optimizer.step()
        return loss.item()

    def _report(self, losses: list[float]) -> None:
        progress, recipe = self.progress, self.recipe
        mean, stage = sum(losses) / len(losses), 1 + progress.second
        progress.log.append((stage, progress.step, mean))
        share = progress.share(recipe)
        left = progress.seconds * (1 / max(share, 1e-9) - 1) / 60
        what = "layers, relative squared error" if stage == 1 else "end to end, loss"
        self.say(
            f"stage {stage} ({what}): step {progress.step}, {mean:.4f}, {share:.0%} done, {progress.seconds / 60:.1f} "
            f"min, about {left:.1f} min left"
        )

    def save_state(self) -> None:
        """Save model, optimizer and progress, so that the same command goes on from here."""
        if self.folder is None:
            return
        state = {
            "identity": self.identity,
            "progress": asdict(self.progress),
            "student": self.pair.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.folder / f"{STATE}.new")
        os.replace(self.folder / f"{STATE}.new", self.folder / STATE)

    def resume(self) -> bool:
        """Go on from the state in the folder, if there is one; return whether there was.

        Raises:
            ValueError: if the state belongs to other options.
        """
        if self.folder is None or not (self.folder / STATE).is_file():
            return False
        state = torch.load(self.folder / STATE, weights_only=True, map_location=self.device)
        if state["identity"] != self.identity:
            raise ValueError(
                f"{str(self.folder)!r} holds the state of a run with other options; give the same options to resume "
                "it, another OUT, or --force to begin anew"
            )
        self.progress = Progress(**state["progress"])
        self.pair.student.load_state_dict(state["student"])
        self._start_stage()
        self.optimizer.load_state_dict(state["optimizer"])
        return True


def computes_in_bf16(device: str) -> bool:
    """Return whether a kind of device has instructions for products in bfloat16, so that it is faster in them."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def fingerprint(options: dict[str, object]) -> str:
    """Return a short text that differs between different options."""
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()


def linear_mixers(pair: Pair) -> list[nn.Module]:
    """Return the mixers of the layers that become LION."""
    return [pair.student.base_model.layers[i].mixer for i in pair.layers]


def split_parameters(module: nn.Module, mixers) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of a module: those that linear mixers have and softmax attention lacks, and the others."""
    own = {
        parameter
        for mixer in mixers
        for name, parameter in mixer.named_parameters()
        if name.startswith(tuple(mixer.weight_names()))
    }
    parameters = list(module.parameters())
    return [p for p in parameters if p in own], [p for p in parameters if p not in own]
