"""Models, optimizer groups, schedules, checkpoints and the Trainer of the example scripts."""

import json
import math
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from .arguments import LionTrainingArguments, ModelArguments, UserError, require_disk, require_path, user_errors
from .data import EpochBatchSampler, EpochDataLoader, KeyedRows, collate_keyed
from .hidden_teacher import HiddenStateTeacher
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.models.auto import CONFIG_MAPPING
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from lion_hf import PRESETS, LionConfig, LionVisionConfig
from ..convert.warm_start import config_from_bert, config_from_vit, from_bert, from_vit


logger = logging.get_logger(__name__)

LION_TYPES = ("lion", "lion_vision")
# New models of other kinds that the flags for sizes fit, for text and for images.
BASELINES = {"lion": ("bert", "modernbert"), "lion_vision": ("vit", "deit")}
# What the models of an Auto class are, in words.
PURPOSES = {
    "AutoModel": "a model",
    "AutoModelForMaskedLM": "a text model that can fill masks",
    "AutoModelForSequenceClassification": "a text model",
    "AutoModelForImageClassification": "an image model",
}
LABEL_OPTIONS = ("id2label", "label2id", "problem_type", "num_labels")
# Options that only LION has; new models of other kinds are built without their defaults.
LION_OPTIONS = ("mask_type", "order", "pos_emb", "cls_tok", "drop_path_rate", "softmax_layers", "layer_norm_after")


# ----------------------------------------------------------------------------------------------------------- model


def existing_config(name_or_path: str, auto_class) -> PreTrainedConfig:
    """Configuration of a checkpoint by Hub name or folder, which `auto_class` must be able to load."""
    if Path(name_or_path).exists() and not (Path(name_or_path) / "config.json").is_file():
        raise UserError(f"{name_or_path!r} is not a checkpoint: it has no config.json")
    if name_or_path.count("/") > 1 or name_or_path.startswith((".", "/")):  # no name of the Hub
        require_path(name_or_path, "model folder")
    with user_errors(f"cannot load {name_or_path!r}", OSError, ValueError, StrictDataclassError):
        config = AutoConfig.from_pretrained(name_or_path)
    if type(config) not in auto_class._model_mapping:
        raise UserError(
            f"{name_or_path!r} is a {config.model_type!r} model, which {auto_class.__name__} does not know: this script needs "
            + PURPOSES[auto_class.__name__]
        )
    return config


def build_model(
    auto_class, model_type: str, model: ModelArguments, defaults: dict[str, Any], fixed: dict[str, Any]
) -> PreTrainedModel:
    """The model to train: an existing one, one with the weights of a BERT or ViT, a preset, or one of the sizes given by
    flags.

    Args:
        auto_class: such as `AutoModelForMaskedLM`.
        model_type: "lion" or "lion_vision", where the arguments do not name another kind.
        model: the arguments.
        defaults: options of a new model where neither preset nor flags say otherwise.
        fixed: options that the data decides, such as the size of the vocabulary.
    """
    config = known_config(auto_class, model_type, model, defaults, fixed)
    if model.warm_start:
        return _warm_started(auto_class, model_type, model, fixed)
    if not model.model_name_or_path:
        with user_errors("wrong model options", ValueError):
            return auto_class.from_config(config)
    options = {k: v for k, v in fixed.items() if k in LABEL_OPTIONS}
    options |= {k: v for k, v in fixed.items() if k == "attention_probs_dropout_prob" and hasattr(config, k)}
    if config.model_type in LION_TYPES:
        options["format"] = model.format
    with user_errors(f"cannot load {model.model_name_or_path!r}", OSError, ValueError, StrictDataclassError):
        return auto_class.from_pretrained(
            model.model_name_or_path, ignore_mismatched_sizes="id2label" in fixed, **options
        )


