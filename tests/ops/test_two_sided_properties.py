"""Properties of `two_sided_attention` that follow from its definition, without the textbook's help."""

import math

import pytest
import torch
from cases_two_sided import (
    CONVENTIONS,
    DIRECTIONS,
    FORMS,
    NORMALIZE,
    Maker,
    assert_same,
    case,
    leaves_of,
    make,
    with_gradients,
)

from lion_hf.ops import bidirectional_linear_attention
from lion_hf.ops.api import two_sided_attention
from lion_hf.ops.reference import textbook_causal, textbook_two_sided


SIZES = 2, 4, 21  # batch, heads, length
# Options that together use every tensor and both kinds of decays.
KINDS = [
    pytest.param({"rank": 3, "weight": "small", "diagonal": "token"}, id="token"),
    pytest.param({"rank": 4, "backward_rank": 4, "backward": ("query", "key", "value"), "groups": 2}, id="channel"),
    pytest.param({"rank": 2, "backward_rank": 1, "weight": "small", "diagonal": "head"}, id="ranks"),
    pytest.param({"rank": None, "backward_rank": 3, "backward_weight": "small", "groups": 1}, id="one-sided"),
]
every_form = pytest.mark.parametrize("form", FORMS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_convention = pytest.mark.parametrize("convention", CONVENTIONS)


def run(tensors, options, **changes):
    return two_sided_attention(**tensors, **{"chunk_size": 8, **options, **changes})


def by_token(tensors, function):
    """Apply a function to the tensors that have a length."""
    return {n: function(x) if x.dim() > 2 else x for n, x in tensors.items()}


def close(actual, expected, tolerance=1e-9):
    for a, b in zip(leaves_of(actual), leaves_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_form
@every_kind
def test_packed_sequences_are_separate(kind, form):
    tensors, options = make(case(batch=1, mask="random", normalize="mask", **kind))
    bounds = torch.tensor([0, 1, 1, 8, 17, 21, 21])
    options |= {"format": form, "chunk_size": 4}
    mask = options.pop("key_mask")

    def separately(**tensors):
        parts = [
            run(by_token(tensors, lambda x, s=s: x[:, :, s]), options, key_mask=mask[:, s])
            for s in (slice(0, 1), slice(1, 8), slice(8, 17), slice(17, 21))
        ]
        return torch.cat(parts, 2)

    def packed(**tensors):
        return run(tensors, options, key_mask=mask, cu_seqlens=bounds)

    assert_same(with_gradients(packed, tensors, {}), with_gradients(separately, tensors, {}))


@every_form
@every_kind
@pytest.mark.parametrize("normalize", [True, "mask"])
def test_padding_changes_nothing(kind, normalize, form):
    tensors, options = make(case(batch=1, normalize=normalize, **kind))
    alone = run(tensors, options, format=form)
    for left, right in ((0, 6), (5, 0), (3, 9)):
        wide = {
            n: torch.nn.functional.pad(x, (0, 0, left, right) if x.dim() == 4 else (left, right), value=-0.3)
            if x.dim() > 2
            else x
            for n, x in tensors.items()
        }
        mask = torch.zeros(1, 21 + left + right, dtype=torch.bool)
        mask[:, left : left + 21] = True
        close(run(wide, options, format=form, key_mask=mask)[:, :, left : left + 21], alone)


@every_convention
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_transposition_exchanges_left_and_entered(direction, rank, convention):
    """The matrix of "left" is the transposed one of "entered" with query and key exchanged; "between", "edge": own."""
    m = Maker(1)
    query, key = m.uniform(-1, 1, 2, *SIZES, 3)
    eye = torch.eye(SIZES[2], dtype=torch.float64).expand(*SIZES, -1)  # as values, so that the output is the matrix
    decay = m.log_decay(rank, "saturated" if rank > 2 else "mild", *SIZES, 3)
    mirror = {"left": "entered", "entered": "left"}.get(convention, convention)
    back = {"both": "both", "forward": "backward", "backward": "forward"}[direction]
    form = FORMS[rank % 3]
    matrix = two_sided_attention(query, key, eye, decay, convention=convention, direction=direction, format=form)
    transposed = two_sided_attention(key, query, eye, decay, convention=mirror, direction=back, format=form)
    close(matrix, transposed.mT)
    if convention == "edge" and rank > 2:  # selective, and yet symmetric
        same = two_sided_attention(query, query, eye, decay, convention="edge", format=form)
        close(same, same.mT)


@every_form
@every_kind
@every_convention
def test_reversal_exchanges_the_sides(convention, kind, form):
    """The flipped row, with the tensors of both sides exchanged, flips the output. The diagonal belongs to neither."""
    kind = kind | {"diagonal": "token", "backward": ("query", "key", "value"), "backward_weight": "small"}
    kind |= {"backward_rank": kind["rank"] if kind.get("backward_rank", "same") == "same" else kind["backward_rank"]}
    tensors, options = make(case(convention=convention, normalize=True, **kind))
    tensors["backward_value"] = tensors["value"]  # the diagonal multiplies the forward value
    options |= {"format": form}
    exchanged = {
        n if n == "diagonal" else n.removeprefix("backward_") if n.startswith("backward_") else f"backward_{n}": x
        for n, x in by_token(tensors, lambda x: x.flip(2)).items()
    }
    names = ("log_decay", "log_weight")
    missing = {f"backward_{n}": None for n in names if n not in tensors}
    rest = {n: x for n, x in options.items() if n not in names}
    close(run(exchanged, rest | missing).flip(2), run(tensors, options))


@every_form
@every_convention
@pytest.mark.parametrize("rank", [3, 4])
def test_one_direction_is_a_step_by_step_recurrence(rank, convention, form):
    m = Maker(2)
    query, key = m.uniform(-1, 1, 2, *SIZES, 3)
    value = m.uniform(-1, 1, *SIZES, 2)
    decay = m.log_decay(rank, "saturated", *SIZES, 3)
    steps = decay.exp() if rank == 4 else decay.exp().unsqueeze(-1).expand(*SIZES, 3)
    options = {"convention": convention, "format": form, "chunk_size": 8, "scale": 1.0}
    causal = textbook_causal(query, key, value, steps, convention)
    close(two_sided_attention(query, key, value, decay, direction="forward", **options), causal)
    flipped = (x.flip(2) for x in (query, key, value, steps))
    causal = textbook_causal(*flipped, convention).flip(2)
    close(two_sided_attention(query, key, value, decay, direction="backward", **options), causal)


@every_form
@every_kind
def test_both_directions_are_their_sum_less_one_diagonal(kind, form):
    tensors, options = make(case(mask="random", **kind))
    options |= {"format": form}
    both, forward, backward = (run(tensors, options, direction=x) for x in DIRECTIONS)
    tensors, options = ({n: x for n, x in d.items() if n != "diagonal"} for d in (tensors, options))
    off = [run(tensors, options, direction=x, diagonal=0.0) for x in DIRECTIONS]
    close(off[0], off[1] + off[2])
    close(forward - off[1], backward - off[2])
    close(both, forward + backward - (forward - off[1]))


@every_form
@pytest.mark.parametrize("rank", [3, 4])
def test_log_weights_multiply_the_keys(rank, form):
    tensors, options = make(case(rank=rank, weight="small", backward_weight="small", normalize=True))
    options |= {"format": form}
    weight, other = tensors.pop("log_weight"), tensors.pop("backward_log_weight")
    keys = {"key": tensors["key"] * weight.exp().unsqueeze(-1), "backward_key": tensors["key"] * other.exp()[..., None]}
    for normalize in (False, True, "clamp"):
        changes = {"normalize": normalize, "return_denominator": False}
        weighted = run(tensors, options, log_weight=weight, backward_log_weight=other, **changes)
        close(weighted, run(tensors | keys, options, **changes))
    # The sum of the mask is the denominator of queries and keys of 1.
    ones = {n: torch.ones_like(tensors[n]) for n in ("query", "key")}
    both = {"log_weight": weight, "backward_log_weight": other, "return_denominator": True}
    _, mask = run(tensors, options, normalize="mask", **both)
    close(mask, run(tensors | ones, options, normalize=True, scale=1 / 3, **both)[1])


@every_form
@pytest.mark.parametrize("rank", [None, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_shift_of_log_weights_cancels(shift, dtype, rank, form):
    tensors, options = make(case(rank=rank, weight="small", normalize=True))
    tensors = {n: x.to(dtype) for n, x in tensors.items()} | {"log_weight": tensors["log_weight"].round(decimals=1)}
    options |= {"format": form, "eps": 0.0, "chunk_size": 8}
    expected = with_gradients(two_sided_attention, tensors, options)
    far = tensors | {"log_weight": tensors["log_weight"] + shift}
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    for normalize in (True, "mask"):
        options |= {"normalize": normalize}
        expected = with_gradients(two_sided_attention, tensors, options)
        assert_same(with_gradients(two_sided_attention, far, options), expected, tolerance, normalize)
    options |= {"normalize": "clamp"}
    clamped = with_gradients(two_sided_attention, far, options)
    assert all(x.isfinite().all() for x in clamped.values())
    if shift > 0:  # the row sum exceeds 1, and divides
        options |= {"normalize": True}
        assert_same(clamped, with_gradients(two_sided_attention, tensors, options), tolerance, "clamp")
    else:  # 1 exceeds the row sum
        assert not clamped["output 0"].any()


@every_form
@pytest.mark.parametrize("rank", [None, 3, 4])
@pytest.mark.parametrize("normalize", [True, "mask", "clamp"])
def test_log_weights_of_any_size_make_no_nan(normalize, rank, form):
    """Far apart, all far below, minus infinity; with a query of 0, as a ReLU makes it; and a gate of 0."""
    m, dtype = Maker(0), torch.float32
    query, key = m.uniform(0, 1, 2, *SIZES, 3).to(dtype)
    value = m.uniform(-1, 1, *SIZES, 2).to(dtype)
    decay = m.log_decay(rank, "saturated", *SIZES, 3)
    silent = query.clone()
    silent[:, :, ::4] = 0
    levels = [-math.inf, -1e4, -200, 0, 1e4], [200.0, 1e4], [-1e4, -math.inf], [-math.inf]
    for i, some in enumerate(levels):
        weight = m.one_of(some, *SIZES).to(dtype)
        tensors = {"query": query, "key": key, "value": value, "log_weight": weight}
        tensors |= {} if decay is None else {"log_decay": decay.to(dtype)}
        options = {"normalize": normalize, "format": form, "chunk_size": 8, "diagonal": (None, 0.0)[i % 2]}
        for name, x in with_gradients(two_sided_attention, tensors, options).items():
            assert x.isfinite().all(), f"{name} with log-weights {some}"
        y = two_sided_attention(**tensors | {"query": silent}, **options)
        assert y.isfinite().all() and not y[:, :, ::4].any(), "a query of 0 reads nothing"


@every_form
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_row_that_reads_no_key_is_zero(rank, normalize, form):
    m = Maker(0)
    query, key = m.uniform(-1, 1, 2, *SIZES, 3)
    value, decay = m.uniform(-1, 1, *SIZES, 2), m.log_decay(rank, "mild", *SIZES, 3)
    options = {"normalize": normalize, "format": form, "chunk_size": 8}
    nothing = torch.zeros(2, SIZES[2], dtype=torch.bool)
    for weight in (None, m.uniform(-2, 2, *SIZES), torch.full(SIZES, -1e4, dtype=torch.float64)):
        y = two_sided_attention(query, key, value, decay, log_weight=weight, key_mask=nothing, **options)
        assert torch.equal(y, torch.zeros_like(y))
        first = two_sided_attention(
            query, key, value, decay, log_weight=weight, direction="forward", diagonal=0.0, **options
        )
        assert not first[:, :, 0].any() and first[:, :, 1:].isfinite().all()
        given = m.uniform(1, 2, *SIZES)
        y = two_sided_attention(
            query, key, value, decay, log_weight=weight, key_mask=nothing, diagonal=given, **options
        )
        assert torch.equal(y, torch.zeros_like(y))


@every_form
@every_kind
@pytest.mark.parametrize(
    "garbage, normalize", [(math.nan, True), (math.inf, "mask"), (-1e30, "clamp"), (math.nan, False)]
)
def test_what_masked_tokens_hold_never_matters(garbage, normalize, kind, form):
    tensors, options = make(case(mask="random", normalize=normalize, **kind))
    options |= {"format": form, "chunk_size": 4}
    hidden = ~options["key_mask"]
    expected = with_gradients(two_sided_attention, tensors, options)
    dirty = {n: x.clone() for n, x in tensors.items()}
    names = [n for n, x in tensors.items() if x.dim() > 2 and "decay" not in n and "query" not in n]
    assert {"key", "value"} <= set(names)
    for name in names:
        dirty[name].transpose(1, 2)[hidden] = garbage
    actual = with_gradients(two_sided_attention, dirty, options)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-12, atol=1e-12, msg=name)
    for name in names:
        assert not actual[f"gradient of {name}"].transpose(1, 2)[hidden].any(), name
    for name in ("query", "backward_query"):
        if name in tensors:  # a masked token still reads, alone
            dirty = tensors | {name: tensors[name].clone()}
            dirty[name].transpose(1, 2)[hidden] = garbage
            y = two_sided_attention(**dirty, **options).transpose(1, 2)
            close(y[~hidden], expected["output 0"].transpose(1, 2)[~hidden])


@every_form
@every_kind
def test_nan_stays_in_its_row_and_head(kind, form):
    tensors, options = make(case(normalize=True, mask="right", **(kind | {"groups": 4})))
    options |= {"format": form, "chunk_size": 8, "check_values": False}
    expected = with_gradients(two_sided_attention, tensors, options)
    for name in (n for n, x in tensors.items() if x.dim() > 2):
        given = tensors | {name: tensors[name].clone()}
        given[name][0, 1, 5] = math.nan
        actual = with_gradients(two_sided_attention, given, options)
        assert actual["output 0"][0, 1].isnan().any(), f"{name}: NaN is lost"
        for result, x in actual.items():
            if x.dim() > 2:
                x[0, 1] = expected[result][0, 1]
                close(x, expected[result])


@every_form
@every_kind
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_denominators_are_undivided_and_give_the_result(normalize, kind, form):
    tensors, options = make(case(normalize=normalize, mask="random", **kind))
    options |= {"format": form, "eps": 0.01}
    n, c = run(tensors, options, return_denominator=True)
    assert n.shape == (*SIZES, 2) and c.shape == SIZES
    below = {False: torch.ones_like(c), "clamp": c.abs().clamp(min=1)}.get(normalize, c + 0.01)
    close(run(tensors, options), n / below.unsqueeze(-1))
    close(n, run(tensors, options, normalize=False))
    # The scale multiplies all of n, the diagonal too, and c, but not the sum of the mask.
    scaled = run(tensors, options, return_denominator=True, scale=3**-0.5 * 7)
    options.pop("scale")
    plain = run(tensors, options, return_denominator=True)
    close(scaled, (7 * plain[0], plain[1] if normalize == "mask" else 7 * plain[1]))


@every_form
@every_kind
def test_dtypes_of_results(kind, form):
    tensors, options = make(case(normalize=True, **kind))
    names = [n for n in tensors if n.rsplit("_", 1)[-1] in ("query", "key", "value")]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = tensors | {n: tensors[n].to(dtype) for n in names}
        assert run(low, options, format=form).dtype == dtype
        assert {x.dtype for x in run(low, options, format=form, return_denominator=True)} == {torch.float32}
        for name in names:
            mixed = low | {name: tensors[name]}
            assert run(mixed, options, format=form).dtype == mixed["value"].dtype
            assert {x.dtype for x in run(mixed, options, format=form, return_denominator=True)} == {torch.float64}


@every_form
@every_kind
def test_strided_inputs_are_read_where_they_lie_and_left_as_they_are(kind, form):
    tensors, options = make(case(mask="random", normalize=True, **kind))
    options |= {"format": form, "chunk_size": 8}
    strided = by_token(tensors, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    strided["value"] = torch.stack([tensors["value"]] * 2, -1)[..., 0]
    assert not any(x.is_contiguous() for x in strided.values() if x.dim() > 2 and x.shape[1] > 1)
    before = {n: x.clone() for n, x in strided.items()}
    expected = with_gradients(two_sided_attention, tensors, options)
    leaves = {n: x.detach().requires_grad_() for n, x in strided.items()}
    y = two_sided_attention(**leaves, **options)
    y.square().sum().backward()
    close(y, expected["output 0"])
    for name, x in before.items():
        assert torch.equal(x, strided[name]), name


@every_form
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_lions_own_operator_is_a_call_of_it(normalize, rank, form):
    tensors, options = make(case(rank=rank, mask="random", normalize=normalize))
    options = {n: options[n] for n in ("normalize", "key_mask", "scale", "eps")} | {"format": form, "chunk_size": 8}
    lion, general = (with_gradients(f, tensors, options) for f in (bidirectional_linear_attention, two_sided_attention))
    assert all(torch.equal(general[n], x) for n, x in lion.items())
    # An own, equal key backwards leaves LION's fast way, but not its results.
    own = with_gradients(two_sided_attention, tensors, options | {"backward_value": tensors["value"]})
    close(own["output 0"], lion["output 0"])


@every_form
@every_kind
def test_permuted_batch_permutes_the_output(kind, form):
    tensors, options = make(case(batch=3, normalize=True, **kind))
    order = torch.tensor([2, 0, 1])
    permuted = {n: x[order] if x.dim() > 2 else x for n, x in tensors.items()}
    close(run(permuted, options, format=form), run(tensors, options, format=form)[order], 1e-12)


@every_form
@every_kind
def test_no_tokens_and_no_batch(kind, form):
    for sizes in ({"length": 0}, {"batch": 0}):
        for pair in (False, True):
            tensors, options = make(case(normalize=True, pair=pair, **kind) | sizes)
            results = with_gradients(two_sided_attention, tensors, options | {"format": form})
            assert results["output 0"].shape == tensors["value"].shape


@every_form
@every_kind
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_low_precision_is_computed_in_float32(dtype, tolerance, kind, form):
    tensors, options = make(case(length=70, d=16, e=8, mask="random", normalize=True, **kind))
    names = [n for n in tensors if n.rsplit("_", 1)[-1] in ("query", "key", "value")]
    low = {n: x.to(dtype if n in names else torch.float32) for n, x in tensors.items()}
    expected = with_gradients(textbook_two_sided, {n: x.double() for n, x in low.items()}, options)
    actual = with_gradients(two_sided_attention, low, options | {"format": form, "chunk_size": 16})
    # Only the rounding of the results may differ.
    scale = max(0.05, *(x.abs().max().item() / 4 for x in expected.values()))
    assert_same(actual, expected, tolerance, form, scale)


@every_form
@pytest.mark.parametrize("rank", [3, 4])
def test_long_inputs_stay_exact_in_float32(rank, form):
    tensors, options = make(
        case(batch=1, heads=2, groups=1, length=257, d=4, rank=rank, weight="small", normalize=True)
    )
    low = {n: x.float() for n, x in tensors.items()}
    expected = with_gradients(textbook_two_sided, {n: x.double() for n, x in low.items()}, options)
    actual = with_gradients(two_sided_attention, low, options | {"format": form, "chunk_size": 16})
    scale = max(0.05, *(x.abs().max().item() / 4 for x in expected.values()))
    assert_same(actual, expected, 2e-5, form, scale)


@every_form
@every_kind
def test_nothing_quadratic_is_kept_for_backward(kind, form):
    tensors, options = make(case(batch=1, length=512, normalize=True, **kind))
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        y = two_sided_attention(**leaves, **options, format=form)
    assert y.requires_grad and kept and max(kept) < 512 * 512


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["none", "token", "channel"])
@pytest.mark.parametrize("normalize", [True, "mask"])
def test_a_row_that_reads_no_key_is_0_without_eps(form, kind, normalize):
    shape = {"none": None, "token": (2, 2, 9), "channel": (2, 2, 9, 3)}[kind]
    log_decay = None if shape is None else -torch.rand(shape)
    tensors = [torch.rand(2, 2, 9, 3, requires_grad=True) for _ in range(3)]
    key_mask = torch.tensor([[1] * 9, [0] * 9])
    options = {"normalize": normalize, "eps": 0.0, "key_mask": key_mask, "format": form, "chunk_size": 4}
    y = two_sided_attention(*tensors, log_decay, **options)
    y.sum().backward()
    assert (y[1] == 0).all() and y[0].isfinite().all()
    assert all(x.grad.isfinite().all() for x in tensors)
