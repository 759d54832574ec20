"""LION: linear attention with decay for bidirectional encoders.

`lion_hf.ops` (operators) and `lion_hf.nn` (layers) need PyTorch only. The models, `lion_hf.convert`, `push` and
`save_with_code` need Transformers too. Importing this package registers LION with the Auto classes of Transformers.
"""

import contextlib
import importlib
from typing import Any

from . import _moved
from . import nn as nn
from . import ops as ops
from .ops.api import bidirectional_linear_attention


__version__ = "0.2.0"

_moved.install()

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
else:
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForMaskedImageModeling,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        BertTokenizer,
    )

    from . import convert as convert
    from .convert import convert_text_state_dict, convert_vision_state_dict
    from .hub import push, save_with_code
    from .models.configuration_lion import MODERN_PRESETS, PAPER_PRESETS, PRESETS, LionConfig, LionVisionConfig
    from .models.modeling_lion import (
        LionForMaskedLM,
        LionForMultipleChoice,
        LionForQuestionAnswering,
        LionForSequenceClassification,
        LionForTokenClassification,
        LionModel,
        LionPreTrainedModel,
    )
    from .models.modeling_lion_vision import (
        LionBackbone,
        LionForImageClassification,
        LionForMaskedImageModeling,
        LionVisionModel,
        LionVisionPreTrainedModel,
    )

    AutoConfig.register("lion", LionConfig, exist_ok=True)
    AutoConfig.register("lion_vision", LionVisionConfig, exist_ok=True)
    AutoModel.register(LionConfig, LionModel, exist_ok=True)
    AutoModel.register(LionVisionConfig, LionVisionModel, exist_ok=True)
    AutoModelForMaskedLM.register(LionConfig, LionForMaskedLM, exist_ok=True)
    AutoModelForSequenceClassification.register(LionConfig, LionForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(LionConfig, LionForTokenClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(LionConfig, LionForQuestionAnswering, exist_ok=True)
    AutoModelForMultipleChoice.register(LionConfig, LionForMultipleChoice, exist_ok=True)
    AutoModelForImageClassification.register(LionVisionConfig, LionForImageClassification, exist_ok=True)
    AutoModelForMaskedImageModeling.register(LionVisionConfig, LionForMaskedImageModeling, exist_ok=True)
    AutoBackbone.register(LionVisionConfig, LionBackbone, exist_ok=True)
    AutoTokenizer.register(LionConfig, fast_tokenizer_class=BertTokenizer, exist_ok=True)

    # Without Pillow, or on Transformers 5.10 without torchvision, there is no image processor to register. The models
    # work without one.
    with contextlib.suppress(ImportError):
        from transformers import ViTImageProcessorPil

        AutoImageProcessor.register(
            LionVisionConfig, image_processor_classes={"pil": ViTImageProcessorPil}, exist_ok=True
        )

__all__ = [
    "MODERN_PRESETS",
    "PAPER_PRESETS",
    "PRESETS",
    "LionBackbone",
    "LionConfig",
    "LionForImageClassification",
    "LionForMaskedImageModeling",
    "LionForMaskedLM",
    "LionForMultipleChoice",
    "LionForQuestionAnswering",
    "LionForSequenceClassification",
    "LionForTokenClassification",
    "LionModel",
    "LionPreTrainedModel",
    "LionVisionConfig",
    "LionVisionModel",
    "LionVisionPreTrainedModel",
    "bidirectional_linear_attention",
    "convert_text_state_dict",
    "convert_vision_state_dict",
    "push",
    "save_with_code",
]


def __getattr__(name: str) -> Any:
    if name in _moved.MOVED and name not in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    if name in (*__all__, "convert", "hub", "models"):
        raise ImportError(
            f"{__name__}.{name} needs Transformers, which is not installed (pip install transformers). Only "
            f"{__name__}.ops and {__name__}.nn work without it."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
