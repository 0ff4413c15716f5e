"""What counts as a number, and what JSON has in place of others."""

import math

import numpy as np
import pytest

from rlhf_recipes.statistics.numbers import is_number, none_for_nonfinite, value_at


@pytest.mark.parametrize("value", [0, -3, 2.5, 10**400, np.float32(1.5), np.int64(2)])
def test_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [None, True, "3", math.nan, math.inf, -math.inf, np.float32("nan"), [1.0], 1j])
def test_no_numbers(value):
    assert not is_number(value)


def test_true_is_no_number():
    assert is_number(1)
    assert not is_number(True)


def test_json_has_none_for_numbers_that_are_not_finite():
    measures = {"kl": (1.0, math.inf, np.float64("nan")), 3: [{"deep": -math.inf}], "text": "nan", "flag": True}
    expected = {"kl": [1.0, None, None], "3": [{"deep": None}], "text": "nan", "flag": True}
    assert none_for_nonfinite(measures) == expected


def test_a_place_that_is_not_there_holds_nothing():
    answer = {"choices": [{"text": "Hi", "ids": [3]}]}
    assert value_at(answer, "choices", 0, "ids", 0) == 3
    assert value_at(answer) is answer
    for path in (("none",), ("choices", 1), ("choices", "text"), ("choices", 0, "text", "more"), (0,)):
        assert value_at(answer, *path) is None, path
    assert value_at(None, "choices") is value_at(3, 0) is None
