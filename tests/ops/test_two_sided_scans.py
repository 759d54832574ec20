"""`averaged_scans` of any operator is the mean of explicit permutations, divided once."""

import pytest
import torch
from cases_two_sided import CONVENTIONS, FORMS, NORMALIZE, Maker, assert_same, with_gradients

from lion_hf.ops import averaged_scans, bidirectional_linear_attention, snake_orders, two_sided_attention
from lion_hf.ops.reference import textbook_two_sided


BATCH, HEADS, D, E = 2, 4, 3, 2
PATHS = ("snake", "random", "one")


def orders_of(path, length):
    """Return orders of a grid of 3 x 4 with two prefix tokens, random ones, or a single random one."""
    if path == "snake":
        return snake_orders(3, 4, prefix_tokens=2)
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(length, generator=generator) for _ in range(3 if path == "random" else 1)]
    return [(order, order.argsort()) for order in orders]


def tensors_of(scans, rank, length=14, seed=0):
    """Return every tensor that the operator can have; those of single scans are named with a number."""
    m, sizes = Maker(seed), (BATCH, HEADS, length)
    tensors = {n: m.uniform(0.1, 1, BATCH, 2, length, D) for n in ("query", "key", "backward_query", "backward_key")}
    tensors |= {n: m.uniform(-1, 1, *sizes, E) for n in ("value", "backward_value")}
    tensors |= {n: m.uniform(-2, 2, *sizes) for n in ("log_weight 0", "log_weight 1", "log_weight 2")[:scans]}
    tensors |= {"backward_log_weight": m.uniform(-2, 2, *sizes), "diagonal": m.uniform(0.1, 1, *sizes)}
    tensors |= {f"log_decay {i}": m.log_decay(rank, "saturated", *sizes, D) for i in range(scans)}
    tensors |= {f"backward_log_decay {i}": m.log_decay(4, "mild", *sizes, D) for i in range(scans)}
    return {n: x for n, x in tensors.items() if x is not None}


def of_scan(tensors, i):
    """Return the arguments of one scan, by their names."""
    numbered = {n.removesuffix(f" {i}"): x for n, x in tensors.items() if n.endswith(f" {i}")}
    return {n: x for n, x in tensors.items() if n[-1] not in "012"} | numbered


def scanned(orders, **options):
    """Return averaged_scans as a function of `tensors_of`."""

    def function(**tensors):
        parts = [of_scan(tensors, i) for i in range(len(orders))]
        several = {n.split()[0] for n in tensors if n[-1] in "012"} - {"log_decay"}
        arguments = parts[0] | {n: [part[n] for part in parts] for n in several}
        arguments.pop("log_decay", None)
        decays = [part.get("log_decay") for part in parts]
        return averaged_scans(
            log_decays=decays, orders=orders, operator=two_sided_attention, chunk_size=4, **arguments, **options
        )

    return function


def by_hand(orders, normalize, eps=1e-6, key_mask=None, **options):
    def function(**tensors):
        n = c = 0
        for i, (order, inverse) in enumerate(orders):
            arguments = {k: x[:, :, order] if x.dim() > 2 else x for k, x in of_scan(tensors, i).items()}
            mask = None if key_mask is None else key_mask[:, order]
            pair = textbook_two_sided(
                **arguments, key_mask=mask, normalize=normalize, return_denominator=True, **options
            )
            n, c = n + pair[0][:, :, inverse] / len(orders), c + pair[1][:, :, inverse] / len(orders)
        below = {False: torch.ones_like(c), "clamp": c.abs().clamp(min=1)}.get(normalize, c + eps)
        return n / below.unsqueeze(-1)

    return function


