"""Decays per channel: all forms equal the definition with every gradient, in linear memory and without denormals."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lion_hf.ops import diagonal, diagonal_walk
from lion_hf.ops.dense import dense_scores
from lion_hf.ops.diagonal import chunk_tokens, diagonal_scan
from lion_hf.ops.halving import FACTOR_CUT
from lion_hf.ops.sides import Side


FORMS = ("attention", "chunk", "rnn")
SIDES = {False: (False,), True: (True,), None: (False, True)}
HEADS, WIDTH, VALUES = 2, 3, 4


SHARES = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))


def defined(query, key, value, gates, own=None, *, reverse, shares=(0.0, 0.0), scale=1.0):
    """Compute the operator from the weights of all pairs and channels."""
    gates = gates.clamp(min=-746.0)
    sides = [Side(gates, shares[0] * gates, shares[1] * gates, side) for side in SIDES[reverse]]
    y = sum(torch.matmul(dense_scores(query, key, side), value) for side in sides)
    return scale * (y if own is None else y + (own * (query * key).sum(-1)).unsqueeze(-1) * value)


def weights(batch, length, dtype=torch.float64):
    """Return weights with which tokens read themselves, some of them 0."""
    own = torch.randn(batch, HEADS, length, generator=torch.Generator().manual_seed(length), dtype=dtype)
    return own.masked_fill(own < -1, 0).requires_grad_()


def operands(seed, batch, length, shared=False, constant=False, dtype=torch.float64, width=WIDTH, values=VALUES):
    """Return query, key, value, gates of all sizes, from 0 to -inf, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    shape = 1 if shared else batch, HEADS, 1 if constant else length, width
    uniform = torch.rand(*shape, generator=generator, dtype=dtype)
    kind = torch.rand(*shape, generator=generator)
    gates = (-(10 ** (4 * uniform - 3))).masked_fill(kind < 0.1, 0).masked_fill(kind > 0.95, -math.inf)
    tensors = [normal(batch, HEADS, length, n) for n in (width, width, values)]
    return [x.requires_grad_() for x in (*tensors, gates)], normal(batch, HEADS, length, values)


def results(function, tensors, d_out):
    y = function(*tensors)
    return y, *torch.autograd.grad(y, tensors, d_out)


def assert_close(actual, expected, tolerance=1e-10):
    actual, expected = (tree_leaves(x) for x in (actual, expected))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@st.composite
def problems(draw):
    chunk_size = draw(st.integers(1, 17))
    near = [1, 2, 13, chunk_size, chunk_size + 1, max(1, chunk_size - 1), 2 * chunk_size + 1]
    length = draw(st.sampled_from(near) | st.integers(1, 40))
    return (
        draw(st.integers(0, 1000)), draw(st.integers(1, 3)), length, draw(st.booleans()), draw(st.booleans()),
        chunk_size, draw(st.sampled_from(FORMS)), draw(st.sampled_from((False, True, None))), draw(st.booleans()),
        draw(st.sampled_from(SHARES)), draw(st.sampled_from((None, 1, 0))), draw(st.sampled_from((1.0, 0.3))),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(problems())
def test_forms_equal_the_definition_with_every_gradient(problem):
    seed, batch, length, shared, constant, chunk_size, form, reverse, one_by_one, shares, rows, scale = problem
    tensors, d_out = operands(seed, batch, length, shared, constant)
    tensors += [] if rows is None else [weights(rows or batch, length)]
    options = {"reverse": reverse, "shares": shares, "scale": scale}

    def run(query, key, value, gates, *own):
        gates = gates.expand(-1, -1, length, -1)
        return diagonal_scan(query, key, value, gates, *own, form=form, chunk_size=chunk_size, **options)

    def define(query, key, value, gates, *own):
        return defined(query, key, value, gates.expand(-1, -1, length, -1), *own, **options)

    with pytest.MonkeyPatch.context() as patch:
        if one_by_one:  # a chunk of one row of the batch at a time
            patch.setattr(diagonal_walk, "GROUP_ELEMENTS", 1)
        actual = results(run, tensors, d_out)
    assert_close(actual, results(define, tensors, d_out))


@pytest.mark.parametrize("reverse", [False, True, None])
@pytest.mark.parametrize("length, chunk_size", [(3, 4), (13, 4), (9, 1)])
def test_all_chunks_at_once_equal_the_definition(monkeypatch, length, chunk_size, reverse):
    """As on accelerators and in graphs."""
    monkeypatch.setattr(diagonal, "_walks", lambda query, form: False)
    for shared, shares in itertools.product((False, True), SHARES):
        tensors, d_out = operands(length, 2, length, shared)
        tensors += [weights(1 if shared else 2, length)] if shares[0] else []
        options = {"reverse": reverse, "shares": shares, "scale": 2.0}

        def run(*tensors, options=options):
            return diagonal_scan(*tensors, form="chunk", chunk_size=chunk_size, **options)

        def define(*tensors, options=options):
            return defined(*tensors, **options)

        assert_close(results(run, tensors, d_out), results(define, tensors, d_out))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_single_precision_is_close_to_double(form, shares):
    tensors, d_out = operands(0, 1, 150, width=16)
    with torch.no_grad():
        tensors[3].clamp_(min=-5)
    tensors.append(weights(1, 150))
    single = [x.detach().float().requires_grad_() for x in tensors]

    def run(*tensors):
        return diagonal_scan(*tensors, reverse=None, form=form, chunk_size=16, shares=shares)

    actual, expected = results(run, single, d_out.float()), results(run, tensors, d_out)
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).abs().max() < 1e-5 * b.abs().max()


