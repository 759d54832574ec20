"""Errors of `two_sided_attention` name the argument, what is allowed, and how to mend it."""

import math

import pytest
import torch
from cases_two_sided import FORMS

from lion_hf.ops.api import two_sided_attention


X = torch.rand(2, 4, 5, 6)
LESS = torch.zeros(2, 4, 5)
DECAYS = r"log_decay has shape .* it must be None, or floating point of shape \(heads,\), \(heads, head_dim\), "


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": X[0]}, r"query has shape \(4, 5, 6\); it must have 4 dimensions .* Use view\("),
        ({"backward_key": X[0]}, r"backward_key has shape \(4, 5, 6\); it must have 4 dimensions"),
        (
            {"key": X[:, :, :4]},
            "shapes of query .* key .* value .* do not match: query and key must have the same shape",
        ),
        ({"key": X[..., :3]}, "do not match"),
        ({"value": X[:, :, :4]}, "do not match"),
        ({"value": X[:1]}, "do not match"),
        ({"backward_query": X[:, :2]}, r"shapes of backward_query \(2, 2, 5, 6\), backward_key .* do not match"),
        ({"backward_value": X[..., :3]}, "Values of both sides have the same shape"),
        ({"query": X[:, :3], "key": X[:, :3]}, "query and key have 3 heads and value has 4; .* a divisor of it"),
        ({"value": X.long()}, r"value has dtype torch.int64; it must be floating point. Convert it with .float\(\)"),
        ({"log_decay": torch.zeros(3)}, DECAYS + r".* here one of \(4,\), \(4, 6\), \(2, 4, 5\), \(2, 4, 5, 6\)"),
        ({"log_decay": torch.zeros(1, 4, 5)}, DECAYS),
        ({"log_decay": torch.zeros(2, 4, 1, 6)}, DECAYS),
        ({"log_decay": LESS.long()}, DECAYS),
        ({"backward_log_decay": torch.zeros(6)}, "backward_" + DECAYS),
        ({"log_decay": LESS + 0.1}, "log_decay has a positive or NaN entry .* Use logsigmoid"),
        ({"backward_log_decay": torch.full((4, 6), math.nan)}, "backward_log_decay has a positive or NaN entry"),
        ({"backward_log_decay": "none"}, "backward_log_decay is 'none'; allowed are 'same'"),
        ({"backward_log_weight": "different"}, "backward_log_weight is 'different'; allowed are 'same'"),
        ({"log_weight": torch.zeros(4, 5)}, r"log_weight has shape \(4, 5\) .* \(batch, heads, length\) = \(2, 4, 5\)"),
        ({"log_weight": LESS.long()}, "log_weight has shape .* dtype torch.int64; it must be None, or floating point"),
        ({"backward_log_weight": torch.zeros(1, 4, 5)}, r"backward_log_weight has shape \(1, 4, 5\)"),
        ({"diagonal": torch.zeros(4, 5)}, r"diagonal has shape \(4, 5\) .* None, a number, or floating point of shape"),
        ({"diagonal": torch.zeros(3)}, r"diagonal has shape \(3,\)"),
        ({"diagonal": LESS.long()}, "diagonal has shape .* dtype torch.int64"),
        ({"diagonal": "free"}, "diagonal is 'free'; it must be None, a number or a tensor"),
        ({"convention": "right"}, "convention is 'right'; allowed are 'left', 'entered', 'between', 'edge'"),
        ({"convention": None}, "convention is None; allowed are"),
        ({"direction": "causal"}, "direction is 'causal'; allowed are 'both', 'forward', 'backward'"),
        ({"normalize": "rows"}, "normalize is 'rows'; allowed are False, True, 'mask', 'clamp'"),
        ({"normalize": None}, "normalize is None; allowed are"),
        ({"format": "fast"}, "format is 'fast'; allowed are 'attention', 'rnn', 'chunk', 'auto'"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be an integer of at least 1"),
        ({"scale": 0.0}, "scale is 0.0; it must be positive"),
        ({"key_mask": torch.ones(5)}, r"key_mask has shape \(5,\); it must be \(batch, length\) = \(2, 5\)"),
        ({"key_mask": torch.full((2, 5), -1e9)}, "key_mask holds values other than 0 and 1; .* Convert"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens was given with a batch of 2; .* Concatenate the rows"),
        ({"cu_seqlens": [0, 5]}, r"cu_seqlens is a list; it must be .* Use torch.tensor\(cu_seqlens\)"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_say_what_was_given_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        two_sided_attention(**{"query": X, "key": X, "value": X} | changes)


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 4, 3, 5]])
def test_bounds_divide_the_row(bounds):
    with pytest.raises(ValueError, match="must begin with 0, end with 5, the number of tokens of the row, and never"):
        two_sided_attention(X[:1], X[:1], X[:1], convention="edge", cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("form", FORMS)
def test_values_are_checked_on_request_only(form):
    options = {"check_values": False, "format": form, "convention": "edge"}
    for log_decay in (LESS + 0.1, torch.full((2, 4, 5, 6), 0.1)):
        two_sided_attention(X, X, X, log_decay, **options)
        two_sided_attention(X, X, X, backward_log_decay=log_decay, **options)
    two_sided_attention(X, X, X, key_mask=torch.full((2, 5), -1e9), **options)


@pytest.mark.parametrize("name", ["query", "key", "value", "log_weight", "diagonal"])
def test_batch_and_length_never_broadcast(name):
    tensors = {"query": X, "key": X, "value": X, "log_weight": LESS, "diagonal": LESS}
    for narrow in (tensors[name][:1], tensors[name][:, :, :1]):
        with pytest.raises(ValueError, match=name):
            two_sided_attention(**tensors | {name: narrow})


def test_every_spelling_of_a_number_is_a_diagonal():
    numpy = pytest.importorskip("numpy")
    expected = two_sided_attention(X, X, X, diagonal=torch.full((4,), 2.0))
    for two in (2, 2.0, numpy.float64(2), numpy.float32(2)):
        torch.testing.assert_close(two_sided_attention(X, X, X, diagonal=two), expected)
    one = two_sided_attention(X, X, X, diagonal=1.0)
    torch.testing.assert_close(two_sided_attention(X, X, X), one)
