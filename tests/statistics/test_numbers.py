"""What counts as a number."""

import math

import numpy as np
import pytest

from rlhf_recipes.statistics.numbers import is_number


@pytest.mark.parametrize("value", [0, -3, 2.5, 10**400, np.float32(1.5), np.int64(2)])
def test_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [None, True, "3", math.nan, math.inf, -math.inf, np.float32("nan"), [1.0], 1j])
def test_no_numbers(value):
    assert not is_number(value)


def test_true_is_no_number():
    assert is_number(1)
    assert not is_number(True)
