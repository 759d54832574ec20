"""Inputs of `two_sided_attention` for tests: generated shapes, decays, weights, masks and options.

A case is a dict of plain values; `make` turns it into tensors and options, in float64.
"""

import math

import torch
from hypothesis import strategies as st

from lion_hf.ops.api import two_sided_attention
from lion_hf.ops.reference import textbook_two_sided


FORMS = ("attention", "rnn", "chunk")
CONVENTIONS = ("left", "entered", "between", "edge")
DIRECTIONS = ("both", "forward", "backward")
NORMALIZE = (False, True, "mask", "clamp")
RANKS = (None, 1, 2, 3, 4)  # of log_decay
GATES = ("mild", "mild", "saturated", "ones", "dead")
MASKS = (None, None, "left", "right", "interior", "random", "nothing")

BASE = {
    "batch": 2, "heads": 4, "groups": 4, "length": 21, "d": 3, "e": 2, "chunk_size": 8, "seed": 0,
    "convention": "left", "direction": "both", "rank": 3, "backward_rank": "same", "gates": "mild",
    "diagonal": None, "weight": None, "backward_weight": "same", "backward": (), "normalize": False, "pair": False,
    "mask": None, "packed": False,
}  # fmt: skip


def case(**changes):
    """Return a case that differs from a plain one in the given entries."""
    assert changes.keys() <= BASE.keys()
    return BASE | changes


@st.composite
def cases(draw):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    chunk_size = pick(1, 3, 8, 16, 31, 64, 100)
    edges = [n for n in (1, 2, 67, *(k * chunk_size + r for k in (1, 2) for r in (-1, 0, 1))) if 1 <= n <= 70]
    rank, backward_rank = pick(*RANKS), pick("same", "same", *RANKS)
    by_channel = rank in (2, 4) or backward_rank in (2, 4)
    heads = pick(1, 2, 3, 4)
    weights = (None, None, "small", "large")
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": heads,
        "groups": pick(*(n for n in (1, 2, 3, 4) if heads % n == 0)),
        "length": pick(*edges) if draw(st.booleans()) else draw(st.integers(1, 40 if by_channel else 70)),
        "d": draw(st.integers(1, 8 if by_channel and heads > 2 else 17)),
        "e": draw(st.integers(1, 17)),
        "chunk_size": chunk_size,
        "seed": draw(st.integers(0, 10**6)),
        "convention": pick(*CONVENTIONS),
        "direction": pick("both", *DIRECTIONS),
        "rank": rank,
        "backward_rank": backward_rank,
        "gates": pick(*GATES),
        "diagonal": pick(None, None, 0.0, 2, 0.7, "head", "token"),
        "weight": pick(*weights),
        "backward_weight": pick("same", "same", *weights),
        "backward": pick((), (), ("key",), ("query", "value"), ("query", "key", "value")),
        "normalize": pick(*NORMALIZE),
        "pair": draw(st.booleans()),
        "mask": pick(*MASKS),
        "packed": pick(False, False, True),
    }