def test_any_strides_and_wider_gates():
    tensors, d_out = operands(1, 2, 21, dtype=torch.float32)

    def run(*tensors):
        return diagonal_scan(*tensors, reverse=None, form="chunk", chunk_size=8)

    expected = results(run, tensors, d_out)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    expanded = d_out[:1, :1].expand(2, HEADS, -1, -1)
    assert_close(results(run, strided, d_out), expected, 0)
    assert_close(results(run, strided, expanded), results(run, tensors, expanded.contiguous()), 0)
    wide = [*tensors[:3], tensors[3].detach().double().requires_grad_()]
    actual = results(run, wide, d_out)
    assert actual[0].dtype == torch.float32 and actual[4].dtype == torch.float64
    assert_close([x.float() for x in actual], expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 2, 0, 3)])
def test_empty_inputs(form, shape):
    tensors = [torch.zeros(shape, requires_grad=True) for _ in range(4)]
    y = diagonal_scan(*tensors, reverse=None, form=form, chunk_size=4)
    assert y.shape == shape
    assert all(x.shape == shape for x in torch.autograd.grad(y.sum(), tensors))


def test_closed_gates_separate_and_have_no_gradient():
    """Nothing passes a token whose gates are -inf, but its neighbours still read it and each other up to it."""
    tensors, d_out = operands(2, 1, 20)
    with torch.no_grad():
        tensors[3].clamp_(min=-1)[:, :, 9] = -math.inf

    def run(*tensors):
        return diagonal_scan(*tensors, reverse=False, form="chunk", chunk_size=4)

    y, *grads = results(run, tensors, d_out)
    assert (grads[3][:, :, 9] == 0).all()
    with torch.no_grad():
        tensors[2][:, :, :9] += 1
        changed = run(*tensors)
    assert torch.equal(changed[:, :, 10:], y[:, :, 10:])
    assert not torch.equal(changed[:, :, 9], y[:, :, 9])


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_what_reads_it(form):
    tensors, _ = operands(3, 2, 12)
    with torch.no_grad():
        tensors[3].clamp_(min=-1)
        tensors[2][0, 0, 4] = math.nan
    y = diagonal_scan(*tensors, reverse=False, form=form, chunk_size=4)
    assert y[0, 0, 5:].isnan().all() and not y[0, 1].isnan().any() and not y[1].isnan().any()


class Results(TorchDispatchMode):
    """Record, of all operations, the largest result and those with denormal numbers."""

    def __init__(self):
        super().__init__()
        self.largest, self.denormal = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.largest = max(self.largest, x.numel())
                view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
                if "empty" not in name and not view:
                    count = int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum())
                    if count:
                        self.denormal[name] = self.denormal.get(name, 0) + count
        return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at_once", [False, True])
