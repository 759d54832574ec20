"""Autograd, torch.func, tracing, abstract tensors, compilers and autocast see `two_sided_attention` as one function."""

import warnings

import pytest
import torch
from cases_two_sided import CONVENTIONS, FORMS, Maker, leaves_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from lion_hf.ops.api import two_sided_attention
from lion_hf.ops.reference import textbook_two_sided


BATCH, HEADS, LENGTH, D, E = 2, 4, 10, 3, 2
# Names of the tensors of each kind, with every kind of decay, and the options that go with them.
KINDS = {
    "heads": (("log_decay 1",), {"convention": "edge", "direction": "forward", "normalize": True}),
    "tokens": (("log_decay 3", "diagonal", "log_weight"), {"convention": "entered", "normalize": "clamp"}),
    "channels": (("log_decay 4", "backward_key"), {"convention": "between", "normalize": "mask"}),
    "two-sided": (
        ("log_decay 3", "backward_query", "backward_key", "backward_value", "backward_log_decay 2"),
        {"normalize": False, "return_denominator": True},
    ),
    "weights": (("log_decay 2", "log_weight", "backward_log_weight"), {"convention": "left", "normalize": True}),
}
every_case = pytest.mark.parametrize("kind, form", [(kind, form) for kind in KINDS for form in FORMS])


def tensors_of(kind, length=LENGTH, batch=BATCH):
    """Return the tensors of a kind, in the order of the names."""
    m, sizes = Maker(1), (batch, HEADS, length)
    tensors = {n: m.uniform(0.1, 1, batch, 2, length, D) for n in ("query", "key")} | {
        "value": m.uniform(-1, 1, *sizes, E)
    }
    for name in KINDS[kind][0]:
        word, _, rank = name.partition(" ")
        if rank:
            tensors[word] = m.log_decay(int(rank), "mild", *sizes, D) - 0.01
        elif word.endswith(("query", "key")):
            tensors[word] = m.uniform(0.1, 1, batch, 2, length, D)
        else:
            tensors[word] = m.uniform(0.1, 1, *sizes, *([E] if word.endswith("value") else []))
    return tensors


def operator(kind, form, masked=True, function=two_sided_attention):
    names = ("query", "key", "value", *(n.partition(" ")[0] for n in KINDS[kind][0]))
    options = dict(KINDS[kind][1])
    if function is two_sided_attention:
        options |= {"format": form, "chunk_size": 4}

    def run(*tensors):
        length = tensors[0].shape[2]
        mask = torch.arange(length) < torch.tensor([[max(1, length - 3)], [length]]) if masked else None
        return function(**dict(zip(names, tensors, strict=True)), key_mask=mask, **options)

    return run


def loss_of(function):
    return lambda *tensors: sum(y.sin().sum() for y in leaves_of(function(*tensors)))


def by_autograd(loss, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


def tangents_of(tensors):
    return tuple(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in tensors)


def close(actual, expected, tolerance=1e-9):
    actual, expected = (torch.utils._pytree.tree_leaves(x) for x in (actual, expected))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_case
def test_gradients_of_batches_samples_and_ensembles(kind, form):
    function, inputs = operator(kind, form), list(tensors_of(kind).values())
    places, loss = tuple(range(len(inputs))), loss_of(operator(kind, form))
    close(grad(loss, places)(*inputs), by_autograd(loss, inputs))

    single = loss_of(operator(kind, form, masked=False))
    dims = tuple(None if x.dim() < 3 else 0 for x in inputs)

    def loss_of_row(*row):
        return single(*(x if dim is None else x[None] for x, dim in zip(row, dims, strict=True)))

    rows = [by_autograd(loss_of_row, [x if x.dim() < 3 else x[i] for x in inputs]) for i in range(BATCH)]
    close(vmap(grad(loss_of_row, places), dims)(*inputs), [torch.stack(x) for x in zip(*rows, strict=True)])

    members = [torch.stack([x, x / 2]) for x in inputs]
    each = [by_autograd(loss, [x[i] for x in members]) for i in range(2)]
    close(vmap(grad(loss, places))(*members), [torch.stack(x) for x in zip(*each, strict=True)])
    close([y[1] for y in leaves_of(vmap(function)(*members))], leaves_of(function(*(x[1] for x in members))))


@every_case
def test_forward_mode_and_second_derivatives(kind, form):
    function, inputs = operator(kind, form), list(tensors_of(kind).values())
    textbook = operator(kind, form, function=textbook_two_sided)
    tangents, places, loss = tangents_of(inputs), tuple(range(len(inputs))), loss_of(function)

    pushed = jvp(function, tuple(inputs), tangents)[1]
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        close([forward_ad.unpack_dual(y).tangent for y in leaves_of(dual)], pushed)
    leaves = [x.clone().requires_grad_() for x in inputs]
    # <w, J t> is the derivative of <J^T w, t>, by reverse mode alone.
    outputs = leaves_of(textbook(*leaves))
    weights = [torch.ones_like(y).requires_grad_() for y in outputs]
    pulled = torch.autograd.grad(outputs, leaves, weights, create_graph=True)
    close(torch.autograd.grad(sum((g * t).sum() for g, t in zip(pulled, tangents, strict=True)), weights), pushed)

    def twice(loss):
        gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)), leaves)

    expected = twice(loss_of(textbook))
    close(twice(loss), expected)
    close(jvp(grad(loss, places), tuple(inputs), tangents)[1], expected)