class Maker:
    """Random tensors of a case."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def one_of(self, levels, *shape):
        levels = torch.tensor(levels, dtype=torch.float64)
        return levels[torch.randint(0, len(levels), shape, generator=self.generator)]

    def log_decay(self, rank, gates, batch, heads, length, d):
        if rank is None:
            return None
        shape = {1: (heads,), 2: (heads, d), 3: (batch, heads, length), 4: (batch, heads, length, d)}[rank]
        if gates == "saturated":
            return self.one_of([0.0, -1e-3, -0.7, -20.0, -100.0, -1e4, -math.inf], *shape)
        if gates in ("ones", "dead"):
            return torch.full(shape, 0.0 if gates == "ones" else -math.inf, dtype=torch.float64)
        return torch.nn.functional.logsigmoid(self.uniform(-2, 4, *shape))

    def log_weight(self, kind, *shape):
        if kind is None:
            return None
        return (
            self.uniform(-2, 2, *shape) if kind == "small" else self.one_of([-1e4, -50, -1, 0, 2, 50, 3e3, 1e4], *shape)
        )

    def diagonal(self, kind, batch, heads, length):
        if kind == "head":
            return self.uniform(0.1, 2, heads)
        return self.uniform(0.1, 2, batch, heads, length) if kind == "token" else kind

    def key_mask(self, kind, batch, length):
        if kind is None:
            return None
        mask = torch.ones(batch, length, dtype=torch.bool)
        cut = int(self.uniform(0, length, 1))
        if kind == "left":
            mask[0, :cut] = False
        elif kind == "right":
            mask[-1, length - cut :] = False
        elif kind == "interior":
            mask[:, cut // 2 : cut] = False
        elif kind == "random":
            mask = self.uniform(0, 1, batch, length) > 0.4
        else:
            mask[:] = False
        return mask

    def cu_seqlens(self, length):
        """Return bounds, of empty sequences too."""
        inner = torch.randint(0, length + 1, (4,), generator=self.generator).sort().values.tolist()
        return torch.tensor([0, *inner, inner[-1], length])


def make(case):
    """Return the tensors (a dict) and the other options (a dict) of a case, in float64."""
    m, batch, heads, length = Maker(case["seed"]), case["batch"], case["heads"], case["length"]
    batch = 1 if case["packed"] else batch
    # Denominators that vanish are ill-conditioned. Positive scores have none, "clamp" with small weights neither.
    large = "large" in (case["weight"], case["backward_weight"])
    positive = case["normalize"] is True or (case["normalize"] == "clamp" and large)
    low = 0.1 if positive else -0.5
    # What is not divided overflows with large weights.
    largest = {"large": "small"} if not case["normalize"] or case["pair"] else {}
    weight, backward_weight = (largest.get(x, x) for x in (case["weight"], case["backward_weight"]))
    shapes = {"query": (case["groups"], case["d"]), "key": (case["groups"], case["d"]), "value": (heads, case["e"])}
    tensors = {n: m.uniform(low, 1, batch, h, length, w) for n, (h, w) in shapes.items()}
    tensors |= {f"backward_{n}": m.uniform(low, 1, *tensors[n].shape) for n in case["backward"]}
    if case["normalize"] == "clamp":  # so that many row sums are below -1
        tensors |= {n: -4 * x for n, x in tensors.items() if n.endswith("query")}
    sizes = batch, heads, length
    options = {
        "log_decay": m.log_decay(case["rank"], case["gates"], *sizes, case["d"]),
        "log_weight": m.log_weight(weight, *sizes),
        "diagonal": m.diagonal(case["diagonal"], *sizes),
    }
    if case["backward_rank"] != "same":
        options["backward_log_decay"] = m.log_decay(case["backward_rank"], case["gates"], *sizes, case["d"])
    if backward_weight != "same":
        options["backward_log_weight"] = m.log_weight(backward_weight, *sizes)
    tensors |= {n: x for n, x in options.items() if torch.is_tensor(x)}
    options = {n: x for n, x in options.items() if not torch.is_tensor(x)}
    options |= {n: case[n] for n in ("convention", "direction", "normalize")}
    options |= {
        "return_denominator": case["pair"],
        "key_mask": m.key_mask(case["mask"], batch, length),
        "cu_seqlens": m.cu_seqlens(length) if case["packed"] else None,
        "scale": (None, 0.3)[case["seed"] % 2],
        "eps": (1e-6, 1e-2)[case["seed"] % 3 == 0],
    }
    return tensors, options


def leaves_of(output):
    """Return the tensors of an output, which is one or a pair."""
    return output if isinstance(output, tuple) else (output,)


def with_gradients(function, tensors, options, seed=0):
    """Return a dict of all outputs and of the gradient of each tensor, for fixed gradients of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
    outputs = leaves_of(function(**leaves, **options))
    loss = sum((y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    for (name, x), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return results


def assert_same(actual, expected, tolerance=1e-9, what="", least_scale=0.05):
    """Compare dicts of tensors, each on the scale of its largest entry."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].shape == x.shape, f"{what} {name}: shape {tuple(actual[name].shape)}"
        if not x.numel():
            continue
        assert x.isfinite().all(), f"the textbook is not finite: {name}"
        assert actual[name].isfinite().all(), f"{what} {name}: not finite"
        error = (actual[name].double() - x.double()).abs().max() / x.double().abs().max().clamp(min=least_scale)
        assert error <= tolerance, f"{what} {name}: relative error {error:.2e} > {tolerance:.0e}"


def assert_equals_the_textbook(case, forms=FORMS):
    """Compare outputs and every gradient of the forms with those of the textbook in float64."""
    tensors, options = make(case)
    expected = with_gradients(textbook_two_sided, tensors, options)
    for form in forms:
        own = options | {"format": form, "chunk_size": case["chunk_size"]}
        assert_same(with_gradients(two_sided_attention, tensors, own), expected, what=form)
