"""Fused feature maps, and the two ways to the kernels: launched directly, or by operators of PyTorch."""

import functools

import pytest
import torch
from cases_triton import DEVICE, DTYPES, RESULTS, assert_close, inputs, lion_triton, run
from cases_triton import kernels as kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lion_hf.nn.features import FUNCTIONS, of_both
from lion_hf.ops import backend
from lion_hf.ops.api import bidirectional_linear_attention
from lion_hf.ops.triton import direct
from lion_hf.ops.triton import features as lion_features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, width", [("unit_silu", 20), ("unit_silu", 64), ("silu", 20), ("silu", 64)])
def test_features(name, width, dtype, monkeypatch):
    """Values and gradients of first and second order are correct for views with the strides of heads."""
    x = (3 * torch.randn(2, 19, 3, width)).to(DEVICE, dtype).transpose(1, 2)
    x[0, 0, 0], x[0, 0, 1] = 0, 1e-4
    x.requires_grad_()
    weight = torch.randn(x.shape).to(DEVICE)
    weight[0, 0, :2] /= 1000  # the slope of silu at 0 is 1 / sqrt(COSINE_EPS)

    def run(x, first_order):
        y = FUNCTIONS[name](x)
        (dx,) = torch.autograd.grad((y * weight).sum(), x, create_graph=not first_order)
        return [y, dx] if first_order else [torch.autograd.grad((dx * weight).sum(), x)[0]]

    results = run(x, True) + run(x, False)
    assert results[0].stride() == x.stride()
    monkeypatch.setattr(backend, "BACKEND", "torch")
    wide = x.detach().double().requires_grad_()
    expected = run(wide, True) + run(wide, False)
    assert_close(results, expected, dtype)
    for row in (0, 1):  # small beside the others
        assert_close([y[0, 0, row] for y in results[:2]], [y[0, 0, row] for y in expected[:2]], dtype)


@pytest.mark.parametrize("name", ["unit_silu", "silu"])
def test_one_launch_computes_the_features_of_query_and_key(name, monkeypatch):
    leaves, _ = inputs(35, "none", heads=3)
    query, key = leaves[0], leaves[1].detach().contiguous().requires_grad_()  # with other strides

    def run():
        features = of_both(name, query, key)
        weight = torch.linspace(-1, 1, query.numel(), device=DEVICE).view(query.shape)
        return [*features, *torch.autograd.grad(((features[0] - 2 * features[1]) * weight).sum(), (query, key))]

    grids = []
    launch = lion_features._launch
    monkeypatch.setattr(lion_features, "_launch", lambda kernel, *rest: grids.append(kernel) or launch(kernel, *rest))
    results = run()
    assert len(grids) == 2
    assert [x.stride() for x in results[:2]] == [query.stride(), key.stride()]
    (gradient,) = torch.autograd.grad(of_both(name, query.detach(), key)[1].sum(), key)
    monkeypatch.setattr(backend, "BACKEND", "torch")
    assert_close(results, [x.double() for x in run()])
    assert_close([gradient], [torch.autograd.grad(FUNCTIONS[name](key).sum(), key)[0].double()])


@pytest.mark.parametrize("name", ["unit_silu", "silu"])
def test_a_nan_stays_in_its_row_of_features(name):
    x = torch.randn(1, 2, 20, 16, device=DEVICE)
    x[0, 1, 3, 5] = torch.nan
    x.requires_grad_()
    y = FUNCTIONS[name](x)
    y.sum().backward()
    for t in (y, x.grad):
        assert t[0, 1, 3].isnan().all()
        assert t.isfinite().all(-1).sum() == 2 * 20 - 1


