"""The mean of weights, by hand."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.reward_modeling.mean_weights import mean_weights


def test_mean_weights():
    members = [{"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([0.0])} for _ in range(3)]
    members[1]["w"] = torch.tensor([[4.0, -4.0]])
    members[2]["b"] = torch.tensor([6.0])
    mean = mean_weights(members)
    assert_close(mean, {"w": torch.tensor([[2.0, 0.0]]), "b": torch.tensor([2.0])}, rtol=0, atol=0)
    far = [{"w": torch.tensor([value])} for value in (3e8, 3.0, -3e8)]
    assert_close(mean_weights(far)["w"], torch.tensor([1.0]), rtol=0, atol=0, msg="added up in float64")


@pytest.mark.parametrize(
    "members",
    [[], [{"w": torch.zeros(1)}, {"w": torch.zeros(2)}], [{"w": torch.zeros(1)}, {"v": torch.zeros(1)}]],
)
def test_weights_that_do_not_fit_are_refused(members):
    with pytest.raises(ValueError, match="two or more|Models 0 and 1 differ"):
        mean_weights(members)
