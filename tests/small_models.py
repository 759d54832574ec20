"""Small models of every kind, shared by the tests."""

import re

import torch

import lion_hf
from lion_hf.nn import variant_class
from lion_hf.nn.variants import VARIANTS as REGISTRY


VARIANTS = ("lit", "decay", "selective")
# Every variant of the package, for tests that are cheap enough.
ALL_VARIANTS = tuple(REGISTRY)
FORMS = ("attention", "rnn", "chunk")
TEXT_HEADS = (
    lion_hf.LionModel,
    lion_hf.LionForMaskedLM,
    lion_hf.LionForSequenceClassification,
    lion_hf.LionForTokenClassification,
    lion_hf.LionForQuestionAnswering,
    lion_hf.LionForMultipleChoice,
)


def text_config(mask_type="selective", **options):
    defaults = {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "chunk_size": 4,
    }
    return lion_hf.LionConfig(mask_type=mask_type, **{**defaults, **options})


def vision_config(mask_type="selective", **options):
    defaults = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "num_labels": 5,
        "chunk_size": 4,
    }
    return lion_hf.LionVisionConfig(mask_type=mask_type, **{**defaults, **options})


def text_inputs(batch=3, length=11, vocab_size=61):
    """Return token ids and a mask: rows of different lengths, padded on the right."""
    ids = torch.randint(1, vocab_size, (batch, length))
    lengths = torch.linspace(length, max(1, length // 2), batch).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


# The linear layers of the variants' decays, input gates and token shifts.
GATES = ("decay_proj", "forget_gate", "input_gate", "dt_proj", "decay_down", "decay_up", "shift_down")


def spread_decays(model):
    """Set decays that differ between heads and between tokens, and no weights of 0, as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(gate in name for gate in GATES) and name.endswith("weight"):
                parameter.normal_(std=0.5)
    return model


def decays_of(model):
    """Return the names of the parameters that stay float32."""
    owns = variant_class(model.config.mask_type).float32_weights
    pattern = re.compile(rf"\.mixer\.({'|'.join(owns)})(_2)?(\.|$)")
    return {name for name, _ in model.named_parameters() if owns and pattern.search(name)}


def record_mixing(model, values, mixed, key_mask=None):
    """Write what each layer of an encoder mixes, and the result before its norms and gates, to two dicts."""
    for i, layer in enumerate(model.layers):

        def keep(mixer, arguments, i=i):
            values[i] = mixer.recurrences(arguments[0], key_mask)[0].value

        def normed(y, gate, i=i, after=layer.mixer._normed):
            mixed[i] = y
            return after(y, gate)

        layer.mixer.register_forward_pre_hook(keep)
        layer.mixer._normed = normed
