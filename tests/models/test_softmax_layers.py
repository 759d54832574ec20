"""Hybrid encoders, in which some layers use softmax attention."""

import pytest
import torch
from small_models import FORMS, VARIANTS, spread_decays, text_config, text_inputs, vision_config
from transformers import AutoConfig, AutoModel

import lion_hf
from lion_hf.models.lion_layers import LionMixer
from lion_hf.nn import SoftmaxMixer


CONFIGS = {"text": text_config, "image": vision_config}
HEADS = {"text": lion_hf.LionForMaskedLM, "image": lion_hf.LionForImageClassification}
PATTERNS = [[0], [1], [0, 1]]


def build(kind="text", mask_type="selective", dtype=torch.float32, **options):
    """Return a model of two layers, of which the first is softmax by default, with noise added to all weights."""
    model = HEADS[kind](CONFIGS[kind](mask_type, **{"softmax_layers": [0], **options})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return spread_decays(model).eval()


def inputs_for(kind, dtype=torch.float32):
    return text_inputs() if kind == "text" else {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}


# --------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "given, kept", [([], []), ((), []), ([1, 0], [0, 1]), ((1,), [1]), (range(2), [0, 1])], ids=str
)
def test_layers_are_a_sorted_list_in_every_spelling(tmp_path, kind, given, kept):
    config = CONFIGS[kind](softmax_layers=given)
    assert config.softmax_layers == kept
    config.softmax_layers = given
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).softmax_layers == kept
    assert AutoConfig.from_pretrained(tmp_path, softmax_layers=given).softmax_layers == kept


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "layers, message",
    [
        ([2], r"softmax_layers is \[2\]; with num_hidden_layers 2 its numbers must be from 0 to 1"),
        ([-1], r"softmax_layers is \[-1\]; .*negative"),
        ([0, 0], r"softmax_layers is \[0, 0\]; it must name each layer once"),
        ([0.5], r"softmax_layers is \[0.5\]; it must be a list of layer numbers, whole"),
        ([True], r"softmax_layers is \[True\]; it must be a list of layer numbers"),
        (1, "softmax_layers is 1; it must be a list of layer numbers"),
        ("all", "softmax_layers is 'all'; it must be a list of layer numbers"),
    ],
    ids=str,
)
def test_wrong_layers_are_refused_with_what_is_allowed(kind, layers, message):
    with pytest.raises(Exception, match=message):
        CONFIGS[kind](softmax_layers=layers)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("stored, wanted", [([0], []), ([], [1]), ([0], [0, 1])], ids=str)
def test_layers_cannot_change_at_load(tmp_path, kind, stored, wanted):
    model = build(kind, softmax_layers=stored)
    model.save_pretrained(tmp_path)
    other = CONFIGS[kind](softmax_layers=wanted)
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, type(model).from_pretrained):
        with pytest.raises(ValueError, match="softmax_layers=.* contradicts the checkpoint"):
            load(tmp_path, softmax_layers=wanted)
    with pytest.raises(ValueError, match="softmax_layers=.* contradicts the checkpoint"):
        type(model).from_pretrained(tmp_path, config=other)


