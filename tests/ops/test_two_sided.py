"""`two_sided_attention` equals its definition, in every form, with every option, outputs and gradients."""

import pytest
from cases_two_sided import FORMS, assert_equals_the_textbook, cases
from hypothesis import given, settings


@settings(max_examples=100)
@given(case=cases())
def test_forms_equal_the_textbook_in_outputs_and_every_gradient(case):
    assert_equals_the_textbook(case, FORMS if case["seed"] % 5 else (*FORMS, "auto"))


@pytest.mark.slow
@settings(max_examples=1500)
@given(case=cases())
def test_forms_equal_the_textbook_in_many_cases(case):
    assert_equals_the_textbook(case, (*FORMS, "auto"))
