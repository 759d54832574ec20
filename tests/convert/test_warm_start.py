"""Warm starts from BERT and ViT: copies are exact, and new weights are as documented."""

import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DeiTConfig,
    DeiTModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    pipeline,
)
from transformers.utils import logging as hf_logging

import lion_hf
from lion_hf.convert import from_bert, from_vit, head_windows, hidden_state_distillation_loss
from lion_hf.convert.bert import CLASSES as TEXT_CLASSES
from lion_hf.convert.warm_start import MADE_ANEW
from lion_hf.models.configuration_lion import STRUCTURAL
from lion_hf.nn.names import BLOCK_OPTIONS


SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
BERT = {**SHAPE, "vocab_size": 61, "max_position_embeddings": 40}
VIT = {**SHAPE, "image_size": 16, "patch_size": 4, "num_labels": 5}
BERT_CLASSES = [name for name in TEXT_CLASSES if name != "BertForPreTraining"]


def shaken(model, dtype=torch.float32):
    """Move every weight away from its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def bert(name="BertForMaskedLM", dtype=torch.float32, **options):
    return shaken(getattr(transformers, name)(BertConfig(**{**BERT, **options})), dtype)


def vit(kind=ViTForImageClassification, dtype=torch.float32, **options):
    return shaken(kind(ViTConfig(**{**VIT, **options})), dtype)


def text(name="BertForMaskedLM"):
    ids = torch.randint(1, 61, (3, 11))
    mask = (torch.arange(11) < torch.tensor([11, 7, 4])[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, (3, 11))}
    return {k: v.unsqueeze(1).repeat(1, 2, 1) for k, v in inputs.items()} if "MultipleChoice" in name else inputs


def assert_same_outputs(model, source, inputs, tolerance):
    ours, theirs = (x(**inputs, output_hidden_states=True) for x in (model, source))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def warnings_of(caplog):
    @contextmanager
    def listen():
        hf_logging.enable_propagation()
        with caplog.at_level(logging.WARNING):
            yield lambda: caplog.text
        hf_logging.disable_propagation()

    return listen


def test_a_quantised_source_is_refused(tmp_path):
    """8-bit weights of bitsandbytes have the same shapes, and would be copied as integers."""
    source = bert()
    source.is_quantized = True  # as Transformers marks it
    with pytest.raises(ValueError, match="'BertForMaskedLM' is quantised"):
        from_bert(source)
    vit().save_pretrained(tmp_path)
    config = ViTConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantised"):
        from_vit(tmp_path)


@pytest.mark.parametrize("around", ["compiled", "parallel", "one layer"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_wrappers_around_a_source_change_nothing(kind, around, warnings_of):
    source, start = (bert(), from_bert) if kind == "text" else (vit(), from_vit)
    expected = start(source, "decay").state_dict()
    if around == "one layer":
        layers = next(x for x in source.modules() if isinstance(x, torch.nn.ModuleList))
        layers[1] = torch.compile(layers[1])
    wrapped = {"compiled": torch.compile, "parallel": torch.nn.DataParallel, "one layer": lambda x: x}[around](source)
    with warnings_of() as told:
        found = start(wrapped, "decay").state_dict()
    assert told() == "" and all(torch.equal(found[name], x) for name, x in expected.items())


# ------------------------------------------------------------------------------------------------ what is copied


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("name", BERT_CLASSES)
def test_with_softmax_in_every_layer_the_result_is_the_source(name, dtype, tolerance):
    source = bert(name, dtype, num_labels=4) if "QuestionAnswering" not in name else bert(name, dtype)
    model = from_bert(source, softmax_layers=[0, 1])
    assert type(model) is TEXT_CLASSES[name]
    assert model.dtype == dtype and not model.training
    assert_same_outputs(model, source, text(name), tolerance)


@pytest.mark.parametrize("options", [{}, {"image_size": [16, 24], "qkv_bias": False, "patch_size": [4, 4]}], ids=str)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
def test_with_softmax_in_every_layer_the_image_model_is_the_source(kind, dtype, tolerance, options):
    source = vit(kind, dtype, **options)
    model = from_vit(source, softmax_layers=[0, 1], order="s")
    width = options.get("image_size", [16, 16])[1]
    pixels = torch.randn(2, 3, 16, width, dtype=dtype)
    torch.testing.assert_close(model(pixels)[0], source(pixels)[0], rtol=tolerance, atol=tolerance)


def test_pretraining_checkpoints_keep_their_language_model_and_say_what_is_lost(warnings_of):
    source = bert("BertForPreTraining")
    with warnings_of() as said:
        model = from_bert(source, softmax_layers=[0, 1])
    inputs = text()
    torch.testing.assert_close(model(**inputs).logits, source(**inputs).prediction_logits, rtol=1e-5, atol=1e-5)
    assert "lion.pooler.dense.weight" in said()


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_what_the_operator_does_not_touch_is_bit_equal_and_a_copy(mask_type):
    source = bert()
    before = {name: x.clone() for name, x in source.state_dict().items()}
    model = from_bert(source, mask_type)
    layer, theirs = model.lion.layers[1], source.bert.encoder.layer[1]
    assert torch.equal(layer.mixer.o_proj.weight, theirs.attention.output.dense.weight)
    assert torch.equal(layer.mlp.up_proj.weight, theirs.intermediate.dense.weight)
    assert torch.equal(layer.mlp_norm.bias, theirs.output.LayerNorm.bias)
    assert torch.equal(
        model.lion.embeddings.position_embeddings.weight, source.bert.embeddings.position_embeddings.weight
    )
    assert model.head.decoder.weight is model.lion.embeddings.word_embeddings.weight, "the decoder stays tied"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(x, before[name]) for name, x in source.state_dict().items())


def test_a_folder_is_as_good_as_the_model_and_the_tokenizer_goes_along(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lion", *(f"word{i}" for i in range(54))]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    source = bert()
    source.save_pretrained(tmp_path / "bert")
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "bert")
    model = from_bert(tmp_path / "bert", "decay", softmax_layers=[1], format="chunk")
    again = from_bert(source, "decay", softmax_layers=[1])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    model.save_pretrained(tmp_path / "lion")
    AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "lion")
    assert len(pipeline("fill-mask", str(tmp_path / "lion"))("the [MASK]", top_k=3)) == 3
    loaded = lion_hf.LionForMaskedLM.from_pretrained(tmp_path / "lion")
    assert (loaded.config.softmax_layers, loaded.config.pos_emb) == ([1], True)
    inputs = text()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("given", ["model", "path"])
def test_another_head_is_new_and_said_to_be(tmp_path, warnings_of, given):
    source = bert("BertForSequenceClassification", num_labels=2)
    source.save_pretrained(tmp_path)
    with warnings_of() as said:
        model = from_bert(
            source if given == "model" else str(tmp_path),
            model_class=lion_hf.LionForSequenceClassification,
            num_labels=7,
        )
    assert model.classifier.out_features == 7
    assert "newly initialised: ['classifier.weight', 'classifier.bias']" in said()
    assert torch.equal(model.lion.pooler.dense.weight, source.bert.pooler.dense.weight)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_head_that_the_checkpoint_lacks_is_said_to_be_new_once(tmp_path, warnings_of, num_labels):
    bert().save_pretrained(tmp_path)
    with warnings_of() as said:
        model = from_bert(
            str(tmp_path),
            model_class=lion_hf.LionForSequenceClassification,
            num_labels=num_labels,
            initializer_range=1.0,
        )
    assert model.classifier.out_features == num_labels and model.classifier.weight.std() > 0.5, "not BERT's new head"
    assert "classifier.weight" in said() and "pooler.dense.weight" in said(), "Transformers reports it"
    assert "warm_start" not in said(), "and only Transformers"


def test_a_weight_that_the_checkpoint_lacks_leaves_its_neighbours(tmp_path, warnings_of):
    source = bert()
    weights = source.state_dict()
    del weights["bert.encoder.layer.1.output.dense.bias"]
    source.save_pretrained(tmp_path, state_dict=weights)
    with warnings_of() as said:
        model = from_bert(tmp_path)
    assert "layer.1.output.dense.bias" in said() and "lion.layers" not in said()
    assert torch.equal(model.lion.layers[1].mlp.down_proj.weight, source.bert.encoder.layer[1].output.dense.weight)
    assert (model.lion.layers[1].mlp.down_proj.bias == 0).all()


@pytest.mark.parametrize(
    "options", [{"num_labels": 2}, {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}]
)
def test_names_of_classes_are_the_sources_unless_given(options):
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    source = bert("BertForSequenceClassification", **names)
    config = from_bert(source).config
    assert (config.id2label, config.label2id) == (names["id2label"], names["label2id"])
    config = from_bert(source, **options).config
    assert "bad" not in {**config.label2id, **{name: i for i, name in config.id2label.items()}}
    assert config.num_labels == 2


def test_a_head_of_another_task_is_not_taken_over():
    source = bert("BertForTokenClassification", num_labels=2)
    model = from_bert(source, model_class=lion_hf.LionForSequenceClassification)
    assert not torch.equal(model.classifier.weight, source.classifier.weight)


def test_without_positions_any_length_is_taken():
    model = from_bert(bert(), pos_emb=False)
    assert model.lion.embeddings.position_embeddings is None
    assert model(torch.randint(1, 61, (1, 90))).logits.shape == (1, 90, 61)
    assert from_vit(vit(), pos_emb=False)(torch.randn(1, 3, 24, 32)).logits.shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_is_the_sources_but_for_decays(dtype):
    for model in (from_bert(bert(dtype=dtype)), from_vit(vit(dtype=dtype), "decay", order="s")):
        for name, parameter in model.named_parameters():
            wanted = dtype if dtype == torch.float64 or "decay_" not in name else torch.float32
            assert parameter.dtype == wanted, name
    assert from_bert(bert(dtype=dtype))(**text()).logits.dtype == dtype


# -------------------------------------------------------------------------------------------------- what is new


def decays_of(mixer, hidden):
    """Return the decays of a mixer, (scans, heads, all tokens except the first)."""
    found = []
    for recurrence in mixer.recurrences(hidden):
        log_decay = recurrence.log_decay
        log_decay = log_decay[:, None].expand(-1, hidden.shape[1]) if log_decay.dim() == 1 else log_decay[0]
        found.append(log_decay[:, 1:].exp())
    return torch.stack(found)


@pytest.mark.parametrize("windows", [None, (2.5, 40), (5, 7, 90)], ids=str)
@pytest.mark.parametrize("mask_type", ["decay", "selective"])
@pytest.mark.parametrize("kind", ["text", "image", "snake"])
def test_every_head_starts_with_its_window(kind, mask_type, windows):
    start = from_bert if kind == "text" else from_vit
    order = {"order": "s"} if kind == "snake" else {}
    source = bert(dtype=torch.float64) if kind == "text" else vit(dtype=torch.float64)
    model = start(source, mask_type, windows=windows, **order)
    default = (16, 512) if kind == "text" else (3, 16)
    expected = head_windows(windows or default, 3)
    for layer in model.base_model.layers:
        decays = decays_of(layer.mixer, torch.randn(1, 9, 24, dtype=torch.float64))
        assert len(decays) == 1 + (kind == "snake")
        found = (1 + decays) / (1 - decays)  # the geometric series of both directions
        torch.testing.assert_close(found, expected[None, :, None].expand_as(found), rtol=1e-3, atol=0)


def test_windows_are_spread_geometrically():
    torch.testing.assert_close(head_windows((3, 48), 5), torch.tensor([3.0, 6, 12, 24, 48], dtype=torch.float64))
    torch.testing.assert_close(head_windows((3, 48), 2), torch.tensor([3.0, 48], dtype=torch.float64))


def test_gates_learn_from_the_first_step_on():
    model = from_bert(bert(), "selective").train()
    inputs = text()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in model.lion.layers:
        assert layer.mixer.decay_proj.weight.grad.abs().amin(1).max() > 0
        assert (layer.mixer.decay_proj.bias.grad != 0).all()


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_text_mixes_by_the_expansion_of_softmax(mask_type):
    """The matrix is exactly (1 + x / 4) M / N if queries and keys do not use the direction that is replaced."""
    source = bert(dtype=torch.float64)
    attention = source.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        for proj in (attention.query, attention.key):
            proj.weight[5::8] = proj.bias[5::8] = 0
    model = from_bert(source, mask_type, windows=(4, 20), length=30, layer_norm_after=False)
    mixer, mixed = model.lion.layers[0].mixer, []
    mixer.o_proj.register_forward_pre_hook(lambda m, x: mixed.append(x[0]))
    hidden = torch.randn(2, 30, 24, dtype=torch.float64)
    mixer(hidden)
    query, key, value = (
        p(hidden).unflatten(-1, (3, 8)).transpose(1, 2) for p in (attention.query, attention.key, attention.value)
    )
    windows = head_windows((4, 20), 3)
    decay = (windows - 1) / (windows + 1) if mask_type != "lit" else torch.ones(3, dtype=torch.float64)
    distance = (torch.arange(30)[:, None] - torch.arange(30)).abs()
    mask = decay[:, None, None] ** distance
    scores = (1 + query @ key.transpose(2, 3) / 8**0.5 / 4) * mask / mask.sum((1, 2), keepdim=True) * 30
    expected = (scores @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed[0], expected, rtol=1e-5, atol=1e-6)  # the text gate adds 1e-7


def test_of_queries_and_keys_one_direction_is_given_up_the_least_used():
    source = bert(dtype=torch.float64)
    attention = source.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        for proj in (attention.query, attention.key):
            proj.weight[5::8] *= 1e-3
            proj.bias[5::8] *= 1e-3
    mixer = from_bert(source, "lit").lion.layers[0].mixer
    hidden = torch.randn(1, 30, 24, dtype=torch.float64)
    query, key, _ = mixer.project(hidden)
    logits = query @ key.transpose(2, 3) / 8**0.5 - 1
    assert (torch.linalg.matrix_rank(logits, rtol=1e-9) == 7).all(), (
        "seven of eight directions remain, without products with the constant"
    )
    query, key = (p(hidden).unflatten(-1, (3, 8)).transpose(1, 2) for p in (attention.query, attention.key))
    torch.testing.assert_close(logits, query @ key.transpose(2, 3) / 8**0.5 / 4, rtol=0, atol=1e-2)


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_the_norm_after_mixing_starts_with_the_size_of_mixed_values(mask_type):
    source = bert(hidden_size=96, num_attention_heads=4)
    model = from_bert(source, mask_type)
    norms = [source.bert.embeddings.LayerNorm, source.bert.encoder.layer[0].output.LayerNorm]
    for layer, before, theirs in zip(model.lion.layers, norms, source.bert.encoder.layer, strict=True):
        values = theirs.attention.self.value(before(torch.randn(500, 96)))
        expected = torch.full((96,), 0.35 * values.square().mean().sqrt().item())
        torch.testing.assert_close(layer.mixer.norm.weight.detach(), expected, rtol=0.05, atol=0)
        assert (layer.mixer.norm.bias == 0).all()


# ---------------------------------------------------------------------------------------------------------- errors


# For text and images: a value that the blocks of the source do not have.
OTHER_BLOCKS = {
    "mlp_type": ("glu", "glu"),
    "normalize": (True, False),
    "feature_map": ("unit_silu", "elu"),
    "key_heads": (1, 1),
    "key_dim": (5, 5),
    "local_layers": ([0], [0]),
    "local_window": (64, 64),
    "rope_parameters": ({"rope_theta": 100.0}, {"rope_theta": 100.0}),
    "final_norm": (True, False),
    "embedding_norm": (False, True),
    "first_norm": (False, False),
    "roberta_positions": (True, None),
    "pooler_norm": (True, None),
    "token_transform": (True, None),
    "append_patch_mean": (None, True),
}


def other_value(name, config):
    """Return a value of a structural option that the blocks of the source do not have."""
    if name in BLOCK_OPTIONS:
        return next(value for value in BLOCK_OPTIONS[name] if value != getattr(config, name))
    return OTHER_BLOCKS[name][config.model_type == "lion_vision"]


@pytest.mark.parametrize(
    "start, source, name",
    [
        pytest.param(start, source, name, id=f"{source.__name__}-{name}")
        for start, source, config in (
            (from_bert, bert, lion_hf.LionConfig),
            (from_vit, vit, lion_hf.LionVisionConfig),
        )
        for name in STRUCTURAL
        if name not in MADE_ANEW and name in config.__dataclass_fields__
    ],
)
def test_blocks_that_the_source_does_not_have_are_refused(start, source, name):
    """Covers every structural option that a warm start does not set anew, including options added later."""
    other = other_value(name, start(source()).config)
    options = {name: other} | ({"feature_map": "elu"} if name == "normalize" and other else {})
    options |= {"cls_tok": True} if name == "append_patch_mean" else {}
    refusal = f"({name}|feature_map)=.* cannot be chosen: the copied weights require"
    if name == "first_norm" and source is bert:  # a contradiction in itself
        refusal = "first_norm is False with norm_position='post'"
    with pytest.raises(ValueError, match=refusal):
        start(source(), **options)
    kept = {n: v for n, v in start(source()).config.structure().items() if n not in MADE_ANEW}
    assert start(source(), **kept).config.structure() == start(source()).config.structure()


@pytest.mark.parametrize(
    "start, source, options, message",
    [
        (from_bert, vit, {}, "'ViTForImageClassification' is a 'vit' model; only 'bert' models .BertModel, "),
        (from_vit, bert, {}, "'BertForMaskedLM' is a 'bert' model; only 'vit' models"),
        (
            from_bert,
            lambda: RobertaModel(RobertaConfig(**BERT)),
            {},
            "'RobertaModel' is a 'roberta' model; only 'bert'",
        ),
        (from_vit, lambda: DeiTModel(DeiTConfig(**VIT)), {}, "'DeiTModel' is a 'deit' model; only 'vit'"),
        (
            from_bert,
            lambda: bert("BertLMHeadModel", is_decoder=True),
            {"model_class": lion_hf.LionModel},
            "is_decoder=True",
        ),
        (from_bert, lambda: bert(position_embedding_type="relative_key"), {}, "position_embedding_type='relative_key'"),
        (from_bert, lambda: bert("BertForNextSentencePrediction"), {}, "no counterpart in LION.*such as LionModel"),
        (from_vit, lambda: vit(ViTForMaskedImageModeling), {}, "no counterpart in LION.*such as LionVisionModel"),
        (from_bert, bert, {"hidden_size": 48}, r"hidden_size=48 cannot be chosen: .*determine it \(hidden_size=24\)"),
        (from_vit, vit, {"patch_size": 8}, "patch_size=8 cannot be chosen"),
        (from_vit, lambda: vit(patch_size=[4, 8]), {}, r"patch_size \[4, 8\], but LION supports square patches"),
        (
            from_bert,
            bert,
            {"model_class": lion_hf.LionVisionModel},
            "model_class is .*allowed are LionModel, LionForMaskedLM",
        ),
        (from_bert, bert, {"windows": (1, 9)}, r"windows is \(1, 9\); it must be \(smallest, largest\) or 3 numbers"),
        (from_bert, bert, {"windows": (2, 3, 4, 5)}, "windows is .*3 numbers"),
        (from_bert, bert, {"windows": (2, float("inf"))}, "windows is .*finite"),
        (from_bert, bert, {"windows": "ab"}, "windows is 'ab'; it must be .*3 numbers"),
        (from_bert, bert, {"windows": 5}, "windows is 5; it must be"),
        (from_bert, bert, {"windows": ()}, r"windows is \(\); it must be"),
        (from_vit, vit, {"windows": (2, None)}, r"windows is \(2, None\); it must be"),
        (from_vit, vit, {"windows": ((2, 3), (4, 5))}, "windows is .*3 numbers"),
        (from_bert, bert, {"length": 0}, "length is 0; it must be a whole number of tokens, at least 1"),
        (from_bert, bert, {"length": "x"}, "length is 'x'; it must be a whole number"),
        (from_bert, bert, {"softmax_layers": [2]}, r"^softmax_layers is \[2\]; .*from 0 to 1"),
        (from_vit, vit, {"softmax_layers": range(3)}, r"^softmax_layers is \[0, 1, 2\]; .*from 0 to 1"),
        (from_bert, bert, {"format": 3}, "^Field 'format' expected str, got int"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(start, source, options, message):
    with pytest.raises(ValueError, match=message) as error:
        start(source(), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start, source", [(from_bert, bert), (from_vit, vit)])
def test_layers_are_taken_as_a_range_and_windows_as_a_tensor(start, source):
    model = start(source(), softmax_layers=range(1), windows=torch.tensor([3.0, 48]))
    assert model.config.softmax_layers == [0]
    again = start(source(), softmax_layers=[0], windows=(3, 48))
    bias = [x.base_model.layers[1].mixer.decay_proj.bias for x in (model, again)]
    assert torch.equal(*bias)


def test_paths_without_a_fitting_model_are_refused(tmp_path):
    vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="vit' is a 'vit' model; only 'bert' models"):
        from_bert(tmp_path / "vit")
    bert("BertForNextSentencePrediction").save_pretrained(tmp_path / "nsp")
    with pytest.raises(ValueError, match="a BertForNextSentencePrediction has no counterpart"):
        from_bert(tmp_path / "nsp")
    with pytest.raises(OSError):
        from_bert(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------------------- distillation


def states(seed, batch=3, length=6):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, length, 8, generator=generator, dtype=torch.float64) for _ in range(4))


def test_distance_is_0_at_the_teacher_1_at_nothing_and_has_no_unit():
    teacher, student = states(0), states(1)
    assert (hidden_state_distillation_loss(teacher, teacher) == 0).all()
    nothing = hidden_state_distillation_loss([torch.zeros_like(x) for x in teacher], teacher)
    torch.testing.assert_close(nothing, torch.ones_like(nothing))
    loss = hidden_state_distillation_loss(student, teacher)
    scaled = [[x * 10**i for i, x in enumerate(y)] for y in (student, teacher)]
    torch.testing.assert_close(hidden_state_distillation_loss(*scaled), loss)


def test_padding_and_other_rows_do_not_count():
    teacher, student = states(0), states(1)
    teacher[1][1, 3] = 0  # content of padding does not matter
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    loss = hidden_state_distillation_loss(student, teacher, mask)
    cut = hidden_state_distillation_loss([x[1:2, :2] for x in student], [x[1:2, :2] for x in teacher])
    torch.testing.assert_close(loss[1:2], cut)
    assert loss[2] == 0


def test_gradients_reach_the_student_only_and_half_precision_is_summed_in_float32():
    teacher = [x.bfloat16().requires_grad_() for x in states(0)]
    student = [x.bfloat16().requires_grad_() for x in states(1)]
    loss = hidden_state_distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in student) and all(x.grad is None for x in teacher)


def test_states_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="the student has 3 hidden states .* the teacher 4"):
        hidden_state_distillation_loss(states(0)[:3], states(1))


def test_numbers_of_numpy_are_taken():
    source, results = bert(), []
    for length, layers, windows in ((16, [1], (2.0, 9.0)), (np.int64(16), np.array([1]), np.array([2.0, 9.0]))):
        torch.manual_seed(0)
        model = from_bert(source, length=length, softmax_layers=layers, windows=windows, chunk_size=type(length)(8))
        results.append(model.state_dict())
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())
