"""Conversions of other encoders: with every layer kept, the result computes what its source computes."""

import pytest
import torch
import transformers

import lion_hf
from lion_hf.convert import from_encoder
from lion_hf.convert.encoder import FAMILIES


SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
TEXT = {**SHAPE, "vocab_size": 31, "max_position_embeddings": 40, "pad_token_id": 2, "hidden_act": "gelu"}
IMAGE = {**SHAPE, "image_size": 12, "patch_size": 4, "num_labels": 5}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
HEADS += ("ForMultipleChoice",)
# Layers with global, local, local and global attention.
MODERN = {
    **{name: value for name, value in TEXT.items() if name != "hidden_act"},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
    "local_attention": 5,
    "num_hidden_layers": 4,
}
MODERN_BIASES = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
DISTIL = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 20, "vocab_size": 31, "max_position_embeddings": 40}

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
    assert len(ours.hidden_states) == 3


# ------------------------------------------------------------------------------------------------- positions, images


@pytest.mark.parametrize("pad", [0, 2])
def test_positions_of_roberta_are_those_of_tokens_other_than_padding_even_where_padding_is_read(pad):
    """Without a mask, padding is read. RoBERTa gives it a row of the position table of its own."""
    source = source_of("RobertaForMaskedLM", {**TEXT, "pad_token_id": pad})
    model = from_encoder(source, layers=[])
    ids = torch.randint(3, 31, (3, 12))
    ids[0, :4] = ids[1, 9:] = ids[2, 5] = pad
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-9, atol=1e-9)
    assert (model.config.roberta_positions, model.config.pad_token_id) == (True, pad)
    packed = torch.cat([ids[1:2, :9], ids[2:, 6:]], 1)
    counted = torch.cat([torch.arange(9), torch.arange(6)])[None]  # as DataCollatorWithFlattening counts
    expected = torch.cat([source(packed[:, :9]).logits, source(packed[:, 9:]).logits], 1)
    torch.testing.assert_close(model(packed, position_ids=counted).logits, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=f"max_position_embeddings - pad_token_id - 1 = {39 - pad} positions"):
        model(torch.randint(3, 31, (1, 40 - pad)))


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model"])
def test_another_image_size_resizes_the_position_table_as_the_source_does(name):
    source = source_of(name, IMAGE)
    pixels = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    options = {} if name == "Dinov2Model" else {"interpolate_pos_encoding": True}
    expected = source(pixels, **options).last_hidden_state
    resized = from_encoder(source, layers=[], image_size=20)
    assert resized.config.image_size == 20
    for model, flags in ((resized, {}), (from_encoder(source, layers=[]), {"interpolate_pos_encoding": True})):
        found = model(pixels, **flags).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # DINOv2 interpolates in float32


# ------------------------------------------------------------------------------------------------- layers and options


