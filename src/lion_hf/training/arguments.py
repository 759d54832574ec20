"""Arguments of the training scripts: of models, data and training."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..nn.names import FEATURE_MAPS
from ..nn.variants import VARIANTS


logger = logging.get_logger(__name__)

# Model arguments that are no options of a configuration, or are passed on their own.
_NO_OPTIONS = ("model_name_or_path", "model_type", "warm_start", "warm_start_distillation", "preset", "format")


@dataclass
class ModelArguments:
    """A new model by preset or by flags, one with the weights of a BERT or ViT, or an existing one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a model to go on with."}
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Kind of a new model: LION by default; bert, modernbert or vit are the baselines."},
    )
    warm_start: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a BERT or ViT whose weights a new LION starts with."}
    )
    warm_start_distillation: float = field(
        default=0.0,
        metadata={"help": "Weight, in the loss, of the distance to the hidden states of the --warm_start model."},
    )
    preset: str | None = field(default=None, metadata={"help": "Named size of the paper, such as lion-s-base."})
    mask_type: str | None = field(
        default=None,
        metadata={
            "help": f"Variant: {', '.join(f'{name} ({cls.label})' for name, cls in VARIANTS.items())}, or your own "
            "(python -m lion_hf --import MODULE SCRIPT)."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the model."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of layers."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads; each has a decay of its own."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the MLP, 4 * hidden_size by default."}
    )
    hidden_dropout_prob: float | None = field(default=None, metadata={"help": "Dropout."})
    initializer_range: float | None = field(
        default=None,
        metadata={"help": "Deviation of the initial weights."},
    )
    pos_emb: bool | None = field(default=None, metadata={"help": "Learned positions."})
    softmax_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers, counted from 0, that keep softmax attention (a hybrid)."}
    )
    norm_position: str | None = field(default=None, metadata={"help": "Norms after (post) or before (pre) the layers."})
    mlp_type: str | None = field(default=None, metadata={"help": "mlp, or glu for gated MLPs."})
    feature_map: str | None = field(
        default=None, metadata={"help": f"Function of queries and keys: {', '.join(FEATURE_MAPS)}."}
    )
    normalize: bool | None = field(default=None, metadata={"help": "Divide LION's outputs by their row sums."})
    format: str | None = field(
        default=None,
        metadata={"help": "How LION is computed: auto, attention, rnn or chunk; as stored, auto for new models."},
    )

    def __post_init__(self):
        require_at_least(self, 1, *(name for name, value in dataclasses.asdict(self).items() if type(value) is int))
        if not 0 <= self.warm_start_distillation < math.inf:
            raise ValueError(
                f"--warm_start_distillation is {self.warm_start_distillation}; it must not be negative, and finite"
            )
        if self.warm_start_distillation and not self.warm_start:
            raise ValueError("--warm_start_distillation needs --warm_start, whose hidden states it learns")

    @property
    def source(self) -> str | None:
        """The existing model that the weights, and the tokenizer or image processor, come from."""
        return self.model_name_or_path or self.warm_start

    def overrides(self) -> dict[str, Any]:
        """The options of the configuration that were given, by name."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return {k: v for k, v in given.items() if k not in _NO_OPTIONS}


@dataclass
class TextModelArguments(ModelArguments):
    layer_norm_after: bool | None = field(
        default=None, metadata={"help": "LayerNorm over all heads after mixing; default: LION-LIT and warm starts."}
    )
    classifier_pooling: str | None = field(
        default=None,
        metadata={"help": "What a classifier reads: first (the first token) or mean (of all); of existing models too."},
    )


@dataclass
class DataArguments:
    """A data set of the Hub by name, or files; with neither, a built-in data set that needs no network."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Training file, or a pattern of files."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation file; else a part is held out."})
    validation_share: float = field(default=0.05, metadata={"help": "Part held out where no validation data is given."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many validation rows only."})

    def __post_init__(self):
        require_at_least(self, 1, "max_train_samples", "max_eval_samples")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"--validation_share is {self.validation_share}; it is a share of the rows, 0 to 1")

    def name(self, builtin: str) -> str:
        """What the data is called in titles: its name or place, or `builtin`."""
        places = ("dataset_name", "train_dir", "train_file", "data_dir", "validation_dir", "validation_file")
        return next((value for place in places if (value := getattr(self, place, None))), builtin)


@dataclass
class LionTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the paper's recipes where they suit small runs."""

    output_dir: str | None = field(default=None, metadata={"help": "Where everything is written. Required."})
    do_train: bool = field(default=True, metadata={"help": "Train (otherwise only evaluate)."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate, at the end and as --eval_strategy says."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or 'no' to start anew; "
            "by default the last complete one in output_dir, if any."
        },
    )
    eval_strategy: Literal["no", "steps", "epoch"] = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: Literal["no", "steps", "epoch", "best"] = field(
        default="epoch", metadata={"help": "When to save a checkpoint."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=20, metadata={"help": "Log the loss every so many steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch size per device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size per device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up steps, or a share of all steps if below 1."})
    lr_floor: float = field(
        default=0.0, metadata={"help": "Last learning rate of the linear and cosine schedules, as a share of the peak."}
    )
    lr_warmup_start: float = field(
        default=0.0, metadata={"help": "First learning rate of the warm-up, as a share of the peak."}
    )
    decay_all: bool = field(
        default=False,
        metadata={
            "help": "Weight decay for every parameter, as the authors' text recipe has it, not for matrices only."
        },
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin memory; of use with an accelerator."}
    )
    seed: int = field(default=17, metadata={"help": "Seed of weights, data order, masks and held-out data."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The scripts choose the columns themselves."})

    def __post_init__(self):
        if self.bf16 and (self.use_cpu or not is_torch_bf16_gpu_available()):
            logger.warning_once("bf16 is left out: there is no accelerator that computes in it, so float32 is used")
            self.bf16 = False
        if not (self.do_eval and self.do_train):
            self.eval_strategy = "no"
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        require_at_least(self, 1, *sizes)
        require_at_least(self, 0, "learning_rate", "num_train_epochs", "weight_decay", "warmup_steps", "seed")
        super().__post_init__()
        get_reporting_integration_callbacks(self.report_to)  # ValueError for a name that is none
        for name in ("lr_floor", "lr_warmup_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it is a share of the learning rate, 0 to 1")
            if getattr(self, name) and self.lr_scheduler_type not in ("linear", "cosine"):
                raise ValueError(f"--{name} needs the linear or cosine schedule, not {self.lr_scheduler_type.value!r}")


def require_at_least(arguments: Any, least: int, *names: str) -> None:
    """Raises ValueError for an argument that is given and smaller, or no finite number."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not least <= value < math.inf:
            finite = "" if math.isfinite(value) else " and finite"
            raise ValueError(f"--{name} is {value}; it must be at least {least}{finite}")
