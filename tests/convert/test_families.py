"""Conversions of other encoders: with every layer kept, the result computes what its source computes."""

import pytest
import torch
import transformers

from lion_hf.convert import from_encoder


SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 20}
TEXT = {**SHAPE, "vocab_size": 31, "max_position_embeddings": 40, "pad_token_id": 2, "hidden_act": "gelu"}
IMAGE = {**SHAPE, "image_size": 12, "patch_size": 4, "num_labels": 5}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
HEADS += ("ForMultipleChoice",)
MODERN = {
    **{name: value for name, value in TEXT.items() if name != "hidden_act"},
    **{"bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 5},
    "num_hidden_layers": 4,
}
MODERN_BIASES = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
DISTIL = {"dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 20, "vocab_size": 31, "max_position_embeddings": 40}

# (prefix of the classes, options, heads)
TEXTS = [
    ("Bert", {**TEXT, "hidden_act": "gelu_new", "type_vocab_size": 3}, HEADS),
    ("Bert", {**TEXT, "tie_word_embeddings": False, "layer_norm_eps": 1e-2}, ("ForMaskedLM", "ForPreTraining")),
    ("Ernie", TEXT, ("ForMaskedLM", "ForSequenceClassification")),
    ("Roberta", {**TEXT, "type_vocab_size": 1}, HEADS),
    ("Roberta", {**TEXT, "hidden_act": "relu", "pad_token_id": 0}, ("Model",)),
    ("Roberta", {**TEXT, "tie_word_embeddings": False, "type_vocab_size": 1}, ("ForMaskedLM",)),
    ("XLMRoberta", TEXT, ("ForMaskedLM", "ForSequenceClassification")),
    ("Camembert", TEXT, ("ForMaskedLM", "ForSequenceClassification")),
    ("Data2VecText", TEXT, ("ForMaskedLM", "ForSequenceClassification")),
    ("RobertaPreLayerNorm", TEXT, ("Model", "ForMaskedLM", "ForSequenceClassification")),
    ("Electra", {**TEXT, "embedding_size": 24}, HEADS),
    ("DistilBert", {**DISTIL, "activation": "relu", "pad_token_id": 2}, HEADS),
    ("DistilBert", {**DISTIL, "sinusoidal_pos_embds": True, "pad_token_id": 2}, ("Model",)),
    ("ModernBert", MODERN, HEADS),
    ("ModernBert", {**MODERN, **MODERN_BIASES, "decoder_bias": False}, ("ForMaskedLM",)),
    ("ModernBert", {**MODERN, "mlp_bias": True, "classifier_pooling": "mean"}, ("ForSequenceClassification",)),
    ("NomicBert", TEXT, ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")),
]
IMAGES = [
    ("ViT", {**IMAGE, "qkv_bias": False}, ("Model", "ForImageClassification")),
    ("ViT", {**IMAGE, "image_size": [12, 8]}, ("ForImageClassification",)),
    ("ViTMSN", IMAGE, ("Model", "ForImageClassification")),
    ("Dinov2", IMAGE, ("Model", "ForImageClassification")),
    ("Dinov2", {**IMAGE, "use_swiglu_ffn": True, "mlp_ratio": 2, "qkv_bias": False}, ("Model",)),
]


def cases(table):
    for prefix, options, heads in table:
        for head in heads:
            if not hasattr(transformers, prefix + head):  # an older Transformers
                continue
            special = [f"{k}={v}" for k, v in options.items() if (TEXT | IMAGE | MODERN | DISTIL).get(k) != v]
            yield pytest.param(prefix + head, options, id="-".join([prefix + head, *special]))


def source_of(name, options, dtype=torch.float64):
    """Return a source whose weights are all random, norms and biases included."""
    kind = getattr(transformers, name)
    source = kind(kind.config_class(**options))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return source.to(dtype).eval()


@pytest.fixture(autouse=True)
def exact_rotations(monkeypatch):
    """ModernBERT and nomic-embed compute the angles of RoPE in float32, and ModernBERT rotates in float32. Here both
    are computed in the precision of the model, or nothing finer than float32 could be compared."""

    def rotary(self, x, position_ids, layer_type=None):
        rope = self.config.rope_parameters if layer_type is None else self.config.rope_parameters[layer_type]
        dim = self.config.hidden_size // self.config.num_attention_heads
        steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles = position_ids[..., None].double() * rope["rope_theta"] ** -steps
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def rotated(x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        return rotated(q, cos, sin), rotated(k, cos, sin)

    for package, prefix in (("modernbert", "ModernBert"), ("nomic_bert", "NomicBert")):
        module = getattr(transformers.models, package, None)
        module = module and getattr(module, f"modeling_{package}")
        if module:
            monkeypatch.setattr(getattr(module, f"{prefix}RotaryEmbedding"), "forward", rotary)
            monkeypatch.setattr(module, "apply_rotary_pos_emb", rotate)


def masks(length):
    """Return masks of whole rows, padding on the right, on the left, on both sides, and with holes."""
    at = torch.arange(length)
    return torch.stack([at >= 0, at < length - 4, at >= 3, (at > 1) & (at < length - 2), (at != 4) & (at != 7)]).long()


def text_inputs(name, source, embedded):
    """Return inputs of which all masked tokens are padding, and their mask."""
    mask = masks(12)
    inputs = {"attention_mask": mask}
    if embedded:
        inputs["inputs_embeds"] = torch.randn(*mask.shape, 24, dtype=torch.float64)
    else:
        inputs["input_ids"] = torch.randint(3, 31, mask.shape).masked_fill(mask == 0, 2)
    types = getattr(source.config, "type_vocab_size", 0)
    if types > 1:
        inputs["token_type_ids"] = torch.randint(0, types, mask.shape)
    if "MultipleChoice" in name:
        inputs = {k: v.unsqueeze(1).repeat(1, 2, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
    if embedded:
        inputs["inputs_embeds"].requires_grad_()
    return inputs, mask.bool()


def compared(outputs, real):
    """Return outputs by name, without those at masked tokens. Of pooled outputs, rows that begin with padding are left
    out: there sources read the first token, which is padding, but LION the first real one."""
    starts = real[:, 0]
    kept = {}
    for name, value in outputs.items():
        name = {"prediction_logits": "logits"}.get(name, name)
        states = value if isinstance(value, tuple) else (value,)
        for i, x in enumerate(states):
            if x.shape[0] == len(real):
                x = x[real] if x.shape[1:2] == real.shape[1:] else x[starts]
            kept[f"{name}[{i}]"] = x
    return kept


@pytest.mark.parametrize("name, options", cases(TEXTS))
def test_with_every_layer_kept_a_text_encoder_is_its_source(name, options):
    torch.manual_seed(0)
    source = source_of(name, options)
    model = from_encoder(source, layers=[])
    assert not any(hasattr(layer.mixer, "variant") for layer in model.base_model.layers)
    for embedded in (False, True):
        inputs, real = text_inputs(name, source, embedded)
        options = {} if embedded or "MultipleChoice" in name else {"output_hidden_states": True}
        ours, theirs = (compared(run(**inputs, **options), real) for run in (model, source))
        extra = ours.keys() ^ theirs.keys()
        assert extra <= {"pooler_output[0]", "seq_relationship_logits[0]"}, extra
        if embedded:
            for outputs in (ours, theirs):
                common = [outputs[key] for key in sorted(outputs.keys() - extra)]
                total = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in common)
                outputs["gradient"] = torch.autograd.grad(total, inputs["inputs_embeds"])[0]
        for key in ours.keys() - extra:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9, msg=lambda x, k=key: f"{k}: {x}")


@pytest.mark.parametrize("name, options", cases(IMAGES))
def test_with_every_layer_kept_an_image_encoder_is_its_source(name, options):
    torch.manual_seed(0)
    source = source_of(name, options)
    model = from_encoder(source, layers=[])
    sides = options["image_size"] if isinstance(options["image_size"], list) else [options["image_size"]] * 2
    pixels = torch.randn(2, 3, *sides, dtype=torch.float64)
    ours, theirs = (x(pixels, output_hidden_states=True) for x in (model, source))
    for key, expected in theirs.items():
        if key != "pooler_output" or "Dinov2" in name:  # ViT's pooler is left out
            torch.testing.assert_close(ours[key], expected, rtol=1e-9, atol=1e-9)
    assert len(ours.hidden_states) == 4
