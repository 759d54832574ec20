"""classifier_pooling: the part of a text that sequence classification and multiple choice read."""

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS, TEXT_HEADS, text_config, text_inputs
from text_models import build, differentiable_sum, inputs_for, labels_for
from transformers import AutoModelForSequenceClassification

import lion_hf


POOLED_HEADS = (lion_hf.LionForSequenceClassification, lion_hf.LionForMultipleChoice)
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "holes": [[0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0]],
    "row": [[0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
}


def by_definition(model, hidden, mask):
    """Pool row by row. A row without real tokens is pooled from its first token."""
    mask = torch.ones(hidden.shape[:2]).bool() if mask is None else mask.bool()
    rows = [tokens[real] if real.any() else tokens[:1] for tokens, real in zip(hidden, mask, strict=True)]
    pooled = torch.stack([row.mean(0) for row in rows])
    return torch.tanh(model.pooler.dense(pooled))


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_the_mean_runs_over_real_tokens(mask_type, name, unpad):
    model = build(lion_hf.LionModel, mask_type, torch.float64, classifier_pooling="mean", unpad=unpad)
    mask = None if MASKS[name] is None else torch.tensor(MASKS[name])
    ids = torch.randint(1, 61, (3, 6))
    outputs = model(ids if mask is None else ids * mask, mask)
    expected = by_definition(model, outputs.last_hidden_state, mask)
    torch.testing.assert_close(outputs.pooler_output, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_packed_texts_have_a_mean_each_with_the_gradients_of_separate_ones(mask_type, masked):
    model = build(lion_hf.LionModel, mask_type, torch.float64, classifier_pooling="mean")
    ids, lengths = torch.randint(1, 61, (1, 12)), [5, 1, 4, 2]
    mask = torch.tensor([[0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0]]) if masked else None
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    masks = [None] * 4 if mask is None else mask.split(lengths, 1)
    separate = [model(part, key).pooler_output for part, key in zip(ids.split(lengths, 1), masks, strict=True)]
    packed = model(ids, mask, cu_seq_lens_q=bounds).pooler_output
    results = []
    for pooled in (packed, torch.cat(separate)):
        loss = (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).sum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        results.append([pooled, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", POOLED_HEADS, ids=lambda x: x.__name__)
def test_padding_changes_nothing_and_what_stands_there_reaches_nothing(head, form):
    model = build(head, "decay", torch.float64, classifier_pooling="mean", format=form)
    inputs = inputs_for(head)
    padding = inputs["attention_mask"] == 0
    expected = model(**inputs).logits
    inputs["input_ids"][padding] = 7
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-12)
    embeddings = model.lion.embeddings.word_embeddings(inputs["input_ids"])
    embeddings[padding] = torch.nan
    broken = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(broken, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head", TEXT_HEADS[1:], ids=lambda x: x.__name__)
def test_only_heads_that_pool_see_the_option(head):
    first, inputs = build(head), inputs_for(head)
    expected = differentiable_sum(first(**inputs))
    first.config.classifier_pooling = "MEAN"  # any case is accepted, also after construction
    assert first.config.classifier_pooling == "mean"
    assert torch.equal(differentiable_sum(first(**inputs)), expected) == (head not in POOLED_HEADS)


@pytest.mark.parametrize("head", POOLED_HEADS, ids=lambda x: x.__name__)
def test_the_choice_is_saved_and_can_be_made_at_load(tmp_path, head):
    assert text_config().classifier_pooling == "first"
    assert all("classifier_pooling" not in preset for preset in lion_hf.PAPER_PRESETS.values())
    build(head, classifier_pooling="mean").save_pretrained(tmp_path)
    assert head.from_pretrained(tmp_path).config.classifier_pooling == "mean"
    assert head.from_pretrained(tmp_path, classifier_pooling="first").config.classifier_pooling == "first"
    build(lion_hf.LionForMaskedLM).save_pretrained(tmp_path / "encoder")
    fine_tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", classifier_pooling="mean")
    assert fine_tuned.config.classifier_pooling == "mean"
    with pytest.raises(Exception, match="classifier_pooling is 'cls' .* 'first', 'mean'"):
        text_config(classifier_pooling="cls")


def test_low_precision_sums_in_float32():
    """A bfloat16 sum of 2,000 equal tokens would stop growing at 256 of them."""
    model = lion_hf.LionModel(text_config(classifier_pooling="mean")).bfloat16()
    tokens, mask = torch.ones(1, 2000, 24).bfloat16(), torch.ones(1, 2000).bool()
    mask[:, -1] = False
    expected = model.pooler(tokens)
    for arguments in ((mask, None), (None, torch.tensor([0, 2000])), (mask, torch.tensor([0, 2000]))):
        assert torch.equal(model.pooler(tokens, *arguments, "mean"), expected)


@pytest.mark.slow
def test_compiled_and_exported_models_pool_alike():
    model = build(lion_hf.LionForSequenceClassification, classifier_pooling="mean", format="attention")
    inputs = text_inputs()
    expected = model(**inputs).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected)
    torch.compiler.reset()
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs=inputs).module()
    torch.testing.assert_close(exported(**inputs).logits, expected)


def test_training_with_the_mean_reaches_every_parameter():
    for head in POOLED_HEADS:
        model = build(head, classifier_pooling="mean").train()
        model(**inputs_for(head), **labels_for(head)).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
