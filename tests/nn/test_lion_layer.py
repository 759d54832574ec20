import pytest
import torch
from torch.nn import functional as F

from lion_hf.nn import Mixer
from lion_hf.nn.features import FUNCTIONS


def feature_map(mask_type):
    return FUNCTIONS[Mixer(16, 2, mask_type).feature_map]


def by_the_paper(mask_type, x):
    """Return the features of the paper: elu + 1 without decay, silu + 1/2 normalised to length 1 with decay."""
    if mask_type == "lit":
        return F.elu(x) + 1
    shifted = F.silu(x) + 0.5
    return shifted / shifted.square().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_the_feature_map_and_its_gradient_are_those_of_the_paper(mask_type):
    x = (4 * torch.randn(2, 3, 5, 8, dtype=torch.float64)).transpose(1, 2).requires_grad_()
    weight = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    actual, expected = feature_map(mask_type)(x), by_the_paper(mask_type, x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(feature_map(mask_type), x)


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_the_feature_map_has_a_second_derivative_for_what_is_built_on_the_attention_matrix(mask_type):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(feature_map(mask_type), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_feature_map_rounds_once_in_half_precision(dtype):
    x = (4 * torch.randn(2, 3, 5, 8)).to(dtype).requires_grad_()
    y = feature_map("selective")(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), by_the_paper("selective", x.double()), rtol=torch.finfo(dtype).eps, atol=1e-6
    )
    y.sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_features_are_finite_at_the_extremes():
    x = torch.tensor([[-1e30, -1.278, 0.0, 1e18]], requires_grad=True)  # silu has its minimum at -1.278
    for features in (x, x[:, :2], x[:, 1:2]):
        y = feature_map("decay")(features)
        assert y.isfinite().all()
        torch.testing.assert_close(y.norm(dim=-1), torch.ones(1))