CASES = [
    pytest.param(
        FORMS[i % 3],
        path,
        (None, 1, 2, 3, 4)[(2 * i + i // 4) % 5],
        CONVENTIONS[i % 4],
        NORMALIZE[(i + i // 4) % 4],
        id=f"{path}-{i}",
    )
    for i, path in enumerate(PATHS * 8)
]


@pytest.mark.parametrize("form, path, rank, convention, normalize", CASES)
def test_scans_are_the_mean_of_explicit_permutations(form, path, rank, convention, normalize):
    orders = orders_of(path, 14)
    tensors = tensors_of(len(orders), rank)
    key_mask = torch.ones(BATCH, 14, dtype=torch.bool)
    key_mask[0, 9:] = key_mask[1, 3] = False
    options = {"convention": convention, "normalize": normalize, "key_mask": key_mask, "eps": 0.01, "scale": 0.5}
    if normalize == "clamp":  # row sums below -1
        tensors |= {n: -2 * x for n, x in tensors.items() if n.endswith("query") or n == "diagonal"}
    expected = with_gradients(by_hand(orders, **options), tensors, {})
    assert_same(with_gradients(scanned(orders, format=form, **options), tensors, {}), expected)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_without_options_each_scan_reads_with_its_own_decay_both_ways(normalize):
    orders = orders_of("snake", 14)
    m = Maker(3)
    tensors = {"query": m.uniform(0, 1, 2, 4, 14, 3), "key": m.uniform(0, 1, 2, 4, 14, 3)}
    tensors |= {"value": m.uniform(-1, 1, 2, 4, 14, 2)}
    tensors |= {f"log_decay {i}": m.log_decay(3, "mild", 2, 4, 14, 3) for i in range(2)}
    expected = with_gradients(by_hand(orders, normalize), tensors, {})
    assert_same(with_gradients(scanned(orders, normalize=normalize), tensors, {}), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_general_operator_gives_the_scans_of_lions_own(form, rank, normalize):
    m, orders = Maker(0), orders_of("snake", 14)
    query, key, value = (m.uniform(0.1, 1, 2, 4, 14, 3) for _ in range(3))
    decays = [m.log_decay(rank, "mild", 2, 4, 14, 3) for _ in orders]
    options = {"format": form, "chunk_size": 4, "normalize": normalize}
    expected = averaged_scans(query, key, value, decays, orders, **options)
    for operator in (two_sided_attention, bidirectional_linear_attention):
        # An option that changes nothing, so that LION's operator runs scan by scan too.
        actual = averaged_scans(query, key, value, decays, orders, operator=operator, scale=3**-0.5, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, "mask", "clamp"])
@pytest.mark.parametrize("given", ["log_weight", "backward_log_weight"])
def test_large_log_weights_overflow_in_no_scan(given, normalize, dtype):
    """A shift of all log-weights of a row changes nothing where eps and 1 are small or large beside the sums."""
    m, orders = Maker(0), orders_of("random", 14)
    query, key, value = (m.uniform(0.1, 1, 2, 4, 14, 3).to(dtype) for _ in range(3))
    decays = [m.log_decay(3, "mild", 2, 4, 14, 3).to(dtype) for _ in orders]
    weight = m.uniform(-2, 2, 2, 4, 14).to(dtype)
    direction = "both" if given == "log_weight" else "backward"
    options = {"operator": two_sided_attention, "normalize": normalize, "direction": direction, "diagonal": 0.0}
    if given == "log_weight":
        options.pop("diagonal")

    def run(shift):
        x = (weight + shift).requires_grad_()
        y = averaged_scans(query, key, value, decays, orders, **{given: x}, **options)
        return y, *torch.autograd.grad(y.square().sum(), x)

    for a, b in zip(run(1e4), run(30.0), strict=True):
        assert a.isfinite().all()
        # A large number has few digits after the point.
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.float32 else 1e-8, atol=1e-3)
    assert all(x.isfinite().all() and x.abs().max() < 1e-30 for x in run(-1e4)) or normalize == "mask"


def test_results_have_the_dtype_of_value():
    m, orders = Maker(0), orders_of("snake", 14)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = m.uniform(0.1, 1, 2, 4, 14, 3).to(dtype)
        y = averaged_scans(x, x, x, [None, None], orders, operator=two_sided_attention, convention="between")
        assert y.dtype == dtype and y.shape == x.shape


X, TWO = torch.rand(1, 2, 7, 4), snake_orders(2, 3)


@pytest.mark.parametrize(
    "log_decays, orders, options, message",
    [
        ([], [], {}, "log_decays is empty; it must be a list"),
        (-torch.rand(2), TWO, {}, r"log_decays is a tensor of shape \(2,\); it must be a list"),
        ([None], TWO, {}, "orders has 2 entries and log_decays has 1"),
        ([None, None], TWO, {"log_weight": [X[..., 0]]}, "log_weight has 1 entries .* Give a tensor, not a list"),
        ([None, None], snake_orders(2, 2), {}, r"orders holds .* they must be \(length,\) = \(7,\)"),
        ([None, None], TWO, {"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens was given .* leave it out"),
        ([None, None], TWO, {"return_denominator": True}, "return_denominator was given .* leave it out"),
        ([None, None], TWO, {"normalize": "rows"}, "normalize is 'rows'; allowed are"),
        ([torch.rand(2), None], TWO, {}, "log_decay has a positive or NaN entry"),
        ([None, torch.rand(3)], TWO, {}, r"log_decay has shape \(3,\)"),
    ],
    ids=lambda x: None,
)
def test_bad_arguments_of_scans_are_named(log_decays, orders, options, message):
    with pytest.raises(ValueError, match=message):
        averaged_scans(X, X, X, log_decays, orders, operator=two_sided_attention, **options)


def test_modes_of_the_general_operator_are_named_for_lions_own():
    with pytest.raises(ValueError, match="normalize is 'mask'; .* operator=two_sided_attention"):
        averaged_scans(X, X, X, [-torch.rand(2)] * 2, TWO, normalize="mask")
