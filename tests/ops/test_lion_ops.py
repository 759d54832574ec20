import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lion_hf.ops import tokens as lion_tokens
from lion_hf.ops.api import (
    CROSSOVER,
    attention_scores,
    bidirectional_linear_attention,
    resolve_format,
)
from lion_hf.ops.reference import textbook


FORMS = ("attention", "rnn", "chunk")
KINDS = ("none", "head", "token", "saturated")
MASKS = (None, "left", "right", "interior", "random", "nothing")


def make_inputs(batch, heads, length, d, e, kind, mask, normalize, seed):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    # Positive scores keep the denominator of the normalised form away from 0, where results are ill-conditioned.
    shift = 0.1 if normalize else -0.5
    query, key = rand(batch, heads, length, d) + shift, rand(batch, heads, length, d) + shift
    value = rand(batch, heads, length, e) - 0.5
    log_decay = None
    if kind == "head":
        log_decay = torch.nn.functional.logsigmoid(4 * rand(heads) - 2)
        log_decay[0] = 0.0 if seed % 3 == 0 else log_decay[0]
    elif kind == "token":
        log_decay = torch.nn.functional.logsigmoid(6 * rand(batch, heads, length) - 2)
    elif kind == "saturated":
        levels = torch.tensor([0.0, -1e-3, -0.7, -100.0, -1e4, -math.inf], dtype=torch.float64)
        log_decay = levels[torch.randint(0, 6, (batch, heads, length), generator=generator)]
    key_mask = None
    if mask is not None:
        key_mask = torch.ones(batch, length, dtype=torch.bool)
        cut = int(torch.randint(0, length, (1,), generator=generator))
        if mask == "left":
            key_mask[0, :cut] = False
        elif mask == "right":
            key_mask[-1, length - cut :] = False
        elif mask == "interior":
            key_mask[:, cut // 2 : cut] = False
        elif mask == "random":
            key_mask = rand(batch, length) > 0.4
        else:
            key_mask[:] = False
    return query, key, value, log_decay, key_mask


def outputs_and_gradients(function, inputs, weight):
    inputs = [x.detach().clone().requires_grad_() for x in inputs if x is not None]
    y = function(*inputs[:3], inputs[3] if len(inputs) > 3 else None)
    gradients = torch.autograd.grad((y * weight.to(y.dtype)).sum(), inputs, allow_unused=True)
    return [y, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))]


def assert_close(actual, expected, tolerance, what, least_scale=0.05):
    assert actual.isfinite().all(), f"{what}: not finite"
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=least_scale)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 5),
        "length": st.one_of(st.integers(1, 70), st.sampled_from([1, 2, 31, 61, 63, 64, 65, 67])),
        "d": st.integers(1, 33),
        "e": st.integers(1, 33),
        "kind": st.sampled_from(KINDS),
        "mask": st.sampled_from(MASKS),
        "normalize": st.booleans(),
        "seed": st.integers(0, 10**6),
    }
)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["float64", "float32"])
@settings(max_examples=120)
@given(case=shapes, chunk_size=st.sampled_from([1, 3, 16, 31, 32, 64, 100]))
def test_forms_equal_the_textbook_in_outputs_and_every_gradient(dtype, tolerance, case, chunk_size):
    *inputs, key_mask = make_inputs(**case)
    normalize = case["normalize"]
    weight = torch.randn(*inputs[2].shape, dtype=torch.float64)
    inputs = [None if x is None else x.to(dtype).double() for x in inputs]
    expected = outputs_and_gradients(lambda q, k, v, g: textbook(q, k, v, g, key_mask, normalize), inputs, weight)
    low = [None if x is None else x.to(dtype) for x in inputs]
    for form in FORMS:
        actual = outputs_and_gradients(
            lambda q, k, v, g, form=form: bidirectional_linear_attention(
                q, k, v, g, format=form, chunk_size=chunk_size, normalize=normalize, key_mask=key_mask
            ),
            low,
            weight,
        )
        # With narrow heads or short rows, a normalised row hardly depends on its own query. That gradient is the
        # difference of terms as large as the other gradients, so it is compared on their scale.
        scale = max(0.05, *(x.abs().max().item() / 4 for x in expected))
        for name, a, b in zip(("output", "dquery", "dkey", "dvalue", "dlog_decay"), actual, expected, strict=False):
            assert_close(a, b, tolerance, f"{form} {name}", scale if normalize else 0.05)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("length, chunk_size", [(1000, 64), (257, 2)], ids=["L1000-K64", "more-chunks-than-one-scan"])
