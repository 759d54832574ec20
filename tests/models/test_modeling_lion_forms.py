"""Text models: forms agree, padding changes nothing, recorded outputs, precision."""

import math

import pytest
import torch
from small_models import (
    ALL_VARIANTS,
    FORMS,
    TEXT_HEADS,
    decays_of,
    record_mixing,
    spread_decays,
    text_config,
    text_inputs,
)
from text_models import build, differentiable_sum, inputs_for, labels_for, left_padded

import lion_hf
from lion_hf.models import modeling_lion as modeling_lion


# ---------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("length", [1, 11, 16])
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_forms_agree_in_outputs_and_every_gradient(mask_type, length):
    model = spread_decays(build(lion_hf.LionForMaskedLM, mask_type, torch.float64, hidden_act="gelu_new"))
    inputs = text_inputs(3, length)
    results = {}
    for form in (*FORMS, "auto"):
        model.config.format = form
        model.zero_grad()
        outputs = model(**inputs, output_hidden_states=True)
        (differentiable_sum(outputs) + outputs.hidden_states[1].pow(2).sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results[form] = {"logits": outputs.logits.detach(), **gradients}
    for form, tensors in results.items():
        for name, x in tensors.items():
            expected = results["attention"][name]
            assert (x - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1e-3), f"{form} {name}"
            assert length == 1 or expected.abs().max() > 0, name


@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_every_head_agrees_over_the_forms(head, mask_type):
    model, inputs = build(head, mask_type, torch.float64), inputs_for(head)
    expected = model(**inputs)
    for form in FORMS:
        model.config.format = form.upper()
        for a, b in zip(model(**inputs).values(), expected.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_format_changed_on_a_live_model_acts_at_the_next_forward():
    model, ids = build(lion_hf.LionModel, "decay", format="rnn"), torch.ones(1, 5).long()
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    model.config.format = "Attention"
    assert model(ids, output_attentions=True).attentions is not None
    with pytest.raises(ValueError, match="format is 'fast'"):
        model.config.format = "fast"
    assert model.config.format == "attention"


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
def test_chunk_size_changes_nothing(chunk_size):
    model, inputs = build(lion_hf.LionModel, dtype=torch.float64, format="chunk"), text_inputs()
    expected = model(**inputs).last_hidden_state
    for form in ("chunk", "rnn"):
        model.config.format, model.config.chunk_size = form, chunk_size
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------------------- batches and padding


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_right_padding_changes_no_real_token(mask_type, form):
    model = build(lion_hf.LionModel, mask_type, torch.float64, format=form)
    inputs = text_inputs()
    inputs["input_ids"][inputs["attention_mask"] == 0] = 7  # any token may be there
    padded = model(**inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = model(inputs["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(
            padded.last_hidden_state[row, :length], alone.last_hidden_state[0], rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(padded.pooler_output[row], alone.pooler_output[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_left_padding_changes_no_real_token_and_the_pooler_takes_the_first(mask_type, form):
    model = build(lion_hf.LionModel, mask_type, torch.float64, format=form)
    inputs = text_inputs()
    right, moved = model(**inputs), left_padded(inputs)
    positions = {"position_ids": (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)} if mask_type == "lit" else {}
    left = model(**moved, **positions)
    torch.testing.assert_close(left.pooler_output, right.pooler_output, rtol=1e-9, atol=1e-12)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        torch.testing.assert_close(
            left.last_hidden_state[row, 11 - length :],
            right.last_hidden_state[row, :length],
            rtol=1e-9,
            atol=1e-12,
        )
    if mask_type == "lit":  # without position_ids the table counts the padding, so the outputs must differ
        assert (model(**moved).pooler_output - right.pooler_output).abs().max() > 1e-6


@pytest.mark.parametrize("head", TEXT_HEADS[1:], ids=lambda x: x.__name__)
def test_padding_reaches_no_head(head):
    model, inputs = build(head, dtype=torch.float64), inputs_for(head)
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 33)}
    real = inputs["attention_mask"].bool()
    for a, b in zip(model(**inputs).values(), model(**other).values(), strict=True):
        if a.shape[:2] == real.shape:
            a, b = a[real], b[real]
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_a_row_alone_equals_the_row_in_a_batch(mask_type, form):
    model = build(lion_hf.LionForMaskedLM, mask_type, torch.float64, format=form)
    inputs = text_inputs(4)
    batch = model(**inputs).logits
    for row in range(4):
        alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(alone[0, real], batch[row, real], rtol=1e-9, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    permuted = model(**{k: v[order] for k, v in inputs.items()}).logits
    torch.testing.assert_close(permuted, batch[order], rtol=1e-9, atol=1e-12)


def test_a_row_of_padding_only_is_finite_with_finite_gradients():
    for form in FORMS:
        model = build(lion_hf.LionModel, format=form)
        inputs = text_inputs()
        inputs["attention_mask"][1] = 0
        outputs = model(**inputs)
        differentiable_sum(outputs).backward()
        assert outputs.last_hidden_state.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_attention_mask_is_accepted_in_every_dtype_and_with_broadcast_dimensions(dtype):
    model, inputs = build(lion_hf.LionModel), text_inputs()
    expected = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].to(dtype)
    for accepted in (mask, mask[:, None, None, :]):
        assert torch.equal(model(inputs["input_ids"], accepted).last_hidden_state, expected)
    unmasked = model(inputs["input_ids"]).last_hidden_state
    assert not torch.allclose(unmasked, expected)
    assert torch.equal(model(inputs["input_ids"], torch.ones_like(mask)).last_hidden_state, unmasked)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(3, 11, 11), r"shape \(3, 11, 11\); LION masks keys only.*\(batch, length\) = \(3, 11\)"),
        (torch.ones(3, 1, 11, 11), r"shape \(3, 1, 11, 11\)"),
        (torch.ones(3, 2, 1, 11), r"shape \(3, 2, 1, 11\)"),
        (torch.ones(3, 12), r"shape \(3, 12\)"),
        (torch.ones(2, 11), r"shape \(2, 11\)"),
        (torch.ones(11), r"shape \(11,\)"),
        (torch.zeros(3, 11).masked_fill(torch.rand(3, 11) > 0.5, -1e9), "not an additive mask"),
        (torch.zeros(3, 1, 1, 11).masked_fill(torch.rand(3, 1, 1, 11) > 0.5, -math.inf), "not an additive mask"),
        (torch.full((3, 11), 0.5), "values other than 0 and 1"),
    ],
    ids=[
        "pairs",
        "pairs-4d",
        "per-head",
        "too-long",
        "other-batch",
        "1d",
        "additive",
        "additive-4d",
        "soft",
    ],
)
def test_other_masks_are_refused_and_say_what_is_taken(mask, message):
    model, ids = build(lion_hf.LionModel), text_inputs()["input_ids"]
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=mask)


# ------------------------------------------------------------------------------------------------ recorded outputs


@pytest.mark.parametrize("form", ["attention", "auto"])
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_attentions_are_the_matrices_that_mix_the_values(mask_type, form):
    model = spread_decays(build(lion_hf.LionModel, mask_type, torch.float64, format=form))
    inputs, values, mixed = text_inputs(), {}, {}
    real = inputs["attention_mask"].bool()
    record_mixing(model, values, mixed, real)
    plain = model(**inputs)
    of_operator = dict(mixed)
    outputs = model(**inputs, output_attentions=True)
    assert len(outputs.attentions) == 2 and plain.attentions is None
    torch.testing.assert_close(outputs.last_hidden_state, plain.last_hidden_state, rtol=1e-9, atol=1e-12)
    for i, a in enumerate(outputs.attentions):
        assert a.shape == (3, 3, 11, 11)
        assert (a.transpose(1, 3)[~real] == 0).all(), "a masked key has an effect"
        torch.testing.assert_close((a @ values[i]).transpose(1, 2).flatten(2), of_operator[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["rnn", "chunk"])
def test_attentions_from_a_form_without_matrix_are_a_clear_error(form):
    model, inputs = build(lion_hf.LionForMaskedLM, format=form), text_inputs()
    message = f"output_attentions=True needs the attention matrix.*format='{form}'.*'attention' or 'auto'"
    with pytest.raises(ValueError, match=message):
        model(**inputs, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    config = text_config(format=form, output_attentions=True)  # building it raises nothing
    with pytest.raises(ValueError, match=message):
        lion_hf.LionModel(config)(**inputs)


def test_auto_takes_the_attention_form_for_attentions_at_any_length():
    model = build(lion_hf.LionModel, "decay", format="auto")
    length = max(lion_hf.ops.api.CROSSOVER["cpu"].values()) + 1
    outputs = model(torch.randint(1, 61, (1, length)), output_attentions=True)
    assert outputs.attentions[0].shape == (1, 3, length, length)


@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
def test_recorded_outputs_come_from_the_configuration_or_the_call(head):
    model, inputs = build(head, format="attention"), inputs_for(head)
    asked = model(**inputs, output_hidden_states=True, output_attentions=True)
    model.config.output_hidden_states = model.config.output_attentions = True
    configured, unasked = model(**inputs), model(**inputs, output_hidden_states=False, output_attentions=False)
    for outputs in (asked, configured):
        assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    assert unasked.hidden_states is None and unasked.attentions is None


def test_hidden_states_run_from_the_embeddings_to_the_last_layer():
    model, inputs = build(lion_hf.LionModel), text_inputs()
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(outputs.hidden_states[0], model.embeddings(inputs["input_ids"]))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    mask = inputs["attention_mask"].bool()
    assert torch.equal(model.layers[0](outputs.hidden_states[0], mask), outputs.hidden_states[1])


@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
def test_tuples_hold_the_values_of_the_output_class(head):
    model, inputs = build(head), {**inputs_for(head), **labels_for(head)}
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = model(**inputs, **options).to_tuple()
    asked = model(**inputs, **options, return_dict=False)
    model.config.return_dict = False
    for actual in (asked, model(**inputs, **options)):
        assert type(actual) is tuple and len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
                assert torch.equal(x, y)


def test_pooler_can_be_left_out():
    model = lion_hf.LionModel(text_config(), add_pooling_layer=False)
    assert model.pooler is None and model(**text_inputs()).pooler_output is None


# ------------------------------------------------------------------------------------------- training and precision


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_no_gradient(form, options):
    model = build(lion_hf.LionForMaskedLM, format=form, hidden_dropout_prob=0.2).train()
    inputs = {**text_inputs(), **labels_for(lion_hf.LionForMaskedLM)}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(options or None)
            assert model.is_gradient_checkpointing
        calls = []
        hook = model.lion.layers[0].mixer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        torch.manual_seed(1)
        model(**inputs).loss.backward()
        hook.remove()
        assert len(calls) == 1 + checkpointing, "with checkpointing the layer is computed twice"
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda m, name=name: f"{name}: {m}")
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_half_precision_load_keeps_decays_in_float32_and_runs_in_every_form(tmp_path, mask_type, dtype):
    model, inputs = build(lion_hf.LionForMaskedLM, mask_type), text_inputs()
    model.save_pretrained(tmp_path)
    low = lion_hf.LionForMaskedLM.from_pretrained(tmp_path, dtype=dtype).eval()
    decays = decays_of(low)
    assert bool(decays) == (mask_type not in ("lit", "retnet"))
    for name, p in low.named_parameters():
        assert p.dtype == (torch.float32 if name in decays else dtype), name
        assert name not in decays or torch.equal(p, model.get_parameter(name))
    expected = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    for form in (*FORMS, "auto"):
        low.config.format = form
        logits = low(**inputs).logits
        assert logits.dtype == dtype
        error = (logits.float() - expected)[real].abs().max() / expected.abs().max()
        assert error < 0.05, f"{form}: {error}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_bfloat16_training_gives_finite_gradients_everywhere(tmp_path, mask_type, form):
    build(lion_hf.LionForMaskedLM, mask_type, format=form).save_pretrained(tmp_path)
    model = lion_hf.LionForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    model(**text_inputs(), **labels_for(lion_hf.LionForMaskedLM)).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_autocast_runs_and_stays_near_float32(mask_type, form):
    model, inputs = build(lion_hf.LionForMaskedLM, mask_type, format=form), text_inputs()
    expected = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    assert (logits.float() - expected).abs().max() / expected.abs().max() < 0.05
