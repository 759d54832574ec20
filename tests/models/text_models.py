"""Small text models with random biases, norms and decays, and inputs and labels for each head."""

import torch
from small_models import TEXT_HEADS, spread_decays, text_config, text_inputs

import lion_hf
from lion_hf.models import modeling_lion as modeling_lion


NAMES = {head.__name__: head for head in TEXT_HEADS}
HIDDEN = 24


def build(head, mask_type="selective", dtype=torch.float32, **options):
    """Return a model in which every weight has an effect: random biases and norms, different decays."""
    model = head(text_config(mask_type, **options)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return spread_decays(model).eval()


def inputs_for(head, batch=3, length=11):
    inputs = text_inputs(batch, length)
    if head is lion_hf.LionForMultipleChoice:
        inputs = {k: torch.stack([v, v.roll(1, 0)], 1) for k, v in inputs.items()}
    return inputs


def labels_for(head, batch=3, length=11):
    if head is lion_hf.LionForMaskedLM:
        labels = torch.randint(0, 61, (batch, length))
        labels[:, ::3] = -100
        return {"labels": labels}
    if head is lion_hf.LionForTokenClassification:
        return {"labels": torch.randint(0, 2, (batch, length))}
    if head is lion_hf.LionForQuestionAnswering:
        return {"start_positions": torch.tensor([0, 2, 4]), "end_positions": torch.tensor([3, 3, 4])}
    if head is lion_hf.LionModel:
        return {}
    return {"labels": torch.randint(0, 2, (batch,))}


def assert_same_model(actual, expected, inputs):
    """Check that weights are bit-equal, and outputs equal to rounding, which depends on the alignment of weights."""
    a, b = actual.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for x, y in zip(actual.eval()(**inputs).values(), expected.eval()(**inputs).values(), strict=True):
        torch.testing.assert_close(x, y)


def left_padded(inputs):
    """Return the same rows with their padding on the left."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    for row in range(len(ids)):
        shift = int((mask[row] == 0).sum())
        ids[row], mask[row] = ids[row].roll(shift), mask[row].roll(shift)
    return {"input_ids": ids, "attention_mask": mask}


def differentiable_sum(outputs):
    """Return a number that depends on every entry of every output."""
    tensors = [x for name, x in outputs.items() if name != "loss" and torch.is_tensor(x)]
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in tensors)