@pytest.mark.parametrize(
    "name, layers, softmax, local",
    [
        ("RobertaModel", None, [1], []),
        ("RobertaModel", "all", [], []),
        ("RobertaModel", [1], [0], []),
        ("ModernBertModel", None, [], [1, 2]),
        ("ModernBertModel", "all", [], []),
        ("ModernBertModel", range(1, 3), [0, 3], []),
        ("ModernBertModel", [], [0, 3], [1, 2]),
        ("ViTModel", None, [1], []),
    ],
    ids=str,
)
def test_layers_become_lion_and_the_others_keep_their_attention(name, layers, softmax, local):
    options = {"ModernBertModel": MODERN, "ViTModel": IMAGE}.get(name, TEXT)
    source = source_of(name, options, torch.float32)
    model = from_encoder(source, "decay", layers=layers, windows=(3, 24))
    assert (model.config.softmax_layers, model.config.local_layers) == (softmax, local)
    kinds = ["Softmax" if i in softmax else "Local" if i in local else "Lion" for i in range(len(model.layers))]
    assert [type(layer.mixer).__name__ for layer in model.layers] == [f"{kind}Mixer" for kind in kinds]
    for layer, kind in zip(model.layers, kinds, strict=True):
        if kind == "Lion":  # lambda = (W - 1) / (W + 1)
            decay = layer.mixer.decay_logit.detach().sigmoid()
            windows = (1 + decay) / (1 - decay)
            torch.testing.assert_close(windows, torch.tensor([3, 72**0.5, 24]), rtol=1e-4, atol=0)
    inputs = torch.randn(2, 3, 12, 12) if name == "ViTModel" else torch.randint(3, 31, (2, 9))
    assert model(inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("biases", [{}, MODERN_BIASES], ids=["no biases", "biases"])
def test_layers_that_become_lion_start_close_to_softmax(biases):
    """Without biases there is no expansion of softmax, so sums of positive scores are normalised instead."""
    source = source_of("ModernBertModel", {**MODERN, **biases})
    model = from_encoder(source, layers="all")
    assert model.config.normalize is (not biases) and model.config.layer_norm_after is bool(biases)
    assert from_encoder(source, layers="all", normalize=False).config.normalize is False
    assert from_encoder(source, feature_map="identity", normalize=False).config.feature_map == "identity"


def test_a_converted_model_is_saved_and_loaded(tmp_path):
    source = source_of("ModernBertForTokenClassification", {**MODERN, "num_labels": 4}, torch.float32)
    model = from_encoder(source, layers=[0])
    model.save_pretrained(tmp_path)
    loaded = lion_hf.LionForTokenClassification.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 31, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.rope_parameters["full_attention"]["rope_theta"] == 160000


def test_half_precision_is_rounded_once():
    source = source_of("Dinov2Model", IMAGE, torch.float32)
    exact = from_encoder(source, layers=[]).layers[0].mlp.down_proj.weight
    scale, weight = source.encoder.layer[0].layer_scale2.lambda1, source.encoder.layer[0].mlp.fc2.weight
    torch.testing.assert_close(exact, scale[:, None] * weight)
    half = from_encoder(source.bfloat16(), layers=[]).layers[0].mlp.down_proj.weight
    expected = (scale.bfloat16().double()[:, None] * weight.bfloat16().double()).bfloat16()
    assert half.dtype == torch.bfloat16 and torch.equal(half, expected)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name, options, given, message",
    [
        ("MPNetModel", TEXT, {}, "'MPNetModel' is a 'mpnet' model, which cannot be converted: MPNet adds a bias"),
        ("AlbertModel", {**TEXT, "embedding_size": 8}, {}, "ALBERT embeds tokens in a smaller space"),
        ("DebertaV2Model", TEXT, {}, "DeBERTa's attention has terms of content to position"),
        ("LongformerModel", {**TEXT, "attention_window": 4}, {}, "Longformer has another pattern of attention"),
        ("DeiTModel", IMAGE, {}, "DeiT has a distillation token"),
        ("Dinov2WithRegistersModel", IMAGE, {}, "register tokens"),
        ("SiglipVisionModel", IMAGE, {}, "SigLIP has no class token"),
        ("GPT2Model", {"n_embd": 24, "n_layer": 1, "n_head": 3}, {}, "'gpt2' model; supported are bert, roberta"),
        ("ElectraModel", {**TEXT, "embedding_size": 8}, {}, "embedding_size=8 and hidden_size=24: it projects"),
        ("ElectraForPreTraining", {**TEXT, "embedding_size": 24}, {}, "no counterpart in LION"),
        ("ErnieModel", {**TEXT, "use_task_id": True}, {}, "use_task_id=True"),
        ("RobertaForMaskedLM", {**TEXT, "hidden_act": "relu"}, {}, "hidden_act='relu', but its masked language"),
        ("RobertaModel", {**TEXT, "is_decoder": True}, {}, "is_decoder=True"),
        ("ModernBertForMaskedLM", {**MODERN, "classifier_activation": "silu"}, {}, "classifier_activation='silu'"),
        ("RobertaModel", TEXT, {"layers": [2]}, r"layers is \[2\]; it must be 'all', or a list .* from 0 to 1"),
        ("RobertaModel", TEXT, {"layers": "some"}, "layers is 'some'"),
        ("RobertaModel", TEXT, {"softmax_layers": [0]}, "softmax_layers=.0. cannot be chosen"),
        ("RobertaModel", TEXT, {"pad_token_id": 0}, "pad_token_id=0 cannot be chosen: the copied weights determine"),
        ("RobertaModel", TEXT, {"norm_position": "pre"}, "norm_position='pre' cannot be chosen"),
        ("RobertaModel", TEXT, {"image_size": 8}, "image_size is 8, but the source is a text model"),
        ("ModernBertModel", MODERN, {"pos_emb": True}, "ModernBERT has no position table"),
        ("ModernBertModel", MODERN, {"local_window": 4}, "local_window=4 cannot be chosen"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(name, options, given, message):
    with pytest.raises(ValueError, match=message) as error:
        from_encoder(source_of(name, options, torch.float32), **given)
    assert "\n" not in str(error.value)


def test_a_weight_that_is_stored_under_another_name_is_an_error(monkeypatch):
    source = source_of("RobertaForMaskedLM", TEXT)
    known = source.state_dict()
    renamed = {name.replace("layer.1.intermediate", "layer.1.wide"): x for name, x in known.items()}
    monkeypatch.setattr(source, "state_dict", lambda: renamed)
    with pytest.raises(
        ValueError, match=r"has no weight for lion.layers.1.mlp.up_proj.weight .* may name it otherwise"
    ):
        from_encoder(source)


def test_code_from_the_hub_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}')
    with pytest.raises(ValueError, match="GTE's encoder is code from the Hub, which is not run here"):
        from_encoder(tmp_path)


def test_every_kind_is_compared_with_its_source():
    """So that a family cannot be added without a comparison."""
    compared = {f"{prefix}{head}" for prefix, _, heads in TEXTS + IMAGES for head in heads}
    for model_type, family in FAMILIES.items():
        assert compared & family.classes.keys(), model_type
    tables = {id(family.heads): set() for family in FAMILIES.values()}
    for family in FAMILIES.values():
        tables[id(family.heads)] |= {family.classes[name] for name in compared & family.classes.keys()}
    for family in FAMILIES.values():  # every head of every table of names
        assert family.heads.keys() & set(family.classes.values()) <= tables[id(family.heads)], family.label
