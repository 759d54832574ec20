"""Several sequences in one row: packed by the caller, or a padded batch without its padding."""

import re

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS, spread_decays, text_config
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import lion_hf
from lion_hf import bidirectional_linear_attention
from lion_hf.models import modeling_lion
from lion_hf.nn import encoder


KINDS = ("none", "head", "token")
LENGTHS = [1, 7, 0, 3, 4, 5, 13, 0]  # chunks of 4: lengths of 3, 4 and 5, primes, a single token, and 0
TOLD = {
    "position_ids": [{}],
    "bounds": [
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
    ],
}


def bounds(lengths=LENGTHS, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def operands(kind, length, mask=None):
    query, key, value = (torch.rand(1, 2, length, width, dtype=torch.float64) - 0.1 for width in (4, 4, 3))
    decays = {"none": None, "head": -torch.rand(2).double(), "token": -torch.rand(1, 2, length).double()}
    key_mask = torch.rand(1, length) > 0.3 if mask else None
    return [query, key, value, decays[kind]], key_mask


def outputs_and_gradients(function, inputs):
    inputs = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs)
    wanted = [x for x in inputs if x is not None]
    return [*outputs, *torch.autograd.grad(total, wanted)]


def assert_all_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ the operator


@pytest.mark.parametrize("result", [{}, {"normalize": True}, {"return_denominator": True}], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "holes"])
@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_equal_separate_ones_in_outputs_and_every_gradient(kind, form, masked, result):
    inputs, key_mask = operands(kind, sum(LENGTHS), masked)
    options = {"format": form, "chunk_size": 4, **result}

    def separate(query, key, value, log_decay):
        outputs = []
        for start, stop in zip(bounds()[:-1], bounds()[1:], strict=True):
            decay = log_decay[:, :, start:stop] if kind == "token" else log_decay
            mask = None if key_mask is None else key_mask[:, start:stop]
            along = (x[:, :, start:stop] for x in (query, key, value))
            outputs.append(bidirectional_linear_attention(*along, decay, key_mask=mask, **options))
        if result.get("return_denominator"):
            return tuple(torch.cat(parts, 2) for parts in zip(*outputs, strict=True))
        return torch.cat(outputs, 2)

    def packed(*inputs):
        return bidirectional_linear_attention(*inputs, key_mask=key_mask, cu_seqlens=bounds(), **options)

    assert_all_close(outputs_and_gradients(packed, inputs), outputs_and_gradients(separate, inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_of_one_sequence_reaches_no_other(kind, form):
    inputs, _ = operands(kind, 12)
    whose = torch.arange(12).div(4, rounding_mode="floor")  # three sequences; the second one is NaN
    for x in inputs[:3]:
        x[:, :, whose == 1] = torch.nan
    found = outputs_and_gradients(
        lambda *x: bidirectional_linear_attention(
            *x, format=form, chunk_size=3, normalize=True, cu_seqlens=bounds([4, 4, 4])
        ),
        inputs,
    )
    assert found[0][:, :, whose == 1].isnan().all()
    per_token = [x for x in found if x.dim() > 1]
    assert len(per_token) == (5 if kind == "token" else 4)
    assert all(x[:, :, whose != 1].isfinite().all() for x in per_token)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_one_sequence_and_no_token_are_rows_as_any(dtype):
    inputs, _ = operands("token", 6)
    alone = bidirectional_linear_attention(*inputs)
    assert torch.equal(bidirectional_linear_attention(*inputs, cu_seqlens=bounds([6], dtype)), alone)
    inputs, _ = operands("token", 0)
    assert bidirectional_linear_attention(*inputs, cu_seqlens=bounds([0, 0], dtype)).shape == (1, 2, 0, 3)


def test_compiled_code_takes_any_bounds():
    inputs, _ = operands("token", 9)

    def function(cu_seqlens):
        return 2 * bidirectional_linear_attention(*inputs, cu_seqlens=cu_seqlens)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="eager")
    for lengths in ([4, 5], [2, 7], [3, 3, 3]):
        assert torch.equal(compiled(bounds(lengths)), function(bounds(lengths)))
    torch.compiler.reset()


@pytest.mark.parametrize(
    "cu_seqlens, message",
    [
        ([0, 6], r"cu_seqlens is a list; .* torch.tensor\(cu_seqlens\)"),
        (torch.tensor([0.0, 6.0]), r"shape \(2,\) and dtype torch.float32; it must be int32 or int64"),
        (torch.tensor([[0, 6]]), r"shape \(1, 2\)"),
        (torch.tensor([0]), r"at least one sequence"),
        (torch.tensor([0, 4, 5]), "runs from 0 to 5, .* end with 6, the number of tokens"),
        (torch.tensor([1, 6]), "runs from 1 to 6"),
        (torch.tensor([0, 5, 4, 6]), "smallest step is -1"),
    ],
    ids=str,
)
def test_bounds_that_divide_no_row_are_refused(cu_seqlens, message):
    inputs, _ = operands("head", 6)
    with pytest.raises(ValueError, match=message):
        bidirectional_linear_attention(*inputs, cu_seqlens=cu_seqlens)


def test_a_packed_batch_of_several_rows_is_refused():
    x = torch.zeros(2, 1, 6, 4)
    with pytest.raises(ValueError, match="given with a batch of 2; .* the batch must be 1"):
        bidirectional_linear_attention(x, x, x, cu_seqlens=torch.tensor([0, 6]))


# ------------------------------------------------------------------------------------------- rows packed by the caller


def build(head=lion_hf.LionModel, mask_type="selective", dtype=torch.float64, **options):
    """Return a model with noise added to all weights, and with different decays."""
    model = head(text_config(mask_type, **options)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return spread_decays(model).eval()


def texts(lengths=(5, 2, 9, 4)):
    return [torch.randint(1, 61, (length,)) for length in lengths]


def flattened(sequences, **options):
    batch = DataCollatorWithFlattening(**options)([{"input_ids": ids} for ids in sequences])
    batch.pop("labels")
    return batch


def scalar(x):
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("layers", [[], [0]], ids=["lion", "hybrid"])
@pytest.mark.parametrize("pos_emb", [False, True], ids=["no-table", "table"])
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_a_flattened_batch_equals_its_sequences_in_outputs_and_every_gradient(mask_type, pos_emb, layers, told):
    model, sequences = build(mask_type=mask_type, pos_emb=pos_emb, softmax_layers=layers), texts((5, 2, 9, 4))
    if told != "position_ids":
        sequences.insert(1, torch.randint(1, 61, (1,)))  # a text of one token, which positions cannot separate
    separate = [model(ids[None]) for ids in sequences]
    hidden = torch.cat([outputs.last_hidden_state for outputs in separate], 1)
    pooled = torch.cat([outputs.pooler_output for outputs in separate])
    expected = [hidden, pooled, *gradients(model, scalar(hidden) + scalar(pooled))]
    for options in TOLD[told]:
        outputs = model(**flattened(sequences, **options))
        found = gradients(model, scalar(outputs.last_hidden_state) + scalar(outputs.pooler_output))
        assert_all_close([outputs.last_hidden_state, outputs.pooler_output, *found], expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [[], [0]], ids=["lion", "hybrid"])
def test_an_attention_mask_beside_the_bounds_masks_keys(form, layers):
    model, sequences = build(format=form, softmax_layers=layers), texts()
    batch = flattened(sequences, return_flash_attn_kwargs=True)
    mask = torch.rand(1, 20) > 0.4
    found = model(**batch, attention_mask=mask).last_hidden_state
    masks = mask.split([len(ids) for ids in sequences], 1)
    separate = [model(ids[None], part).last_hidden_state for ids, part in zip(sequences, masks, strict=True)]
    torch.testing.assert_close(found, torch.cat(separate, 1), rtol=1e-9, atol=1e-12)
    assert (found - model(**batch).last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_the_first_token_that_is_not_masked_is_pooled(name):
    """Each text is pooled as in a row of its own; if all its tokens are masked, the first one is pooled."""
    model, sequences = build(), texts((4, 3, 2, 5, 1, 3))
    parts = [[0, 0, 1, 1], [0, 0, 0], [1, 1], [0, 1, 0, 1, 0], [1], [0, 0, 0]]
    masks = [torch.tensor([part]) for part in parts]
    separate = torch.cat([model(ids[None], mask).pooler_output for ids, mask in zip(sequences, masks, strict=True)])
    options = {"return_flash_attn_kwargs": True} if name == "cu_seq_lens_q" else {"return_seq_idx": True}
    outputs = model(**flattened(sequences, **options), attention_mask=torch.cat(masks, 1))
    torch.testing.assert_close(outputs.pooler_output, separate, rtol=1e-9, atol=1e-12)


def test_positions_beside_a_mask_or_in_a_batch_are_positions():
    model, ids, mask = build(mask_type="lit"), torch.randint(1, 61, (2, 6)), torch.ones(2, 6).long()
    mask[:, 5] = 0
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    both = model(ids, mask, position_ids=positions.expand(2, -1)).last_hidden_state
    alone = model(ids[:1], mask[:1], position_ids=positions).last_hidden_state
    torch.testing.assert_close(alone, both[:1], rtol=1e-9, atol=1e-12)


def test_packing_needs_no_table_and_does_not_warn_of_ignored_positions(monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_lion.logger, "warning_once", warned.append)
    build()(**flattened(texts()))
    assert not warned
    build()(torch.ones(2, 3).long(), position_ids=torch.tensor([[2, 1, 0]]))
    assert "position_ids are ignored" in warned[0]


@pytest.mark.parametrize(
    "head", [lion_hf.LionForMaskedLM, lion_hf.LionForTokenClassification], ids=lambda x: x.__name__
)
def test_losses_over_tokens_are_those_of_the_sequences(head):
    model, sequences = build(head), texts()
    labels = [ids % 2 for ids in sequences]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": ids, "labels": y} for ids, y in zip(sequences, labels, strict=True)]
    )
    losses = [
        model(ids[None], labels=torch.cat([torch.tensor([-100]), y[1:]])[None], num_items_in_batch=1).loss
        for ids, y in zip(sequences, labels, strict=True)
        if len(ids) > 1
    ]
    torch.testing.assert_close(model(**batch, num_items_in_batch=1).loss, sum(losses))  # computed in float32


def test_sequences_are_classified_one_by_one():
    model, sequences = build(lion_hf.LionForSequenceClassification, num_labels=3), texts()
    outputs = model(**flattened(sequences), labels=torch.tensor([0, 2, 1, 1]))
    separate = torch.cat([model(ids[None]).logits for ids in sequences])
    torch.testing.assert_close(outputs.logits, separate, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(separate, torch.tensor([0, 2, 1, 1])))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cu_seq_lens_q": [0, 4, 6]}, "cu_seqlens is a list"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 5])}, "runs from 0 to 5, .* end with 6"),
        ({"cu_seq_lens_q": torch.tensor([0, 0, 6])}, "is empty and has no first token"),
        ({"seq_idx": torch.tensor([[0, 0, 1]])}, r"seq_idx has shape \(1, 3\) .* must be \(1, 6\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 6]), "output_attentions": True}, "no attention matrix is built"),
    ],
    ids=lambda x: None,
)
def test_what_packed_rows_cannot_do_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.ones(1, 6).long(), **options)