class Seen(TorchDispatchMode):
    """The names of all operators of PyTorch that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.name())
        return function(*arguments, **options or {})


@pytest.fixture(params=["direct", "operator"])
def route(request, monkeypatch):
    """Whether kernels are launched directly, or by the operators of PyTorch."""
    if request.param == "operator":
        monkeypatch.setattr(direct, "is_watched", lambda arguments: True)
    return request.param


@pytest.mark.parametrize("result", RESULTS)
def test_operators_and_direct_launches_compute_the_same(result, monkeypatch):
    leaves, mask = inputs(20, "token")
    leaves[:2] = [x.detach().requires_grad_() for x in leaves[:2]]

    def both():
        query, key = of_both("unit_silu", *leaves[:2])
        return run([query, key, *leaves[2:]], format="chunk", key_mask=mask, **RESULTS[result])

    with monkeypatch.context() as patch:
        for operator in (lion_triton._mix, lion_triton._mix_backward, lion_features._features):
            patch.setattr(operator, "operator", None)  # not called
        directly = both()
        with torch.no_grad():
            without_gradients = bidirectional_linear_attention(*leaves, key_mask=mask)
    with Seen() as seen:
        watched = both()
    launched = [name.split("::")[1] for name in seen.names if name.startswith("lion_hf")]
    assert launched == ["features", "mix", "mix_backward"]
    assert all(torch.equal(a, b) for a, b in zip(directly, watched, strict=True))
    assert torch.equal(without_gradients, bidirectional_linear_attention(*leaves, key_mask=mask))


def test_gradients_that_are_not_needed_are_not_there(route):
    leaves, _ = inputs(20, "token")
    query, key, value, gates = leaves[0].detach(), *leaves[1:]
    bidirectional_linear_attention(query, key, value, gates).sum().backward()
    assert query.grad is None and all(x.grad is not None for x in (key, value, gates))
    assert not bidirectional_linear_attention(*(x.detach() for x in leaves)).requires_grad


def test_gradients_of_a_batch_of_gradients(route):
    """`is_grads_batched` runs the backward pass inside torch.vmap."""
    leaves, _ = inputs(9, "token", heads=1)
    out = bidirectional_linear_attention(*leaves)
    weights = torch.randn(3, *out.shape, device=DEVICE)
    batched = torch.autograd.grad(out, leaves, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        single = torch.autograd.grad(out, leaves, weight, retain_graph=True)
        assert_close([x[i] for x in batched], [x.double() for x in single])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective"])
def test_activations_are_recomputed(how, route):
    """Checkpointing gives the same gradients, and policies of selective checkpointing find the operators."""
    leaves, _ = inputs(20, "token")
    found = []

    def policy(ctx, function, *arguments, **options):
        found.append(function.name())
        return CheckpointPolicy.MUST_SAVE if "::mix" in function.name() else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"use_reentrant": how == "reentrant"}
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpoint(bidirectional_linear_attention, *leaves, **options).sum().backward()
    expected = torch.autograd.grad(bidirectional_linear_attention(*leaves).sum(), leaves)
    assert all(torch.equal(x.grad, want) for x, want in zip(leaves, expected, strict=True))
    assert any("::mix" in name for name in found) == (how == "selective")


@pytest.mark.slow
def test_hooks_see_what_is_saved(route):
    leaves, _ = inputs(20, "token")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x.clone(), lambda x: x):
        results = run(leaves, format="chunk")
    assert {x.data_ptr() for x in leaves} <= {x.data_ptr() for x in kept}
    assert all(torch.equal(a, b) for a, b in zip(results, run(leaves, format="chunk"), strict=True))


def test_second_derivatives_are_refused(route):
    leaves, _ = inputs(5, "token")
    (gradient,) = torch.autograd.grad(bidirectional_linear_attention(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="do not support second derivatives.*attention_scores"):
        torch.autograd.grad(gradient.sum(), leaves[1])


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_outputs_may_be_changed_in_place(both, route):
    leaves, mask = inputs(20, "token")

    def gradients(change):
        out = bidirectional_linear_attention(*leaves, key_mask=mask, return_denominator=both)
        out = out if both else (out,)
        for x in out:
            x.add_(change)
        return torch.autograd.grad(sum(x.sum() for x in out), leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(1), gradients(0), strict=True))
