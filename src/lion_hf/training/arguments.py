"""Command-line arguments of the training scripts: model, data and training."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available, is_torch_optimi_available, logging

from ..nn.names import BLOCK_OPTIONS, DECAY_INITS, FEATURE_MAPS, OUTPUT_GATES, OUTPUT_NORMS
from ..nn.variants import VARIANTS


logger = logging.get_logger(__name__)

# Model arguments that are not options of a configuration, or are passed separately.
_NO_OPTIONS = ("model_name_or_path", "model_type", "preset", "format")
_NO_OPTIONS += ("warm_start", "warm_start_layers", "warm_start_distillation")
# Options that change no parameter, so that existing models accept them too.
LIVE_OPTIONS = ("classifier_pooling", "sparse_prediction")


@dataclass
class ModelArguments:
    """The model: new by preset or by flags, new with the weights of another encoder, or an existing checkpoint."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a trained model to continue from."}
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": "Type of a new model. Default: LION. Baselines: bert, modernbert (text), vit, deit (images)."
        },
    )
    warm_start: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or folder of an encoder whose weights initialise a new LION: BERT, RoBERTa, DistilBERT, "
            "ModernBERT, ViT, DINOv2, ..."
        },
    )
    warm_start_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers of --warm_start, counted from 0, that become LION, or all, or none. Default: all of BERT "
            "and ViT, those with global attention of ModernBERT, 0, 2, 4 ... of others."
        },
    )
    warm_start_distillation: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss term that keeps hidden states close to those of the --warm_start model."},
    )
    preset: str | None = field(
        default=None, metadata={"help": "Named model, such as lion-s-base (the paper's) or lion-s-modern-base."}
    )
    mask_type: str | None = field(
        default=None,
        metadata={
            "help": f"Variant: {', '.join(f'{name} ({cls.label})' for name, cls in VARIANTS.items())}, or a "
            "custom one (python -m lion_hf --import MODULE SCRIPT)."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the model (size of the hidden states)."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of layers."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of heads; each has its own decay."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the MLP. Default: 4 * hidden_size."}
    )
    hidden_dropout_prob: float | None = field(default=None, metadata={"help": "Dropout probability."})
    initializer_range: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of the initial weights."},
    )
    pos_emb: bool | None = field(default=None, metadata={"help": "Add learned position embeddings."})
    softmax_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers, counted from 0, that use softmax attention (a hybrid)."}
    )
    local_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers, counted from 0, that use softmax attention to near tokens only."}
    )
    local_window: int | None = field(
        default=None, metadata={"help": "Width of the window of --local_layers: half on either side. Default: 128."}
    )
    rope_theta: float | None = field(
        default=None, metadata={"help": "Rotary positions with this base in softmax and local layers. Default: none."}
    )
    linear_rope_theta: float | None = field(
        default=None,
        metadata={
            "help": "Rotary positions with this base in LION's own layers; 0 for none, as in the paper. Default: 10000 "
            "for new text models of --mask_type lit, decay and selective without --preset, otherwise none."
        },
    )
    norm_position: str | None = field(
        default=None, metadata={"help": "Norm after (post) or before (pre) attention and MLP."}
    )
    norm_type: str | None = field(
        default=None, metadata={"help": f"Norms: {', '.join(BLOCK_OPTIONS['norm_type'])} (RMSNorm)."}
    )
    final_norm: bool | None = field(
        default=None, metadata={"help": "Norm after the last layer. Default: with --norm_position pre."}
    )
    embedding_norm: bool | None = field(
        default=None, metadata={"help": "Norm of the embeddings. Default: on for text, off for images."}
    )
    first_norm: bool | None = field(
        default=None, metadata={"help": "Norm before the first attention, with --norm_position pre. Default: on."}
    )
    use_bias: bool | None = field(
        default=None, metadata={"help": "Biases in projections, MLPs and norms of the encoder. Default: on."}
    )
    mlp_type: str | None = field(default=None, metadata={"help": "Type of the MLP: mlp, or glu (gated)."})
    decay_init: str | None = field(
        default=None,
        metadata={
            "help": f"Decays of a new model: {', '.join(DECAY_INITS)} (spread from --decay_windows). Default: the "
            "paper's."
        },
    )
    decay_windows: list[int] | None = field(
        default=None, metadata={"help": "Smallest and largest window, in tokens, of --decay_init windows."}
    )
    feature_map: str | None = field(
        default=None, metadata={"help": f"Function applied to queries and keys: {', '.join(FEATURE_MAPS)}."}
    )
    normalize: bool | None = field(
        default=None, metadata={"help": "Divide the outputs of linear attention by their row sums."}
    )
    short_conv: int | None = field(
        default=None,
        metadata={"help": "Width of a convolution over queries, keys and values; 0 for none. Default: the variant's."},
    )
    token_shift: bool | None = field(
        default=None, metadata={"help": "Projections also read the neighbours of a token. Default: the variant's."}
    )
    output_gate: str | None = field(
        default=None,
        metadata={"help": f"Gate of the mixed outputs: {', '.join(OUTPUT_GATES)}. Default: the variant's."},
    )
    output_norm: str | None = field(
        default=None,
        metadata={"help": f"Norm of the mixed outputs: {', '.join(OUTPUT_NORMS)}. Default: the variant's."},
    )
    key_heads: int | None = field(
        default=None, metadata={"help": "Number of heads of queries and keys. Default: the variant's, or all heads."}
    )
    key_dim: int | None = field(
        default=None, metadata={"help": "Width of each head of queries and keys. Default: that of the values."}
    )
    format: str | None = field(
        default=None,
        metadata={
            "help": "How LION is computed: auto, attention, rnn or chunk. Default: as stored; auto for new models."
        },
    )

    def __post_init__(self):
        counts = {name for name, value in dataclasses.asdict(self).items() if type(value) is int}
        or_none = {"short_conv", "linear_rope_theta"}  # 0 for none
        require_at_least(self, 1, *(counts - or_none))
        require_at_least(self, 0, *or_none)
        if not 0 <= self.warm_start_distillation < math.inf:
            raise ValueError(
                f"--warm_start_distillation is {self.warm_start_distillation}; it must be finite and at least 0"
            )
        if self.warm_start_layers and not self.warm_start:
            raise ValueError("--warm_start_layers requires --warm_start, the model whose layers become LION")
        _ = self.layers_to_become_lion  # raises for a wrong value
        if self.warm_start_distillation and not self.warm_start:
            raise ValueError(
                "--warm_start_distillation requires --warm_start, the model whose hidden states are the target"
            )

    @property
    def source(self) -> str | None:
        """Existing model that provides the weights and the tokenizer or image processor."""
        return self.model_name_or_path or self.warm_start

    @property
    def layers_to_become_lion(self) -> str | list[int] | None:
        """Value of `--warm_start_layers`: "all", the numbers of the layers, or None for the default of the source."""
        if self.warm_start_layers is None or self.warm_start_layers == ["all"]:
            return self.warm_start_layers and "all"
        if self.warm_start_layers == ["none"]:
            return []
        try:
            return [int(number) for number in " ".join(map(str, self.warm_start_layers)).replace(",", " ").split()]
        except ValueError:
            given = " ".join(self.warm_start_layers)
            raise ValueError(
                f"--warm_start_layers is {given!r}; it must be all, none, or numbers of layers such as 0 2 4"
            ) from None

    def describes_a_model(self) -> bool:
        """Return whether any argument chooses a model or its parameters."""
        chosen = (self.source, self.model_type, self.preset, *(set(self.overrides()) - set(LIVE_OPTIONS)))
        return any(chosen)

    def overrides(self) -> dict[str, Any]:
        """Return the configuration options that were given, by name."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k not in _NO_OPTIONS}
        if "linear_rope_theta" in given:
            given["linear_rope_theta"] = given["linear_rope_theta"] or None
        return given


@dataclass
class TextModelArguments(ModelArguments):
    """The model of a text script."""

    layer_norm_after: bool | None = field(
        default=None,
        metadata={"help": "LayerNorm over all heads after mixing. Default: on for LION-LIT and warm starts."},
    )
    classifier_pooling: str | None = field(
        default=None,
        metadata={
            "help": "What a classifier reads: first (first token) or mean (of all). Existing models accept it too."
        },
    )


@dataclass
class DataArguments:
    """The data: a Hub data set, or files. With neither, a built-in data set that requires no network."""

    _argument_group_name = "data"

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Training file (txt, csv, tsv, json, jsonl, parquet), or a pattern such as 'shards/*.csv'."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation file. Default: rows held out of the training data."}
    )
    validation_share: float = field(
        default=0.05, metadata={"help": "Share of the training rows to hold out if no validation data is given."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use at most this many training rows. Default: all."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use at most this many validation rows. Default: all."}
    )

    def __post_init__(self):
        require_at_least(self, 1, "max_train_samples", "max_eval_samples")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"--validation_share is {self.validation_share}; it must be a share of the rows between 0 and 1"
            )

    def name(self, builtin: str) -> str:
        """Return the name of the data for titles: its Hub name or path, or `builtin`."""
        places = ("dataset_name", "train_dir", "train_file", "data_dir", "validation_dir", "validation_file")
        return next((value for place in places if (value := getattr(self, place, None))), builtin)


@dataclass
class LionTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the paper's recipes where these suit small runs."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for everything that the run writes. Required."}
    )
    do_train: bool = field(
        default=True,
        metadata={
            "help": "Train. With false, only evaluate --model_name_or_path, or predict --test_file or --test_dir."
        },
    )
    do_eval: bool = field(
        default=True, metadata={"help": "Evaluate at the end, and during training as set by --eval_strategy."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder to resume from, or 'no' to start from scratch. "
            "Default: the last complete checkpoint in --output_dir, if any."
        },
    )
    eval_strategy: Literal["no", "steps", "epoch"] = field(
        default="epoch", metadata={"help": "When to evaluate during training."}
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = field(
        default="epoch", metadata={"help": "When to save a checkpoint."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints to keep."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two logged losses."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch size per device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size per device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Warm-up steps; a value below 1 is a share of all steps."}
    )
    lr_floor: float = field(
        default=0.0,
        metadata={"help": "Final learning rate of the linear and cosine schedules, as a share of the peak."},
    )
    lr_warmup_start: float = field(
        default=0.0, metadata={"help": "Learning rate at the start of the warm-up, as a share of the peak."}
    )
    decay_steps: float = field(
        default=0,
        metadata={
            "help": "Last steps of --lr_scheduler_type warmup_stable_decay, in which the rate falls; a value below 1 "
            "is a share of all steps."
        },
    )
    decay_all: bool = field(
        default=False,
        metadata={"help": "Apply weight decay to every parameter (the authors' text recipe), not only to matrices."},
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(),
        metadata={"help": "Pin the memory of batches; useful with an accelerator only."},
    )
    seed: int = field(
        default=17, metadata={"help": "Seed of the weights, data order, token masking and held-out rows."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave at false: the scripts select the columns themselves."}
    )

    def __post_init__(self):
        if self.bf16 and (self.use_cpu or not is_torch_bf16_gpu_available()):
            logger.warning_once(
                "--bf16 is ignored without an accelerator that supports bfloat16; training runs in float32"
            )
            self.bf16 = False
        if not (self.do_eval and self.do_train):
            self.eval_strategy = "no"
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        require_at_least(self, 1, *sizes)
        require_at_least(self, 0, "learning_rate", "num_train_epochs", "weight_decay", "warmup_steps", "seed")
        require_at_least(self, 0, "decay_steps")
        super().__post_init__()
        if self.optim == OptimizerNames.STABLE_ADAMW and not is_torch_optimi_available():
            raise ValueError(
                "--optim stable_adamw requires the package torch-optimi, which is not installed: pip install "
                "torch-optimi. --optim adamw_torch requires nothing and is close to it if gradients stay small "
                "(--max_grad_norm 1)"
            )
        get_reporting_integration_callbacks(self.report_to)  # ValueError for an unknown name
        if self.decay_steps and self.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
            raise ValueError(
                f"--decay_steps requires --lr_scheduler_type warmup_stable_decay, not {self.lr_scheduler_type.value!r}"
            )
        for name in ("lr_floor", "lr_warmup_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}; it must be a share of the learning rate from 0 to 1"
                )
            if getattr(self, name) and self.lr_scheduler_type not in ("linear", "cosine"):
                raise ValueError(
                    f"--{name} requires --lr_scheduler_type linear or cosine, not {self.lr_scheduler_type.value!r}"
                )


def require_at_least(arguments: Any, least: int, *names: str) -> None:
    """Raise ValueError if a given argument is smaller than `least` or not finite."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not least <= value < math.inf:
            finite = "" if math.isfinite(value) else " and finite"
            raise ValueError(f"--{name} is {value}; it must be at least {least}{finite}")