# ------------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("kind, options", [("text", {"layer_norm_after": True}), ("image", {"order": "s"})])
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_softmax_layers_hold_the_four_projections_and_nothing_else(kind, mask_type, options):
    lion, softmax = (layer.mixer for layer in build(kind, mask_type, softmax_layers=[1], **options).base_model.layers)
    assert isinstance(lion, LionMixer) and isinstance(softmax, SoftmaxMixer)
    projections = {f"{x}_proj.{y}" for x in "qkvo" for y in ("weight", "bias")}
    assert {name for name, _ in softmax.named_parameters()} == projections
    assert any("decay" in name for name, _ in lion.named_parameters()) == (mask_type != "lit")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_softmax_layer_is_textbook_softmax_attention(kind):
    """Compare with softmax attention computed query by query over the visible keys."""
    mixer = SoftmaxMixer(24, 3).double()
    hidden = torch.randn(2, 7, 24, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0]]).bool()
    expected = torch.empty_like(hidden)
    for b in range(2):
        heads = []
        for h in range(3):
            rows = slice(8 * h, 8 * h + 8)
            q, k, v = (proj(hidden[b])[:, rows] for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            k, v = k[mask[b]], v[mask[b]]
            weights = [torch.exp(k @ q[i] / 8**0.5) for i in range(7)]
            heads.append(torch.stack([w @ v / w.sum() for w in weights]))
        expected[b] = mixer.o_proj(torch.cat(heads, -1))
    mixed, matrix = mixer(hidden, mask, output_attentions=True)
    for result in (mixed, mixer(hidden, mask)):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    assert (matrix[1][:, :, ~mask[1]] == 0).all(), "a masked key has an effect"


@pytest.mark.parametrize("wanted", [False, True], ids=["sdpa", "matrix"])
def test_rows_that_see_no_key_read_0_with_finite_gradients(wanted):
    mixer = SoftmaxMixer(24, 3)
    hidden = torch.randn(2, 5, 24, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    mixed, matrix = mixer(hidden, mask, output_attentions=True) if wanted else (mixer(hidden, mask), None)
    torch.testing.assert_close(mixed[1], mixer.o_proj.bias.expand(5, -1))
    assert not wanted or (matrix[1] == 0).all()
    mixed.square().sum().backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("layers", PATTERNS, ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_changes_no_real_token(layers, left):
    model, inputs = build(dtype=torch.float64, softmax_layers=layers, pos_emb=False), text_inputs()
    outputs = model(**{k: v.flip(1) if left else v for k, v in inputs.items()}).logits
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        real = ids[mask.bool()][None]
        alone = model(real.flip(1) if left else real).logits[0]
        found = outputs[row, -real.shape[1] :] if left else outputs[row, : real.shape[1]]
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layers", PATTERNS, ids=str)
@pytest.mark.parametrize("kind, options", [("text", {}), ("image", {}), ("image", {"order": "s"})])
def test_forms_agree_in_outputs_and_every_gradient(kind, options, layers):
    model, inputs = build(kind, dtype=torch.float64, softmax_layers=layers, **options), inputs_for(kind, torch.float64)
    results = {}
    for form in FORMS:
        model.config.format = form
        model.zero_grad()
        logits = model(**inputs).logits
        logits.square().mean().backward()
        results[form] = [logits.detach(), *(p.grad.clone() for p in model.parameters())]
    for form in FORMS[1:]:
        for found, expected in zip(results[form], results[FORMS[0]], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_softmax_layers_know_no_order_of_patches():
    """Without positions and with softmax layers only, permuted patches give permuted tokens."""
    model = build("image", softmax_layers=[0, 1], order="s", dtype=torch.float64).lion_vision
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    tokens = model(pixels).last_hidden_state
    swapped = model(pixels.roll(4, 3)).last_hidden_state  # moves each column of patches to the next one
    grid, moved = (x[0, 1:].unflatten(0, (4, 4)) for x in (tokens, swapped))
    torch.testing.assert_close(moved, grid.roll(1, 1))
    torch.testing.assert_close(swapped[:, 0], tokens[:, 0])


# ------------------------------------------------------------------------------------------ attentions and dropout


@pytest.mark.parametrize("kind", CONFIGS)
def test_attentions_come_from_both_kinds_of_layers(kind):
    model, inputs, mixed = build(kind, dtype=torch.float64), inputs_for(kind, torch.float64), {}
    for i, layer in enumerate(model.base_model.layers):
        layer.mixer.v_proj.register_forward_hook(lambda m, x, y, i=i: mixed.__setitem__(("value", i), y))
        layer.mixer.o_proj.register_forward_pre_hook(lambda m, x, i=i: mixed.__setitem__(("mixed", i), x[0]))
    outputs = model(**inputs, output_attentions=True)
    assert len(outputs.attentions) == 2
    for i, matrix in enumerate(outputs.attentions):
        value = mixed["value", i].unflatten(-1, (3, 8)).transpose(1, 2)
        torch.testing.assert_close((matrix @ value).transpose(1, 2).flatten(2), mixed["mixed", i])
    torch.testing.assert_close(model(**inputs).logits, outputs.logits)


@pytest.mark.parametrize("form", ["rnn", "chunk"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_softmax_layers_give_their_matrix_in_every_form_and_lion_layers_refuse(kind, form):
    inputs = inputs_for(kind)
    assert len(build(kind, softmax_layers=[0, 1], format=form)(**inputs, output_attentions=True).attentions) == 2
    with pytest.raises(ValueError, match=f"needs the attention matrix, which format='{form}' never builds"):
        build(kind, softmax_layers=[0], format=form)(**inputs, output_attentions=True)


@pytest.mark.parametrize("wanted", [False, True], ids=["sdpa", "matrix"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_dropout_acts_in_training_only(kind, wanted):
    model, inputs = build(kind, softmax_layers=[0, 1], attention_probs_dropout_prob=0.4), inputs_for(kind)
    a, b = (model(**inputs, output_attentions=wanted).logits for _ in range(2))
    assert torch.equal(a, b)
    model.train()
    a, b = (model(**inputs, output_attentions=wanted).logits for _ in range(2))
    assert not torch.equal(a, b)


# ------------------------------------------------------------------------------------------- precision and training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_and_loaded_in_half_precision(tmp_path, kind, dtype):
    model, inputs = build(kind), inputs_for(kind)
    model.save_pretrained(tmp_path)
    expected = model(**inputs).logits
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(**inputs).logits, expected)
    low = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    for wanted in (False, True):
        logits = low(**inputs, output_attentions=wanted).logits
        assert logits.dtype == dtype
        assert (logits.float() - expected).abs().max() / expected.abs().max() < 0.05
    low.train()(**inputs).logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    model = build(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2).train()
    inputs, gradients = text_inputs(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("kind, form", [("text", "attention"), ("image", "chunk")])
def test_compiles_into_one_graph(kind, form):
    torch.compiler.reset()
    model, inputs = build(kind, format=form), inputs_for(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_export_takes_any_batch_and_text_of_any_length(kind):
    model, inputs = build(kind, format="attention"), inputs_for(kind)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=40)
    dims = {0: batch, 1: length} if kind == "text" else {0: batch}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims))
    other = text_inputs(5, 23) if kind == "text" else {"pixel_values": torch.randn(5, 3, 16, 16)}
    torch.testing.assert_close(program.module()(**other).logits, model(**other).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_onnx_runs_and_agrees(tmp_path, kind):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, inputs = build(kind, format="attention"), inputs_for(kind)
    file = tmp_path / "hybrid.onnx"
    torch.onnx.export(model, (), str(file), kwargs=inputs, dynamo=True)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    (logits, *_) = session.run(None, {n: x.numpy() for n, x in inputs.items() if n in names})
    torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_number_of_layers_that_leaves_a_softmax_layer_out_is_refused_at_load(tmp_path):
    lion_hf.LionForMaskedLM(text_config(num_hidden_layers=3, softmax_layers=[1])).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="with num_hidden_layers 1 its numbers must be from 0 to 0"):
        lion_hf.LionForMaskedLM.from_pretrained(tmp_path, num_hidden_layers=1)
    assert lion_hf.LionConfig.from_pretrained(tmp_path, num_hidden_layers=2).softmax_layers == [1]