def test_long_inputs_stay_exact_in_float32(form, kind, length, chunk_size):
    *inputs, _ = make_inputs(1, 2, length, 8, 5, kind, None, True, seed=1)
    inputs = [x.float().double() for x in inputs]
    weight = torch.randn(*inputs[2].shape, dtype=torch.float64)
    expected = outputs_and_gradients(lambda q, k, v, g: textbook(q, k, v, g, None, True), inputs, weight)
    actual = outputs_and_gradients(
        lambda q, k, v, g: bidirectional_linear_attention(
            q, k, v, g, format=form, chunk_size=chunk_size, normalize=True
        ),
        [x.float() for x in inputs],
        weight,
    )
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 2e-5, form)


@pytest.mark.parametrize("cache_elements", [0, 5000], ids=["factors-one-by-one", "factors-of-three-chunks"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_in_parallel_and_one_by_one_are_the_same(kind, cache_elements, monkeypatch):
    *inputs, key_mask = make_inputs(2, 3, 130, 8, 5, kind, "random", True, seed=6)
    weight = torch.randn(*inputs[2].shape, dtype=torch.float64)

    def run():
        return outputs_and_gradients(
            lambda q, k, v, g: bidirectional_linear_attention(
                q, k, v, g, format="chunk", chunk_size=16, normalize=True, key_mask=key_mask
            ),
            inputs,
            weight,
        )

    parallel = run()
    monkeypatch.setattr(lion_tokens, "CPU_CACHE_ELEMENTS", cache_elements)
    for a, b in zip(run(), parallel, strict=True):
        assert_close(a, b, 1e-9, kind)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_saturated_gates_are_finite_and_right(form, logit):
    query, key, value = torch.randn(3, 1, 2, 65, 4)
    gate = torch.full((1, 2, 65), logit, requires_grad=True)
    gate.data[:, :, ::3] = 0.3
    log_decay = torch.nn.functional.logsigmoid(gate)
    y = bidirectional_linear_attention(query, key, value, log_decay, format=form, chunk_size=32)
    y.sum().backward()
    expected = textbook(query.double(), key.double(), value.double(), log_decay.detach().double())
    assert_close(y.detach(), expected, 2e-5, form)
    assert gate.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(form, kind, normalize):
    *inputs, key_mask = make_inputs(2, 2, 7, 3, 2, kind, "random", normalize, seed=5)
    inputs = [x.requires_grad_() for x in inputs if x is not None]

    def function(q, k, v, g=None):
        return bidirectional_linear_attention(
            q, k, v, g, format=form, chunk_size=3, normalize=normalize, key_mask=key_mask
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_denominators_are_undivided_and_make_the_normalised_form(form):
    *inputs, key_mask = make_inputs(2, 3, 20, 4, 5, "token", "random", True, seed=3)
    n, c = bidirectional_linear_attention(
        *inputs, format=form, chunk_size=8, key_mask=key_mask, return_denominator=True
    )
    assert n.shape == (2, 3, 20, 5) and c.shape == (2, 3, 20)
    torch.testing.assert_close(n, textbook(*inputs, key_mask), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(n / (c[..., None] + 1e-6), textbook(*inputs, key_mask, True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(form, kind):
    *inputs, _ = make_inputs(1, 2, 19, 4, 4, kind, None, True, seed=8)
    alone = bidirectional_linear_attention(*inputs, format=form, chunk_size=8, normalize=True)
    for left, right in ((0, 6), (5, 0), (3, 9)):
        padded = [torch.nn.functional.pad(x, (0, 0, left, right), value=7.0) for x in inputs[:3]]
        log_decay = inputs[3]
        if log_decay is not None and log_decay.dim() == 3:
            log_decay = torch.nn.functional.pad(log_decay, (left, right), value=-0.3)
        mask = torch.zeros(1, 19 + left + right, dtype=torch.bool)
        mask[:, left : left + 19] = True
        y = bidirectional_linear_attention(*padded, log_decay, format=form, chunk_size=8, normalize=True, key_mask=mask)
        torch.testing.assert_close(y[:, :, left : left + 19], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_garbage_in_padding_does_not_leak(form):
    *inputs, _ = make_inputs(1, 2, 9, 4, 4, "token", None, True, seed=8)
    mask = torch.ones(1, 9)
    mask[:, 4] = 0
    clean = bidirectional_linear_attention(*inputs, format=form, chunk_size=4, normalize=True, key_mask=mask)
    for x in inputs[1:3]:
        x[:, :, 4] = math.inf
    dirty = bidirectional_linear_attention(*inputs, format=form, chunk_size=4, normalize=True, key_mask=mask)
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_row_and_head(form, normalize, masked):
    *inputs, _ = make_inputs(3, 2, 20, 4, 4, "token", None, True, seed=8)
    inputs.append(torch.randn(3, 2, 20, 4, dtype=torch.float64))
    mask = torch.arange(20).expand(3, 20) < 15 if masked else None

    def run(*inputs):
        *inputs, d_out = (x.clone().requires_grad_() for x in inputs)
        y = bidirectional_linear_attention(
            *inputs, format=form, normalize=normalize, chunk_size=6, key_mask=mask, check_values=False
        )
        return [y.detach(), *torch.autograd.grad(y, inputs, d_out.detach())]

    expected = run(*inputs)
    for i, name in enumerate(("query", "key", "value", "log_decay", "gradient of the output")):
        given = [x.clone() for x in inputs]
        given[i][1, 0, 5] = math.nan
        actual = run(*given)
        shows = actual[1:] if name == "gradient of the output" else actual[:1]
        assert any(x[1, 0].isnan().any() for x in shows), f"{name}: NaN is lost"
        for a, b in zip(actual, expected, strict=True):
            a[1, 0] = b[1, 0]
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(form, dtype):
    *inputs, key_mask = make_inputs(2, 2, 70, 16, 16, "token", "right", True, seed=2)
    low = [x.to(dtype) for x in inputs[:3]]
    y = bidirectional_linear_attention(*low, inputs[3].float(), format=form, normalize=True, key_mask=key_mask)
    expected = textbook(*(x.double() for x in low), inputs[3].float().double(), key_mask, True)
    assert y.dtype == dtype
    # Only the rounding to the output dtype may differ.
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_neither_lowers_precision_nor_breaks_gradients(form):
    *inputs, _ = make_inputs(2, 2, 33, 8, 8, "token", None, True, seed=2)
    inputs = [x.float().requires_grad_() for x in inputs]
    plain = bidirectional_linear_attention(*inputs, format=form, normalize=True)
    expected = torch.autograd.grad(plain.sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = bidirectional_linear_attention(*inputs, format=form, normalize=True)
    assert torch.equal(y, plain)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs_are_read_where_they_lie(form):
    packed = torch.randn(2, 21, 3, 2, 4, dtype=torch.float64)  # batch, length, (q, k, v), heads, width
    query, key, value = (x.transpose(1, 2) for x in packed.unbind(2))
    log_decay = -torch.rand(2, 21, 2, dtype=torch.float64).transpose(1, 2)
    y = bidirectional_linear_attention(query, key, value, log_decay, format=form, chunk_size=8)
    torch.testing.assert_close(y, textbook(query, key, value, log_decay), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_permuted_batch_permutes_the_output_and_reversal_reverses_it(form, kind):
    *inputs, _ = make_inputs(3, 2, 40, 4, 4, kind, None, False, seed=4)
    y = bidirectional_linear_attention(*inputs, format=form, chunk_size=16)
    order = torch.tensor([2, 0, 1])
    permuted = [x if x is None or x.dim() == 1 else x[order] for x in inputs]
    torch.testing.assert_close(bidirectional_linear_attention(*permuted, format=form, chunk_size=16), y[order])
    if kind != "token":  # the token that is left decays, and reversal makes it the token that is entered
        flipped = [x.flip(2) for x in inputs[:3]]
        z = bidirectional_linear_attention(*flipped, inputs[3], format=form, chunk_size=16)
        torch.testing.assert_close(z.flip(2), y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_and_no_batch(form):
    for shape in ((2, 3, 0, 4), (0, 3, 5, 4)):
        x = torch.zeros(shape)
        y = bidirectional_linear_attention(x, x, x, torch.zeros(shape[:3]), format=form, normalize=True)
        assert y.shape == shape


def test_nothing_quadratic_is_kept_for_backward():
    length = 512
    query, key, value = (torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3))
    log_decay = (-torch.rand(1, 2, length)).requires_grad_()
    for form in FORMS:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x.numel()), x)[1], lambda x: x):
            bidirectional_linear_attention(query, key, value, log_decay, format=form, normalize=True)
        assert kept and max(kept) < length * length, form


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_those_of_the_textbook(form):
    query, key, value, log_decay, _ = make_inputs(1, 2, 7, 3, 2, "token", None, True, seed=4)

    def twice(function):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, log_decay)]
        gradients = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in gradients), leaves)

    expected = twice(lambda q, k, v, g: textbook(q, k, v, g, None, True))
    actual = twice(lambda *x: bidirectional_linear_attention(*x, format=form, chunk_size=3, normalize=True))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_scores_are_the_matrix_of_the_attention_form():
    *inputs, key_mask = make_inputs(2, 2, 12, 4, 4, "token", "random", False, seed=9)
    scores = attention_scores(inputs[0], inputs[1], inputs[3], key_mask=key_mask)
    torch.testing.assert_close(scores @ inputs[2], textbook(*inputs, key_mask), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("per_token", [False, True])
def test_gradients_are_right_where_decays_are_exactly_1(per_token):
    """Both candidate exponents of a pair are 0 there, and only one of them has a gradient."""
    ones = torch.ones(1, 1, 3, 1)
    gate = torch.zeros((1, 1, 3) if per_token else (1,), requires_grad=True)
    attention_scores(ones, ones, gate).sum().backward()
    assert gate.grad.flatten().tolist() == ([2, 4, 2] if per_token else [8])

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 2, 7, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 2, 7, 7, generator=generator, dtype=torch.float64)
    zero = torch.tensor([0.0, -0.3], dtype=torch.float64)
    choice = torch.randint(0, 3, (2, 2, 7), generator=generator)
    gates = torch.tensor([0.0, 0.0, -0.5], dtype=torch.float64)[choice] if per_token else zero

    def gradients(scores):
        inputs = [x.clone().requires_grad_() for x in (query, key, gates)]
        return torch.autograd.grad((scores(*inputs) * weight).sum(), inputs)

    def by_definition(q, k, g):
        eye = torch.eye(7, dtype=torch.float64).expand(2, 2, 7, 7)  # as values, so that the output is the matrix
        return textbook(q, k, eye, g)

    for a, b in zip(gradients(attention_scores), gradients(by_definition), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind, log_decay", [("none", None), ("head", torch.zeros(2)), ("token", torch.zeros(1, 2, 3))])
def test_auto_changes_form_at_the_documented_length(kind, log_decay):
    cpu = torch.device("cpu")
    limit = CROSSOVER["cpu"][kind]
    assert resolve_format("auto", limit, cpu, log_decay) == "attention"
    assert resolve_format("auto", limit + 1, cpu, log_decay) == "chunk"
    assert resolve_format("rnn", 10, cpu, log_decay) == "rnn"


@pytest.mark.parametrize("spelling", ["Attention", "RNN", "Chunk", "AUTO"])
def test_format_is_accepted_in_any_case(spelling):
    x = torch.randn(1, 2, 5, 3)
    torch.testing.assert_close(
        bidirectional_linear_attention(x, x, x, format=spelling), bidirectional_linear_attention(x, x, x)
    )


X = torch.zeros(2, 3, 5, 4)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[0], X, X), {}, r"query has shape \(3, 5, 4\); it must have 4 dimensions"),
        ((X, X[:, :, :4], X), {}, "do not match"),
        ((X, X, X[:, :2]), {}, "do not match"),
        ((X.long(), X, X), {}, "must be floating point"),
        ((X, X, X, torch.zeros(4)), {}, r"must be None, or floating point of shape \(heads,\) = \(3,\)"),
        ((X, X, X, torch.zeros(2, 3, 5).long()), {}, "log_decay has shape"),
        ((X, X, X, torch.full((3,), 0.1)), {}, "positive or NaN entry"),
        ((X, X, X, torch.full((3,), math.nan)), {}, "positive or NaN entry"),
        ((X, X, X), {"format": "fast"}, "allowed are 'attention', 'rnn', 'chunk', 'auto'"),
        ((X, X, X), {"format": None}, "format is None"),
        ((X, X, X), {"chunk_size": 0}, "chunk_size is 0; it must be an integer of at least 1"),
        ((X, X, X), {"chunk_size": 2.5}, "chunk_size is 2.5"),
        ((X, X, X), {"scale": -1.0}, "scale is -1.0; it must be positive"),
        ((X, X, X), {"key_mask": torch.ones(5)}, r"key_mask has shape \(5,\); it must be \(batch, length\) = \(2, 5\)"),
        ((X, X, X), {"key_mask": torch.full((2, 5), -1e9)}, "values other than 0 and 1"),
    ],
    ids=lambda x: None,
)
def test_bad_arguments_say_what_was_given_and_what_is_allowed(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        bidirectional_linear_attention(*arguments, **options)


@pytest.mark.parametrize("number", ["int64", "uint8"])
@pytest.mark.parametrize("form", FORMS)
def test_integers_of_numpy_are_chunk_sizes(form, number):
    numpy = pytest.importorskip("numpy")
    q = torch.randn(1, 2, 300, 4, dtype=torch.double, requires_grad=True)
    log_decay = -torch.rand(1, 2, 300, dtype=torch.double)
    results = []
    for size in (3, getattr(numpy, number)(3)):
        y = bidirectional_linear_attention(q, q, q, log_decay, format=form, chunk_size=size)
        results.append((y, *torch.autograd.grad(y.square().sum(), q)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_values_are_checked_on_request_only():
    positive, bad_mask = torch.full((3,), 0.1), torch.full((2, 5), -1e9)
    with pytest.raises(ValueError, match="positive or NaN"):
        attention_scores(X, X, positive)
    attention_scores(X, X, positive, check_values=False)
    for form in FORMS:
        bidirectional_linear_attention(X, X, X, positive, format=form, check_values=False)
        bidirectional_linear_attention(X, X, X, key_mask=bad_mask, format=form, check_values=False)