def known_config(
    auto_class, model_type: str, model: ModelArguments, defaults: dict[str, Any], fixed: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """The configuration that the arguments name, see `build_model`: of an existing model as it is stored, of a new one
    with `fixed`. Called before data is read, it shows what is wrong with the arguments.

    Raises:
        UserError: for options that do not fit together, and a checkpoint that does not fit the script.
    """
    overrides = model.overrides()
    if model.warm_start and (model.preset or model.model_type):
        first = "preset" if model.preset else "model_type"
        raise UserError(f"--warm_start says what size and kind the model is; it cannot be combined with --{first}")
    if model.model_name_or_path:
        others = {"warm_start": model.warm_start, "preset": model.preset, "model_type": model.model_type} | overrides
        first = next((name for name, value in others.items() if value is not None), None)
        if first:
            raise UserError(f"--model_name_or_path says what the model is; it cannot be combined with --{first}")
        config = existing_config(model.model_name_or_path, auto_class)
        if config.model_type not in LION_TYPES and model.format != "auto":
            raise UserError(
                f"--format is an option of LION; {model.model_name_or_path!r} is a {config.model_type!r} model"
            )
        return config
    if model.warm_start:
        config, source = existing_config(model.warm_start, auto_class), BASELINES[model_type][0]
        if config.model_type != source:
            raise UserError(
                f"--warm_start takes a {source!r} model, but {model.warm_start!r} is a {config.model_type!r} model; a LION "
                "goes on with --model_name_or_path"
            )
        derive = config_from_bert if source == "bert" else config_from_vit
        with user_errors(f"cannot start from {model.warm_start!r}", ValueError):
            derive(config, format=model.format, **overrides)
        return config
    allowed = (model_type, *BASELINES[model_type])
    model_type = model.model_type or model_type
    if model_type not in allowed:
        raise UserError(f"--model_type is {model_type!r}; allowed are {', '.join(allowed)}")
    is_lion = model_type in LION_TYPES
    if not is_lion:
        foreign = next((name for name in LION_OPTIONS if name in overrides), "preset" if model.preset else None)
        if foreign or model.format != "auto":
            raise UserError(f"--{foreign or 'format'} is an option of LION; a {model_type!r} model has none")
        defaults = {name: value for name, value in defaults.items() if name not in LION_OPTIONS}
        known = CONFIG_MAPPING[model_type].__dataclass_fields__
        foreign = next((name for name in overrides if name not in known), None)
        if foreign:
            raise UserError(f"--{foreign} is no option of a {model_type!r} model")
        if "hidden_dropout_prob" in overrides:  # LION's own default for attention is 0, others' is not
            overrides["attention_probs_dropout_prob"] = overrides["hidden_dropout_prob"]
    presets = [name for name, sizes in PRESETS.items() if ("patch_size" in sizes) == (model_type == "lion_vision")]
    if not model.preset:
        overrides = {**defaults, **overrides}
    elif model.preset.lower() not in presets:
        raise UserError(f"--preset is {model.preset!r}; allowed are {', '.join(presets)}")
    if "hidden_size" in overrides:
        overrides.setdefault("intermediate_size", 4 * overrides["hidden_size"])
    options = (PRESETS[model.preset.lower()] if model.preset else {}) | overrides | (fixed or {})
    with user_errors("wrong model options", ValueError, StrictDataclassError):
        config = AutoConfig.for_model(model_type, **options, **({"format": model.format} if is_lion else {}))
        config.architectures = config.architectures or []  # `from_config` walks through it where a kind has two classes
    return config


def _warm_started(auto_class, model_type: str, model: ModelArguments, fixed: dict[str, Any]) -> PreTrainedModel:
    """A LION with the weights of `--warm_start`, in float32, in which it is trained."""
    start, config_class = {"lion": (from_bert, LionConfig), "lion_vision": (from_vit, LionVisionConfig)}[model_type]
    options = model.overrides() | {k: v for k, v in fixed.items() if k in LABEL_OPTIONS} | {"format": model.format}
    with user_errors(f"cannot start from {model.warm_start!r}", OSError, ValueError, StrictDataclassError):
        return start(model.warm_start, model_class=auto_class._model_mapping[config_class], **options).float()


# --------------------------------------------------------------------------------------------------------- trainer


class LionTrainer(Trainer):
    """Trainer with LION's optimizer groups, schedules with a floor, and batches that do not depend on the number of
    processes (see `EpochBatchSampler`).

    Args:
        repeats: readings of every training row side by side (repeated augmentation).
        kwargs: as for `Trainer`. A data collator with the attribute `uses_keys = True` finds each training row's `Key`
            as "key" and draws all its random numbers from it.
        hidden_teacher: see `HiddenStateTeacher`.
    """

    def __init__(self, *args, repeats: int = 1, hidden_teacher: HiddenStateTeacher | None = None, **kwargs):
        smoothing = kwargs["args"].label_smoothing_factor
        kwargs.setdefault("compute_loss_func", partial(summed_loss, label_smoothing=smoothing))
        super().__init__(*args, **kwargs)
        self.repeats = repeats
        self.hidden_teacher = hidden_teacher
        self._last_log, self._evaluation_time = None, 0.0

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All parameters with `decay_all`; else no biases, norms, decays, class token, position table, 1-D ones."""
        sizes = {name: parameter.dim() for name, parameter in model.named_parameters(remove_duplicate=False)}
        if self.args.decay_all:
            return list(sizes)
        spared = ("decay_logit", "decay_proj", "cls_token", "position_embeddings")
        names = super().get_decay_parameter_names(model)
        return [name for name in names if sizes[name] > 1 and not any(word in name for word in spared)]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        args = self.args
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

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """As in Trainer, and the distance to the teacher's hidden states in training."""
        if self.hidden_teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = {**inputs, "output_hidden_states": True}
        loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        taught = self.hidden_teacher.loss(outputs.hidden_states, inputs, num_items_in_batch)
        loss = loss + self.summed_over_devices(taught, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def summed_over_devices(self, loss: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """A loss that was divided by the labels of all processes, whose gradients are then averaged over them."""
        averaged = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return loss * self.accelerator.num_processes if averaged else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the throughput of training since the last logged loss."""
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
            raise UserError(f"--metric_for_best_model is {best!r}; evaluation gives {', '.join(metrics)}")
        return metrics

    def evaluation_loop(self, *args, **kwargs):
        """As in Transformers, but training goes on with the random numbers that it would have had without it: a run that
        resumes from a checkpoint of the same step makes no such evaluation."""
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # the loader draws a seed
            output = super().evaluation_loop(*args, **kwargs)
        self._evaluation_time += time.perf_counter() - start
        return output

    def is_finished(self, checkpoint: str) -> bool:
        """Whether the checkpoint is the end of training."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state.global_step >= steps

    def restore(self, checkpoint: str) -> None:
        """Takes weights and history from a checkpoint, to evaluate them."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        self._load_from_checkpoint(checkpoint)


def summed_loss(outputs, labels: torch.Tensor, num_items_in_batch=None, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy, or squared error for fractional labels, summed and divided by the number of labels in an optimizer
    step, whatever the model's own loss is: some return a mean over each batch, which would count once per accumulated
    batch and process. Labels of -100 (a filler's) do not count.

    Args:
        outputs: with "logits" (batch, ..., classes), or (batch, 1) for squared error.
        labels: (batch, ...).
        num_items_in_batch: labels in the optimizer step; those of this batch by default.
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


def learning_rate_share(step: int, *, kind: str, warmup: int, total: int, floor: float, start: float) -> float:
    """Learning rate as a share of its peak: from `start` up in `warmup` steps, then linearly or by a cosine to
    `floor` at step `total`."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    rest = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (1 - floor) * rest


# ----------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_to_resume(training: LionTrainingArguments) -> str | None:
    """The checkpoint folder to go on from, if any (see `resume_from_checkpoint`): the last complete one."""
    wanted = training.resume_from_checkpoint
    if not training.do_train or str(wanted).lower() in ("no", "false"):
        return None
    if wanted is not None and wanted.lower() != "true":
        problem = incompleteness(Path(wanted))
        if problem:
            raise UserError(f"--resume_from_checkpoint {wanted!r} is not a complete checkpoint: {problem}")
        return wanted
    folders = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in Path(training.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdigit()
    }
    for _, folder in sorted(folders.items(), reverse=True):
        problem = incompleteness(folder)
        if problem is None:
            return str(folder)
        logger.warning(f"{folder} is incomplete and skipped: {problem}")
    return None


def incompleteness(folder: Path) -> str | None:
    """What a checkpoint folder lacks, such as one whose writing was cut off; None if it is complete."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # written last
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({type(error).__name__})"
    for file in folder.glob("*.safetensors"):
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
    """Raises a `UserError` if the checkpoint holds a model of another shape."""
    stored, new = existing_config(checkpoint, auto_class).to_dict(), config.to_dict()
    ignored = {"format", "chunk_size", "transformers_version", "dtype", "architectures", "_name_or_path"}
    for name, value in new.items():
        if name not in ignored and stored.get(name) != value:
            raise UserError(
                f"{checkpoint!r} holds another model: {name} is {stored.get(name)!r} there and {value!r} here; choose "
                "another --output_dir, or --resume_from_checkpoint no to start anew"
            )


def check_disk(training: TrainingArguments, model: PreTrainedModel, copies: int = 1) -> None:
    """Raises a `UserError` if the final model, and checkpoints with AdamW's two states, cannot fit on the disk; `copies`
    of the weights are saved each time."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = 0 if training.save_strategy == "no" else (training.save_total_limit or 1) + 1
    require_disk(training.output_dir, copies * weights + (2 + copies) * weights * kept)