def test_multiple_choice_does_not_take_packed_texts_for_choices():
    model, sequences = build(lion_hf.LionForMultipleChoice), texts()
    batch = {name: x[None] for name, x in flattened(sequences).items()}
    with pytest.raises(ValueError, match=f"row holds {len(sequences)} texts, but multiple choice compares rows"):
        model(**batch)


@pytest.mark.parametrize("pos_emb", [False, True], ids=["no-table", "table"])
@pytest.mark.parametrize(
    "batch, shape", [(1, (1, 4)), (1, (4,)), (1, (2, 6)), (2, (2, 4)), (3, (2, 6)), (2, (1, 2, 6))]
)
def test_positions_that_do_not_fit_the_tokens_are_an_error(batch, shape, pos_emb):
    """The error names positions and tokens, not the bounds of packed texts, which the caller did not give."""
    model, ids = build(pos_emb=pos_emb), torch.ones(batch, 6).long()
    positions = (torch.arange(shape[-1]) % 2).expand(shape)
    found = re.escape(str(shape))
    for inputs in ({"input_ids": ids}, {"inputs_embeds": model.embeddings.word_embeddings(ids)}):
        with pytest.raises(ValueError, match=rf"position_ids has shape {found}; .* \({batch}, 6\).* or \(1, 6\)"):
            model(**inputs, position_ids=positions)


