"""LION: linear attention with decay for bidirectional encoders, on Transformers' classes."""

import contextlib

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

from .convert.names import convert_text_state_dict, convert_vision_state_dict
from .models.configuration_lion import PAPER_PRESETS, PRESETS, LionConfig, LionVisionConfig
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
from .ops.api import bidirectional_linear_attention
from .push import push
from .save_with_code import save_with_code


__version__ = "0.1.0"

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

# Without Pillow, or on Transformers 5.10 without torchvision, there is no image processor to register: images must then
# be prepared by hand, which is no error.
with contextlib.suppress(ImportError):
    from transformers import ViTImageProcessorPil

    AutoImageProcessor.register(LionVisionConfig, image_processor_classes={"pil": ViTImageProcessorPil}, exist_ok=True)

__all__ = [
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
