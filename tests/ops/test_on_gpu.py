"""The general operator and every variant on a GPU, where they run in PyTorch, against the same on a CPU."""

import copy

import pytest
import torch
from cases_two_sided import FORMS, assert_same, cases, make, with_gradients
from hypothesis import given, settings

from lion_hf.nn import Mixer
from lion_hf.nn.registry import VARIANTS
from lion_hf.ops import two_sided_attention
from lion_hf.ops.reference import textbook_two_sided


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(x):
    return x.cuda() if torch.is_tensor(x) else x


@settings(max_examples=150)
@given(case=cases())
def test_forms_equal_the_textbook(case):
    tensors, options = make(case)
    expected = with_gradients(textbook_two_sided, tensors, options)

    def operator(**arguments):
        out = two_sided_attention(**{name: on_gpu(x) for name, x in arguments.items()})
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()

    for form in FORMS:
        own = options | {"format": form, "chunk_size": case["chunk_size"]}
        assert_same(with_gradients(operator, tensors, own), expected, what=form)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 6e-2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_themselves_on_a_cpu(variant, dtype, tolerance):
    """A mixer in float32, and in bfloat16 autocast, with padding, against float64."""
    mixer = Mixer(64, 4, variant).double()
    x, mask = torch.randn(2, 150, 64, dtype=torch.double), torch.ones(2, 150, dtype=torch.bool)
    mask[0, 100:] = mask[1, 40:50] = False
    weight = torch.randn_like(x)

    def run(mixer, x, weight, mask):
        x = x.clone().requires_grad_()
        out = mixer(x, key_mask=mask)
        out = out[0] if isinstance(out, tuple) else out
        dx, *rest = torch.autograd.grad((out.double() * weight).sum(), [x, *mixer.parameters()])
        return out, dx, torch.cat([gradient.flatten() for gradient in rest])

    expected = run(mixer, x, weight, mask)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = run(copy.deepcopy(mixer).float().cuda(), x.float().cuda(), weight.cuda(), mask.cuda())
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        assert (a.double().cpu() - b).norm() <= tolerance * b.norm().clamp(min=0.1)