@pytest.mark.parametrize("pos_emb", [False, True], ids=["no-table", "table"])
def test_positions_of_one_row_serve_every_row(pos_emb):
    model, ids = build(pos_emb=pos_emb), torch.randint(1, 61, (2, 6))
    positions = torch.arange(6).flip(0)
    expected = model(ids, position_ids=positions.expand(2, -1)).last_hidden_state
    for shared in (positions, positions[None]):
        assert torch.equal(model(ids, position_ids=shared).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_bounds_of_several_rows_are_an_error(name):
    value = torch.tensor([0, 6]) if name == "cu_seq_lens_q" else torch.zeros(2, 3).int()
    with pytest.raises(ValueError, match=f"{name.replace('_lens_q', 'lens')} .* batch of 2"):
        build()(torch.ones(2, 3).long(), **{name: value})


def test_attention_dropout_in_training_refuses_packed_rows():
    model = build(attention_probs_dropout_prob=0.1)
    model(**flattened(texts()))
    with pytest.raises(ValueError, match="or set .*attention_probs_dropout_prob to 0"):
        model.train()(**flattened(texts()))


@pytest.mark.slow
def test_compiled_models_equal_eager_ones():
    torch.compiler.reset()
    model = build(lion_hf.LionForSequenceClassification, softmax_layers=[0])
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in ((5, 1, 9, 4), (3, 6)):
        batch = flattened(texts(lengths), return_flash_attn_kwargs=True)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
    model.config.unpad, inputs = True, padded_batch("holes")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    torch.compiler.reset()


def test_trainer_takes_flattened_batches(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": ids, "labels": ids} for ids in texts([3, 8, 5, 2, 7, 4, 6, 1])]
    model = build(lion_hf.LionForMaskedLM, dtype=torch.float32)
    before = [p.clone() for p in model.parameters()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no"
    )
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 0 and trainer.evaluate()["eval_loss"] > 0
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# ------------------------------------------------------------------------------------------ batches without padding

MASKS = {
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "both": [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]],
    "holes": [[0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0]],
    "row": [[0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
}


def ends(mask):
    """Return True for padding at the ends of rows. A row that is all padding keeps its first token."""
    real = mask.bool().clone()
    real[~real.any(1), 0] = True
    return torch.tensor([[not (row[: i + 1].any() and row[i:].any()) for i in range(len(row))] for row in real])


def padded_batch(name, batch=3):
    mask = torch.tensor(MASKS[name])
    return {"input_ids": torch.randint(1, 61, (batch, 6)).masked_fill(ends(mask), 0), "attention_mask": mask}


@pytest.mark.parametrize("layers", [[], [1]], ids=["lion", "hybrid"])
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
@pytest.mark.parametrize("name", MASKS)
def test_without_padding_real_tokens_and_their_gradients_are_the_same(name, mask_type, layers):
    model, inputs = build(mask_type=mask_type, softmax_layers=layers).train(), padded_batch(name)
    real, results = inputs["attention_mask"].bool(), {}
    for unpad in (False, True):
        model.config.unpad = unpad
        outputs = model(**inputs)
        hidden, pooled = outputs.last_hidden_state, outputs.pooler_output
        results[unpad] = [hidden[real], pooled, *gradients(model, scalar(hidden[real]) + scalar(pooled))]
        untouched = (hidden == model.embeddings(inputs["input_ids"])).all(-1)
        assert torch.equal(untouched, ends(real) & unpad), "a token masked inside its row counts as padding"
    assert_all_close(results[True], results[False])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layers", [[], [1]], ids=["lion", "hybrid"])
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_every_row_is_pooled_alike_with_its_padding_and_without(mask_type, layers, training, monkeypatch):
    monkeypatch.setattr(encoder, "LEAST_PADDING", 0)
    model = build(mask_type=mask_type, softmax_layers=layers).train(training)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]
    )
    inputs = {"input_ids": torch.randint(1, 61, (5, 6)).masked_fill(ends(mask), 0), "attention_mask": mask}
    results, whole = {}, {}
    for unpad in (False, True, None):
        model.config.unpad = unpad
        outputs = model(**inputs)
        real = outputs.last_hidden_state[mask.bool()]
        loss = scalar(real) + scalar(outputs.pooler_output)
        results[unpad] = [real, outputs.pooler_output, *gradients(model, loss)]
        whole[unpad] = outputs.last_hidden_state
    assert_all_close(results[True], results[False])
    assert_all_close(results[None], results[False])
    assert torch.equal(whole[None], whole[True] if training else whole[False])


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_of_answers_knows_no_padding(side, monkeypatch):
    """Scores of padded positions differ with `unpad` and must not enter the loss."""
    monkeypatch.setattr(encoder, "LEAST_PADDING", 0)
    model, inputs = build(lion_hf.LionForQuestionAnswering).train(), padded_batch(side)
    real = inputs["attention_mask"].bool()
    first, count = real.int().argmax(1), real.sum(1)
    alone = [
        model(ids[kept][None], start_positions=torch.tensor([0]), end_positions=kept.sum()[None] - 1)
        for ids, kept in zip(inputs["input_ids"], real, strict=True)
    ]
    loss = sum(outputs.loss for outputs in alone) / 3
    expected = [loss, *gradients(model, loss)]
    for unpad in (False, True, None):
        model.config.unpad = unpad
        outputs = model(**inputs, start_positions=first, end_positions=first + count - 1)
        assert_all_close([outputs.loss, *gradients(model, outputs.loss)], expected)


@pytest.mark.parametrize("form", FORMS)
def test_decays_of_tokens_masked_inside_a_row_act(form):
    """Removing these tokens from the row would give a different result."""
    model, inputs = build(unpad=True, format=form), padded_batch("holes")
    real = inputs["attention_mask"].bool()
    found = model(**inputs).last_hidden_state[0, real[0]]
    dropped = model(inputs["input_ids"][:1, real[0]]).last_hidden_state[0]
    assert (found - dropped).abs().max() > 1e-3


def recorded_shapes(model, inputs, **options):
    shapes = []
    hooks = [layer.register_forward_hook(lambda m, x, y: shapes.append(tuple(y.shape[:2]))) for layer in model.layers]
    outputs = model(**inputs, **options)
    for hook in hooks:
        hook.remove()
    return set(shapes), outputs


@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_by_default_evaluation_computes_every_position(mask_type, monkeypatch):
    monkeypatch.setattr(encoder, "LEAST_PADDING", 0)
    model, inputs = build(mask_type=mask_type), padded_batch("right")
    default = model(**inputs).last_hidden_state
    model.config.unpad = False
    assert torch.equal(default, model(**inputs).last_hidden_state)
    assert bool((default != model.embeddings(inputs["input_ids"])).any(-1).all())


def test_by_default_padding_goes_in_training_where_there_is_enough(monkeypatch):
    model, inputs = build(), padded_batch("right")  # 8 padded positions in 3 rows, 24 features wide
    padded, unpadded = {(3, 6)}, {(1, 10)}
    assert recorded_shapes(model, inputs)[0] == padded
    assert recorded_shapes(model.train(), inputs)[0] == padded, "too little padding for a narrow model"
    for features, expected in ((8 / 3 * 24, unpadded), (8 / 3 * 24 + 1, padded)):
        monkeypatch.setattr(encoder, "LEAST_PADDING", features)
        assert recorded_shapes(model.train(), inputs)[0] == expected
    model.config.unpad = True
    assert recorded_shapes(model.train(), inputs)[0] == recorded_shapes(model.eval(), inputs)[0] == unpadded
    whole = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones(3, 6)}
    assert recorded_shapes(model, whole)[0] == padded
    model.config.unpad = False
    assert recorded_shapes(model.train(), inputs)[0] == padded


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_recorded_layers_keep_the_shape_of_the_batch(asked):
    model, inputs = build(unpad=True), padded_batch("right")
    shapes, outputs = recorded_shapes(model, inputs, **{asked: True})
    assert shapes == {(3, 6)}
    recorded = outputs.hidden_states if asked == "output_hidden_states" else outputs.attentions
    assert all(x.shape[0] == 3 and 6 in x.shape for x in recorded)


