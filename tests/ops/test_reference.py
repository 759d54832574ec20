"""The textbook equals a calculation by hand, and its two definitions agree."""

import torch

from lion_hf.ops.reference import textbook, textbook_mask, textbook_recurrent


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
