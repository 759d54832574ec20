"""The textbooks equal calculations by hand, and their definitions agree with each other."""

import itertools
import math

import pytest
import torch

from lion_hf.ops.reference import (
    textbook,
    textbook_causal,
    textbook_exponents,
    textbook_mask,
    textbook_recurrent,
    textbook_scan,
    textbook_two_sided,
)


CONVENTIONS = ("left", "entered", "between", "edge")


def test_the_mask_multiplies_the_decays_of_the_tokens_that_a_key_leaves():
    a, b, c = 0.5, 0.25, 0.125
    expected = [[1, b, b * c], [a, 1, c], [a * b, b, 1]]
    assert textbook_mask(torch.tensor([a, b, c])).tolist() == expected


def test_one_query_by_hand():
    x = torch.tensor([[1.0], [2.0], [3.0]])[None, None]  # query, key and value
    decay = torch.tensor([[[0.5, 0.25, 0.125]]])
    weights = torch.tensor([2 * 1 * 0.5, 2 * 2 * 1, 2 * 3 * 0.125])  # weights of the second token
    y = textbook(x, x, x, decay.log(), scale=2.0)
    torch.testing.assert_close(y[0, 0, 1, 0], 2 * (weights * x[0, 0, :, 0]).sum())
    hidden = textbook(x, x, x, decay.log(), torch.tensor([[1, 1, 0]]), normalize=True, scale=2.0, eps=0.5)
    share = 2 * (weights * x[0, 0, :, 0])[:2].sum() / (2 * weights[:2].sum() + 0.5)
    torch.testing.assert_close(hidden[0, 0, 1, 0], share)


def test_the_recurrence_is_the_sum_over_the_mask():
    query, key, value = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)
    for decay in (torch.rand(2, 3, 7).double(), torch.ones(2, 3, 7).double(), torch.zeros(2, 3, 7).double()):
        y = textbook_recurrent(query, key, value, decay)
        torch.testing.assert_close(y, textbook(query, key, value, decay.log()), rtol=1e-12, atol=1e-12)


def test_the_conventions_differ_in_the_decays_of_both_ends():
    a, b, c, d = 0.5, 0.25, 0.125, 0.0625
    last = {
        "left": [a * b * c, b * c, c],
        "entered": [b * c * d, c * d, d],
        "between": [b * c, c, 1.0],
        "edge": [math.sqrt(a * d) * b * c, math.sqrt(b * d) * c, math.sqrt(c * d)],
    }
    for convention, expected in last.items():
        mask = textbook_exponents(torch.tensor([a, b, c, d], dtype=torch.float64).log(), convention).exp()
        torch.testing.assert_close(mask[3, :3], torch.tensor(expected, dtype=torch.float64))
        assert not mask.triu().any() and mask[1:].tril().diagonal().all()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_option_by_a_loop_over_pairs(convention):
    """Two tokens on each side of one query, each term written out, with a masked key and groups of heads."""
    generator = torch.Generator().manual_seed(0)
    heads, length, width = 2, 4, 3
    q, k, qb, kb = torch.randn(4, 1, 1, length, width, generator=generator, dtype=torch.float64)
    v, vb = torch.randn(2, 1, heads, length, 2, generator=generator, dtype=torch.float64)
    g, gb = -torch.rand(2, 1, heads, length, width, generator=generator, dtype=torch.float64)
    w, wb = torch.randn(2, 1, heads, length, generator=generator, dtype=torch.float64)
    keep = torch.tensor([[True, False, True, True]])

    def weight(g, h, i, j, c):
        low, high = min(i, j), max(i, j)
        between = sum(g[0, h, t, c] for t in range(low + 1, high))
        ends = {
            "left": g[0, h, j, c],
            "entered": g[0, h, i, c],
            "between": 0,
            "edge": (g[0, h, i, c] + g[0, h, j, c]) / 2,
        }
        return math.exp(between + ends[convention])

    n, c, m = torch.zeros(1, heads, length, 2), torch.zeros(1, heads, length), torch.zeros(1, heads, length)
    n, c, m = n.double(), c.double(), m.double()
    for h, i, j in itertools.product(range(heads), range(length), range(length)):
        if not keep[0, j]:
            continue
        query, key, value, decay, log_weight = (q, k, v, g, w) if j <= i else (qb, kb, vb, gb, wb)
        masks = [weight(decay, h, i, j, x) * math.exp(log_weight[0, h, j]) for x in range(width)]
        masks = masks if i != j else [math.exp(w[0, h, i])] * width
        score = sum(query[0, 0, i, x] * key[0, 0, j, x] * masks[x] for x in range(width)) * (0.7 if i == j else 1)
        n[0, h, i] += 0.4 * score * value[0, h, j]
        c[0, h, i] += 0.4 * score
        m[0, h, i] += sum(masks) / width

    def result(normalize, pair=False):
        return textbook_two_sided(
            q, k, v, g, convention=convention, diagonal=0.7, log_weight=w, backward_query=qb, backward_key=kb,
            backward_value=vb, backward_log_decay=gb, backward_log_weight=wb, normalize=normalize,
            return_denominator=pair, key_mask=keep, scale=0.4, eps=0.01,
        )  # fmt: skip

    divisors = {False: torch.ones_like(c), True: c + 0.01, "mask": m + 0.01, "clamp": c.abs().clamp(min=1)}
    for normalize, below in divisors.items():
        torch.testing.assert_close(result(normalize), n / below[..., None], rtol=1e-12, atol=1e-12)
        numerator, denominator = result(normalize, pair=True)
        torch.testing.assert_close(numerator, n, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(denominator, m if normalize == "mask" else c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("kind", ["random", "ones", "zeros"])
def test_recurrences_are_sums_over_pairs(convention, kind):
    query, key, value = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)
    decay = {"random": torch.rand, "ones": torch.ones, "zeros": torch.zeros}[kind](2, 3, 7, 4, dtype=torch.float64)

    def general(direction, *tensors):
        return textbook_two_sided(*tensors, decay.log(), convention=convention, direction=direction, scale=1.0)

    causal = textbook_causal(query, key, value, decay, convention)
    torch.testing.assert_close(general("forward", query, key, value), causal, rtol=1e-12, atol=1e-12)

    # Both sides as one scan each: the token's own decay is a part of what it reads or writes.
    shares = {"left": (0, 1), "entered": (1, 0), "between": (0, 0), "edge": (0.5, 0.5)}[convention]
    read, write = query * decay ** shares[0], key * decay ** shares[1]
    sides = [
        textbook_scan(*(x.flip(2) for x in (read, write, value, decay))).flip(2) if reverse
        else textbook_scan(read, write, value, decay)
        for reverse in (False, True)
    ]  # fmt: skip
    both = sum(sides) + (query * key).sum(-1, keepdim=True) * value
    torch.testing.assert_close(general("both", query, key, value), both, rtol=1e-12, atol=1e-12)


def test_the_general_textbook_has_lions_own_as_a_special_case():
    query, key, value = torch.rand(3, 2, 3, 9, 4, dtype=torch.float64)
    keep = torch.arange(9) < torch.tensor([[9], [5]])
    for log_decay in (None, -torch.rand(3).double(), -torch.rand(2, 3, 9).double()):
        for normalize in (False, True):
            expected = textbook(query, key, value, log_decay, keep, normalize)
            actual = textbook_two_sided(query, key, value, log_decay, key_mask=keep, normalize=normalize)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