def test_no_tensor_has_an_entry_for_every_pair_and_channel(form, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(diagonal, "_walks", lambda query, form: False)
    length, width = 128, 16
    tensors, d_out = operands(0, 1, length, width=width, values=width)
    with Results() as seen:
        y = diagonal_scan(*tensors, reverse=None, form=form, chunk_size=16)
        torch.autograd.grad(y, tensors, d_out)
    states = HEADS * width * (length // 16 + 1) * width
    assert seen.largest <= max(HEADS * length * length, states, HEADS * length * width)


def sizes(generator, *shape, small):
    """Return numbers with sizes from 1e-3 to 1e3, or from 1e-3 to 2e-3 and of one sign, which cannot cancel."""
    uniform = torch.rand(*shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return 1e-3 * (1 + uniform) if small else 10 ** (6 * uniform - 3) * signs


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_is_computed_is_denormal(form, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(diagonal, "_walks", lambda query, form: False)
    length = 101
    kinds = itertools.product((False, True), ("all", "some", "first"), ("all", "first"))
    for (small, keys, rows), shares in zip(kinds, itertools.cycle(SHARES), strict=False):
        generator = torch.Generator().manual_seed(0)
        shape = 1, 4, length, 8
        query, key, value, d_out = (sizes(generator, *shape, small=small) for _ in range(4))
        strength = 10 ** (4 * torch.rand(shape, generator=generator) - torch.tensor([4.0, 3.0, 2.3, 1.0]).view(4, 1, 1))
        gates = -strength.masked_fill(torch.rand(shape, generator=generator) < 0.02, math.inf)
        masked = {"all": [], "some": range(5, 80), "first": range(1, length)}[keys]
        key[:, :, list(masked)] = 0
        value[:, :, list(masked)] = 0
        if rows == "first":
            d_out[:, :, 1:] = 0
        own = torch.ones(1, 4, length)
        tensors = [x.requires_grad_() for x in (query, key, value, gates, own)]
        with Results() as seen:
            diagonal_scan(*tensors, reverse=None, form=form, chunk_size=8, shares=shares).backward(d_out)
        assert not seen.denormal, (small, keys, rows, shares)


@pytest.mark.parametrize("form", FORMS)
def test_a_root_is_read_where_the_decay_itself_is_cut(form):
    """A token reads its neighbour with the root of its decay, and the gate of it has a gradient."""
    tensors, d_out = ([x.float().requires_grad_() for x in y] for y in operands(5, 1, 6))
    d_out = d_out[0].detach().expand(1, -1, -1, -1)
    with torch.no_grad():
        tensors[3].fill_(0)[:, :, 3] = 1.2 * FACTOR_CUT[torch.float32]

    def run(*tensors):
        return diagonal_scan(*tensors, reverse=False, form=form, chunk_size=4, shares=(0.5, 0.5))

    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = results(lambda *x: defined(*x, reverse=False, shares=(0.5, 0.5)), wide, d_out.double())
    actual = results(run, tensors, d_out)
    for a, b in ((actual[0][:, :, 3], expected[0][:, :, 3]), (actual[4][:, :, 3], expected[4][:, :, 3])):
        assert (b != 0).all()
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_read_until_its_factors_are_cut(form):
    """A state of which nothing is left is 0, however many chunks it crosses."""
    distance, cut = 40, FACTOR_CUT[torch.float32]
    x = torch.ones(1, 1, distance + 2, 1)
    key = torch.zeros_like(x)
    key[:, :, 0] = 1
    for share, seen in ((0.99, True), (2.02, False)):
        gates = torch.full_like(x, share * cut / distance)
        y = diagonal_scan(x, key, x, gates, reverse=False, form=form, chunk_size=4)[0, 0, :, 0]
        assert (y[1 : distance // 3] > 0).all()
        assert bool(y[-1] != 0) == seen


def transforms(function, tensors, tangents):
    """Yield derivatives of a function of four or five tensors by torch.func, forward mode and twice by autograd."""
    places, many = tuple(range(len(tensors))), [torch.stack([x, x / 2]) for x in tensors]

    def loss(*tensors):
        return function(*tensors).sin().sum()

    yield jvp(function, tuple(tensors), tangents)
    yield vmap(function)(*many)
    yield grad(loss, places)(*tensors)
    yield vmap(grad(loss, places))(*many)
    yield vmap(grad(loss, places), (0, 0, 0, *(None,) * len(tensors[3:])))(*many[:3], *tensors[3:])
    moved = many[0], tensors[1], many[2].movedim(0, 1), many[3].movedim(0, 3), *(x.movedim(0, 2) for x in many[4:])
    yield vmap(grad(loss, places), (0, None, 1, 3, 2)[: len(tensors)])(*moved)
    yield jvp(grad(loss, places), tuple(tensors), tangents)
    leaves = [x.clone().requires_grad_() for x in tensors]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    yield torch.autograd.grad(sum((g * t).sum() for g, t in zip(first, tangents, strict=True)), leaves)


@pytest.mark.parametrize("shares, own", [((0.0, 0.0), False), ((0.0, 1.0), True), ((0.5, 0.5), True)])
@pytest.mark.parametrize("shared", [False, True])
def test_transforms_agree_with_those_of_the_definition(shared, shares, own):
    options = {"reverse": None, "shares": shares, "scale": 2.0 if own else 1.0}

    def run(*tensors):
        return diagonal_scan(*tensors, form="chunk", chunk_size=4, **options)

    def define(*tensors):
        return defined(*tensors, **options)

    for closed in (False, True):
        tensors = [x.detach() for x in operands(4, 2, 9, shared)[0]]
        tensors += [weights(1 if shared else 2, 9).detach()] if own else []
        tensors[3] = tensors[3].clamp(min=-2) - 0.1
        if closed:
            tensors[3][:, 0, 5] = -math.inf
        tangents = tuple(torch.randn_like(x) for x in tensors)
        for actual, expected in zip(*(transforms(f, tensors, tangents) for f in (run, define)), strict=True):
            assert_close(actual, expected, 1e-9)


# With chunks of 4: one chunk, full chunks, a last chunk that is not full, and more chunks than `propagate` groups.
LENGTHS = (7, 9, 12, 4, 5, 3, 1, 2, 8, 16, 17, 23, 64, 257, 256, 260, 300, 31, 6, 513)


@pytest.mark.parametrize(
    "training, lengths, graphs",
    [
        pytest.param(True, LENGTHS, 6, id="training"),
        pytest.param(False, LENGTHS, 6, id="inference"),
    ],
)
@pytest.mark.slow
def test_many_lengths_make_few_graphs(training, lengths, graphs):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")

    def run(*tensors):
        return diagonal_scan(*tensors, reverse=None, form="chunk", chunk_size=4, shares=(0.0, 1.0))

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for length in lengths:
        tensors, d_out = operands(length, 2, length)
        tensors.append(weights(1, length))
        if training:
            assert_close(results(compiled, tensors, d_out), results(run, tensors, d_out))
        else:
            tensors = [x.detach() for x in tensors]
            assert_close(compiled(*tensors), run(*tensors))
    assert counter.frame_count <= graphs
    torch.compiler.reset()


def test_traces_serve_every_length():
    def run(*tensors):
        return diagonal_scan(*tensors, reverse=None, form="chunk", chunk_size=4, shares=(0.0, 1.0))

    example = [x.detach() for x in (*operands(0, 2, 9)[0], weights(2, 9))]
    traced = torch.jit.trace(run, example, check_trace=False)
    for length in (9, 1, 4, 23):
        tensors, d_out = operands(length, 2, length)
        tensors.append(weights(2, length))
        assert_close(results(traced, tensors, d_out), results(run, tensors, d_out))


@pytest.mark.parametrize("form", FORMS)
def test_shapes_on_the_meta_device(form):
    tensors, _ = operands(0, 2, 9, shared=True)
    tensors = [x.detach().to("meta").requires_grad_() for x in tensors]
    y = diagonal_scan(*tensors, reverse=None, form=form, chunk_size=4)
    assert y.shape == (2, HEADS, 9, VALUES)
    assert [x.shape for x in torch.autograd.grad(y.sum(), tensors)] == [x.shape for x in tensors]


def test_chunks_have_the_largest_power_of_two_below_their_maximum():
    assert [chunk_tokens("chunk", 1000, n) for n in (1, 2, 3, 63, 64, 65)] == [1, 2, 2, 32, 64, 64]
    assert [chunk_tokens("attention", n, 4) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    assert chunk_tokens("chunk", 5, 64) == 8
    assert chunk_tokens("rnn", 2**14, 64) == 64 and chunk_tokens("rnn", 2**14, 64, backward=True) == 128
