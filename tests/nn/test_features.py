"""Feature maps and layers in every precision: values and gradients are close to those of float64."""

import pytest
import torch
from torch.nn import functional as F

from lion_hf.nn import Mixer
from lion_hf.nn.features import COSINE_EPS, FUNCTIONS


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

DEFINITIONS = {
    "identity": lambda x: x,
    "elu": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
    "unit_silu": lambda x: F.normalize(F.silu(x) + 0.5, dim=-1),
    "silu": lambda x: F.silu(x) / (F.silu(x).square().sum(-1, keepdim=True) + COSINE_EPS).sqrt(),
}


def with_gradient(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    y.backward(dy.to(y.dtype))
    return y.detach().double(), x.grad.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_cancels_in_any_precision(name, dtype):
    """Errors are relative to each number, or to the row if the map normalises rows.

    The smallest x is -9, because exp(x) is subnormal in float16 below -9.7.
    """
    x = torch.linspace(-9, 6, 512).to(dtype).view(32, 16)[:, torch.arange(16).roll(3)]
    dy = torch.linspace(0.5, 2, 512).to(dtype).view(32, 16)
    actual = with_gradient(FUNCTIONS[name], x, dy)
    expected = with_gradient(DEFINITIONS[name], x.double(), dy.double())
    for what, a, b in zip(("output", "gradient"), actual, expected, strict=True):
        scale = b.norm(dim=-1, keepdim=True) if "silu" in name else b.abs()
        if "silu" in name and what == "gradient":  # the component along the output cancels
            scale = scale.maximum(dy.double().norm(dim=-1, keepdim=True) / 4)
        error = ((a - b).abs() / scale).max().item()
        assert error <= 2 * torch.finfo(dtype).eps, f"{what}: {error:.1e}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_feature_maps_have_derivatives_of_first_and_second_order(name):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FUNCTIONS[name], x)
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], x)
    x.data[0] = 0  # the two branches of elu meet here
    y, gradient = with_gradient(FUNCTIONS[name], x, torch.ones(3, 5))
    torch.testing.assert_close(y, DEFINITIONS[name](x.detach()))
    expected = with_gradient(DEFINITIONS[name], x, torch.ones(3, 5))[1]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["elu", "unit_silu", "silu"])
@pytest.mark.parametrize("bias", [-6.0, 0.0])
def test_a_layer_under_autocast_is_as_precise_as_its_projections(name, bias, dtype):
    mixer = Mixer(32, 2, "lit", feature_map=name)
    with torch.no_grad():
        mixer.q_proj.bias.fill_(bias)
        mixer.k_proj.bias.fill_(bias)
    x = torch.randn(2, 20, 32)

    def run():
        mixer.zero_grad()
        y = mixer(x)
        y.float().square().sum().backward()
        return [y.detach().float(), mixer.q_proj.weight.grad, mixer.v_proj.weight.grad]

    expected = run()
    with torch.autocast("cpu", dtype):
        actual = run()
    # The features of -6 change by as much as the rounding of -6.
    tolerances = (0.02, 0.1, 0.02) if dtype == torch.bfloat16 else (0.004, 0.02, 0.004)
    for a, b, tolerance in zip(actual, expected, tolerances, strict=True):
        assert (a - b).norm() / b.norm() <= tolerance


def test_elu_keeps_its_output_alone():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = FUNCTIONS["elu"](torch.randn(4, 5, requires_grad=True))
    assert [x.data_ptr() for x in kept] == [y.data_ptr()]
