"""The mask: what it lets through, and what does not fit it."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.masks import check_shapes, counted


def test_counted_stops_values_and_gradients():
    values = torch.tensor([[2.0, 3.0, math.nan, math.inf]], requires_grad=True)
    kept = counted(values, torch.tensor([[1, 0, 0, 0]]))
    (kept * torch.tensor([[5.0, math.nan, math.inf, 1.0]])).sum().backward()
    assert kept.tolist() == [[2.0, 0.0, 0.0, 0.0]]
    assert_close(values.grad, torch.tensor([[5.0, 0.0, 0.0, 0.0]]))


def test_counted_gives_every_token_the_number_of_its_sequence():
    assert counted(torch.tensor([[2.0], [3.0]]), torch.tensor([[1, 0], [1, 1]])).tolist() == [[2.0, 0.0], [3.0, 3.0]]


def test_check_shapes_names_what_is_wrong():
    mask, good = torch.ones(2, 3), torch.ones(2, 3)
    check_shapes(mask, rewards=good, values=good)
    for wrong in [(2, 1), (3,), (3, 2), ()]:
        with pytest.raises(ValueError, match="`values` has shape") as error:
            check_shapes(mask, rewards=good, values=torch.ones(wrong))
        assert str(error.value) == (
            f"`values` has shape {wrong}, but `mask` has shape (2, 3). "
            "Give every tensor one entry per token, shape (B, T)."
        )