def test_attention_dropout_in_training_keeps_the_padding():
    model, inputs = build(unpad=True, attention_probs_dropout_prob=0.1), padded_batch("right")
    assert recorded_shapes(model, inputs)[0] == {(1, 10)}
    assert recorded_shapes(model.train(), inputs)[0] == {(3, 6)}


def test_a_batch_of_padding_alone_keeps_working():
    model = build(lion_hf.LionForSequenceClassification, unpad=True, softmax_layers=[0]).train()
    outputs = model(torch.zeros(2, 5).long(), torch.zeros(2, 5).long(), labels=torch.tensor([0, 1]))
    assert outputs.logits.shape == (2, 2) and all(x.isfinite().all() for x in gradients(model, outputs.loss))


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_gradient_checkpointing_changes_no_gradient(options):
    model, inputs = build(lion_hf.LionForMaskedLM, unpad=True, softmax_layers=[1]).train(), padded_batch("both")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = gradients(model, model(**inputs, labels=labels).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert_all_close(gradients(model, model(**inputs, labels=labels).loss), expected)


def test_compiled_batches_keep_their_padding(monkeypatch):
    monkeypatch.setattr(encoder, "LEAST_PADDING", 0)
    torch.compiler.reset()
    model, inputs = build(num_hidden_layers=1, format="attention").train(), padded_batch("holes")
    expected = model(**inputs).last_hidden_state
    compiled = torch.compile(model, backend="eager", fullgraph=True)(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled[real], expected[real], rtol=1e-9, atol=1e-12)
    padding = model.embeddings(inputs["input_ids"])
    assert (compiled[~real] != padding[~real]).any(-1).all() and (expected == padding)[ends(real)].all()
    torch.compiler.reset()


@pytest.mark.parametrize("value", [None, True, False], ids=str)
def test_unpad_is_saved_loaded_and_changed_as_any_option(tmp_path, value):
    config = text_config(unpad=value)
    config.save_pretrained(tmp_path)
    assert lion_hf.LionConfig.from_pretrained(tmp_path).unpad is value
    assert lion_hf.LionConfig.from_pretrained(tmp_path, unpad=True).unpad is True
    with pytest.raises(Exception, match="unpad"):
        text_config(unpad="sometimes")


@pytest.mark.parametrize("unpad", [None, True], ids=str)
def test_half_precision_training_has_finite_gradients(unpad):
    """A new head, whose biases are 0, reads the padded positions although they have no labels."""
    model = lion_hf.LionForMaskedLM(text_config("selective", hidden_size=240, unpad=unpad)).half().train()
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[:, 12:] = 0
    ids = torch.randint(1, 61, (3, 24)) * mask
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_one_sequence_alone_is_no_packed_row():
    ids = texts()[0][None]
    outputs = build(format="attention")(ids, cu_seq_lens_q=torch.tensor([0, 5]), output_attentions=True)
    assert outputs.attentions[0].shape[-2:] == (5, 5)


def test_exported_graphs_keep_the_padding():
    model, inputs = build(unpad=True), padded_batch(next(iter(MASKS)))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs=inputs).module()
        found, expected = exported(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-12)