@every_case
def test_meta_and_fake_tensors_have_the_shapes_of_results(kind, form):
    function, inputs = operator(kind, form, masked=False), list(tensors_of(kind).values())

    def shapes(inputs):
        leaves = [x.requires_grad_() for x in inputs]
        outputs = leaves_of(function(*leaves))
        gradients = torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
        return [(x.shape, x.dtype) for x in (*outputs, *gradients)]

    expected = shapes([x.clone() for x in inputs])
    assert shapes([x.to("meta") for x in inputs]) == expected
    with FakeTensorMode() as mode:
        assert shapes([mode.from_tensor(x) for x in inputs]) == expected


@every_case
def test_traced_graphs_are_right_for_other_values_and_lengths(kind, form):
    function = operator(kind, form, masked=False)
    inputs, others = (list(tensors_of(kind, length).values()) for length in (LENGTH, 13))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(function, tuple(inputs), check_trace=False)
    halves = [x / 2 for x in inputs]
    close(graph(*halves), function(*halves))
    if form == "attention":
        close(graph(*others), function(*others))


@pytest.mark.parametrize(
    "kind, form", [(kind, FORMS[i % 3]) for i, kind in enumerate(("tokens", "two-sided", "channels"))]
)
@pytest.mark.parametrize("mode", ["fake", "real"])
def test_recorded_gradients_are_right_for_other_values(mode, kind, form):
    inputs = list(tensors_of(kind, 6, 1).values())
    loss = loss_of(operator(kind, form, masked=False))
    recorded = make_fx(grad(loss, tuple(range(len(inputs)))), tracing_mode=mode)(*inputs)
    halves = [x / 2 for x in inputs]
    close(recorded(*halves), by_autograd(loss, halves))


@every_case
def test_autocast_neither_lowers_precision_nor_breaks_gradients(kind, form):
    function, inputs = operator(kind, form), [x.float() for x in tensors_of(kind).values()]

    def run(enabled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = leaves_of(function(*leaves))
        return *outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("convention, form", zip(CONVENTIONS, (*FORMS, "chunk"), strict=True))
def test_gradcheck(convention, form):
    tensors = tensors_of("two-sided", 5, 1) | {"log_weight": Maker(3).uniform(-1, 1, 1, HEADS, 5)}
    leaves = [
        x[:, :2].clone().requires_grad_() if x.dim() > 2 else x[:2].clone().requires_grad_() for x in tensors.values()
    ]

    def function(*leaves):
        options = {"convention": convention, "format": form, "chunk_size": 2, "normalize": True}
        return two_sided_attention(**dict(zip(tensors, leaves, strict=True)), **options)

    assert torch.autograd.gradcheck(function, leaves)


# With chunks of 4: one chunk, full chunks, a last chunk that is not full, many chunks.
LENGTHS = (7, 9, 12, 4, 5, 3, 1, 2, 8, 16, 17, 23, 64, 257)


def graphs():
    for kind in KINDS:
        for form in (*FORMS, "auto"):
            for training in (False, True) if form == "chunk" else (False,):
                name = f"{kind}-{form}-{training}"
                yield pytest.param(kind, form, training, LENGTHS, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind, form, training, lengths", graphs())
def test_many_lengths_make_six_graphs_at_most(kind, form, training, lengths):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    function, eager = operator(kind, form, masked=False), operator(kind, "attention", masked=False)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in lengths:
        inputs = [x.requires_grad_(training) for x in tensors_of(kind, length).values()]
        actual, expected = leaves_of(compiled(*inputs)), leaves_of(eager(*inputs))
        close(actual, expected)
        if training:
            close(*(torch.autograd.grad(sum(y.sin().sum() for y in x), inputs) for x in (actual, expected)))
    assert counter.frame_count <= 6
    torch.compiler.reset()
