"""`two_sided_attention` equals its definition, in every form, with every option, outputs and gradients."""

import pytest
from cases_two_sided import BASE, FORMS, assert_equals_the_textbook, case, cases
from hypothesis import given, settings


# Each option alone, beside a plain call: the call must not be taken for LION's own operator.
ALONE = [
    {"convention": "entered"}, {"convention": "between"}, {"convention": "edge"}, {"direction": "forward"},
    {"direction": "backward"}, {"diagonal": 0.0}, {"diagonal": 2}, {"diagonal": "head"}, {"diagonal": "token"},
    {"weight": "small"}, {"backward_weight": "small"}, {"weight": "small", "backward_weight": None},
    {"backward": ("query",)}, {"backward": ("key",)}, {"backward": ("value",)}, {"backward_rank": None},
    {"backward_rank": 1}, {"backward_rank": 4}, {"rank": 2}, {"rank": 4}, {"rank": None, "backward_rank": 3},
    {"groups": 2}, {"groups": 1}, {"normalize": True}, {"normalize": "mask"}, {"normalize": "clamp"}, {"pair": True},
    {"packed": True}, {"mask": "random"}, {"rank": 1, "convention": "between"}, {"rank": None, "convention": "between"},
    {"rank": 1}, {"rank": None}, {},
]  # fmt: skip


@pytest.mark.parametrize("changes", ALONE, ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) or "plain")
def test_each_option_alone_equals_the_textbook(changes):
    assert changes.keys() <= BASE.keys()
    assert_equals_the_textbook(case(**changes))


@pytest.mark.parametrize("normalize", [True, "mask", "clamp"])
@pytest.mark.parametrize("diagonal", [0.0, "token", "head"])
@pytest.mark.parametrize("rank", [3, 4])
def test_large_log_weights_count_only_where_they_are_read(rank, diagonal, normalize):
    """A token with a large weight of its own reads neighbours with small ones, unless it reads itself."""
    for gates in ("mild", "saturated", "dead"):
        assert_equals_the_textbook(
            case(rank=rank, gates=gates, weight="large", diagonal=diagonal, normalize=normalize, convention="between")
        )


@settings(max_examples=100)
@given(case=cases())
def test_forms_equal_the_textbook_in_outputs_and_every_gradient(case):
    assert_equals_the_textbook(case, FORMS if case["seed"] % 5 else (*FORMS, "auto"))


@pytest.mark.slow
@settings(max_examples=1500)
@given(case=cases())
def test_forms_equal_the_textbook_in_many_cases(case):
    assert_equals_the_textbook(case, (*FORMS, "auto"))
