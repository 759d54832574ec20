"""No form computes a number below the smallest normal one, forward or backward: CPUs are slow there."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lion_hf.ops import averaged_scans, bidirectional_linear_attention, chunk, masks, snake_orders
from lion_hf.ops.decays import CUT


FORMS = ("attention", "rnn", "chunk")


class Denormals(TorchDispatchMode):
    """Count, by operation, the results between 0 and the smallest normal number of their dtype."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func._schema.name.startswith("aten::empty") and not func._schema.name.startswith("aten::new_empty"):
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.is_floating_point() and not _is_view(func):
                    tiny = torch.finfo(x.dtype).tiny
                    count = int(((x != 0) & (x.abs() < tiny)).sum())
                    if count:
                        self.found[str(func)] = self.found.get(str(func), 0) + count
        return out


def _is_view(func):
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def numbers(generator, *shape, small, positive=False):
    """Return numbers with sizes from 1e-3 to 1e3, uniform in the logarithm, or from 1e-3 to 2e-3 if small.

    Small numbers have one sign, because a sum of nearly equal numbers can cancel to any small rounding error.
    """
    uniform = torch.rand(*shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return 1e-3 * (1 + uniform) if small else 10 ** (6 * uniform - 3) * (1 if positive else signs)


def decays(kind, generator, batch, heads, length):
    """Return weak and strong log-decays per head, or per token with some of -inf."""
    if kind == "head":
        return -torch.tensor([0.05, 0.3, 1.2, 30.0])[:heads]
    weak = torch.rand(batch, heads, length, generator=generator)
    strong = 10 ** (4 * torch.rand(batch, heads, length, generator=generator) - 2.3)
    gates = torch.where(torch.arange(heads)[:, None] % 2 == 0, weak, strong)
    closed = torch.rand(batch, heads, length, generator=generator) < torch.tensor([0.0, 0.0, 0.3, 0.3])[:heads, None]
    return -gates.masked_fill(closed, math.inf)


def key_masks(length):
    """Return one row each that masks nothing, the end, the beginning, all but the first token, and everything."""
    token = torch.arange(length)
    always = token >= 0
    return torch.stack([always, token < length // 3, token >= 2 * length // 3, token == 0, ~always])


def found(function, tensors, gates, d_out):
    inputs = [x.requires_grad_() for x in (*tensors, *gates)]
    with Denormals() as denormals:
        function(*inputs[:3], inputs[3:]).backward(d_out)
    return denormals.found


@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masks"])
@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("normalize", [False, True], ids=["numerator", "normalized"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_is_computed_is_denormal(form, normalize, kind, masked):
    heads, length, width = 4, 101, 8
    mask = key_masks(length) if masked else None
    batch = len(mask) if masked else 1
    for rows, small in itertools.product(("all", "first"), (False, True)):
        generator = torch.Generator().manual_seed(0)
        shape = batch, heads, length, width
        dtype = torch.bfloat16 if (rows == "all") == small else torch.float32
        tensors = [numbers(generator, *shape, small=small, positive=normalize).to(dtype) for _ in range(3)]
        gates = decays(kind, generator, batch, heads, length)
        d_out = numbers(generator, *shape, small=small).to(dtype)
        if rows == "first":  # a loss of the first token only
            d_out[:, :, 1:] = 0

        def run(q, k, v, gates):
            options = {"format": form, "chunk_size": 9, "normalize": normalize, "key_mask": mask}
            return bidirectional_linear_attention(q, k, v, *gates, **options)

        assert not found(run, tensors, [gates], d_out), (rows, small)


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_denormal_in_several_scans(form, kind):
    batch, heads, length, width = 1, 4, 101, 8
    orders = snake_orders(10, 10)
    for small, normalize in ((False, True), (True, False)):
        generator = torch.Generator().manual_seed(0)
        shape = batch, heads, length, width
        tensors = [numbers(generator, *shape, small=small, positive=normalize) for _ in range(3)]
        gates = [decays(kind, generator, batch, heads, length) for _ in orders]
        d_out = numbers(generator, *shape, small=small)

        def run(*inputs, normalize=normalize):
            return averaged_scans(*inputs, orders, format=form, chunk_size=9, normalize=normalize)

        assert not found(run, tensors, gates, d_out), (small, normalize)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_nothing_is_denormal_where_groups_of_chunks_are_linked(kind, monkeypatch):
    monkeypatch.setattr(chunk, "PROPAGATION_GROUP", 2)
    for normalize, masked in itertools.product((False, True), (False, True)):
        test_nothing_that_is_computed_is_denormal("chunk", normalize, kind, masked)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_key_is_read_up_to_the_documented_distance(form, chunk_size, normalize):
    """A row whose only key is beyond the cut returns 0 in every form."""
    distance = 20
    x = torch.ones(1, 2, distance + 1, 2)
    mask = torch.arange(distance + 1)[None] == 0
    gates = torch.tensor([0.99, 1.01]) * CUT[torch.float32] / distance

    def run(x, gates):
        options = {"format": form, "chunk_size": chunk_size, "normalize": normalize, "key_mask": mask}
        return bidirectional_linear_attention(x, x, x, gates, **options)

    y = run(x, gates)
    assert (y[0, 0] != 0).all()
    assert (y[0, 1, :distance] != 0).all() and (y[0, 1, distance] == 0).all()
    z = run(x.double(), gates.double())  # the cut of float64 is further away
    assert (z != 0).all()
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("length, calls", [(9, 0), (30, 2)])
@pytest.mark.parametrize("shape", [(2,), (3, 2, None)], ids=["head", "token"])
def test_factors_are_made_where_chunks_exchange_states_and_of_each_row_only_where_they_differ(
    monkeypatch, length, calls, shape
):
    made, make = [], masks.decay_factors

    def recorded(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(masks, "decay_factors", recorded)
    query, key, value = (torch.rand(3, 2, length, 4, requires_grad=True) for _ in range(3))
    log_decay = -torch.rand([length if n is None else n for n in shape])
    y = bidirectional_linear_attention(query, key, value, log_decay, format="chunk", chunk_size=9)
    y.backward(torch.rand_like(y) + 0.1)
    assert len(made) == calls
    for factors, _ in made:
        assert {x.shape[0] for x in factors} == ({1} if len(shape) == 1 else {3})
