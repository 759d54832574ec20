"""`sparse_prediction`: logits of masked tokens only, with the loss and the gradients of the dense head."""

import pytest
import torch
from small_models import text_inputs
from text_models import build, left_padded

import lion_hf


VOCABULARY = 61


def masked_lm(**options):
    return build(lion_hf.LionForMaskedLM, dtype=torch.float64, **options).train()


def labels_like(ids, share=0.4):
    return torch.where(torch.rand(ids.shape) < share, torch.randint(1, VOCABULARY, ids.shape), -100)


def step(model, sparse, **inputs):
    model.config.sparse_prediction = sparse
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


def packed_inputs():
    ids = torch.randint(1, VOCABULARY, (1, 12))
    return {"input_ids": ids, "position_ids": torch.tensor([[*range(3), *range(5), *range(4)]])}


INPUTS = {
    "full": lambda: {"input_ids": torch.randint(1, VOCABULARY, (2, 9))},
    "one token": lambda: {"input_ids": torch.randint(1, VOCABULARY, (1, 1))},
    "padded": text_inputs,
    "left padded": lambda: left_padded(text_inputs()),
    "packed": packed_inputs,
}


@pytest.mark.parametrize("items", [None, 7], ids=["mean", "num_items_in_batch"])
@pytest.mark.parametrize("kind", INPUTS)
def test_loss_gradients_and_logits_are_those_of_the_dense_head(kind, items):
    model, inputs = masked_lm(softmax_layers=[1]), INPUTS[kind]()
    inputs["labels"] = labels_like(inputs["input_ids"])
    inputs["labels"][0, 0] = 5
    if items is not None:
        inputs["num_items_in_batch"] = torch.tensor(items)
    dense, expected = step(model, False, **inputs)
    sparse, found = step(model, True, **inputs)
    torch.testing.assert_close(sparse.loss, dense.loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sparse.logits, dense.logits[inputs["labels"] != -100], rtol=1e-9, atol=1e-9)
    assert any(gradient.abs().max() > 0 for gradient in found.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("items", [None, 3])
def test_without_a_masked_token_both_give_the_same_loss_and_no_gradient(items):
    """The mean of no losses is NaN, as in Transformers. All parameters take part, as DistributedDataParallel needs."""
    model, inputs = masked_lm(), text_inputs()
    inputs |= {"labels": torch.full_like(inputs["input_ids"], -100)}
    inputs |= {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    dense, expected = step(model, False, **inputs)
    sparse, found = step(model, True, **inputs)
    torch.testing.assert_close(sparse.loss, dense.loss, equal_nan=True)
    assert sparse.loss.isnan() == (items is None) and sparse.logits.shape == (0, VOCABULARY)
    assert all(torch.equal(found[name], gradient) and not gradient.any() for name, gradient in expected.items())


def test_the_option_is_stored_and_without_labels_all_logits_are_returned(tmp_path):
    masked_lm(sparse_prediction=True).save_pretrained(tmp_path)
    model = lion_hf.LionForMaskedLM.from_pretrained(tmp_path)
    assert model.config.sparse_prediction is True
    inputs = text_inputs()
    assert model(**inputs).logits.shape == (*inputs["input_ids"].shape, VOCABULARY)
    other = lion_hf.LionForMaskedLM.from_pretrained(tmp_path, sparse_prediction=False)
    assert other(**inputs, labels=inputs["input_ids"]).logits.dim() == 3


def test_parts_of_a_batch_join_to_its_logits():
    """DataParallel splits a batch by rows and joins the outputs of its devices along the first dimension."""
    model, inputs = masked_lm(sparse_prediction=True), INPUTS["full"]()
    inputs["labels"] = labels_like(inputs["input_ids"])
    parts = [model(**{name: value[i : i + 1] for name, value in inputs.items()}).logits for i in range(2)]
    torch.testing.assert_close(torch.cat(parts), model(**inputs).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("index", [-100, 0])
def test_logits_have_the_rows_of_modernbert(index):
    transformers = pytest.importorskip("transformers")
    options = {"sparse_prediction": True, "sparse_pred_ignore_index": index, "hidden_size": 24, "vocab_size": 61}
    config = transformers.ModernBertConfig(
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, pad_token_id=0, **options
    )
    ids = torch.randint(1, 61, (2, 7))
    labels = torch.where(labels_like(ids) == -100, index, ids)
    theirs = transformers.ModernBertForMaskedLM(config)(input_ids=ids, labels=labels)
    options.pop("hidden_size")
    ours = build(lion_hf.LionForMaskedLM, **options)(input_ids=ids, labels=labels)
    assert ours.logits.shape == theirs.logits.shape == (int((labels != index).sum()), 61)
