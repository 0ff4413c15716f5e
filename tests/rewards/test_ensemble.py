"""Several reward models as one: the numbers, and members that do not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.rewards import EnsembleReward
from rlhf_recipes.rewards.ensemble import aggregate_scores

SCORES = [[1.0, 4.0, 0.0], [3.0, 4.0, 0.0], [5.0, 4.0, -9.0]]  # three members, three completions


def member(scores, name="member"):
    def function(prompts, **kwargs):
        return scores

    function.__name__ = name
    return function


class TestAggregateScores:
    def test_numbers(self):
        scores = torch.tensor(SCORES, dtype=torch.float64)
        spread = torch.tensor([(8 / 3) ** 0.5, 0.0, 18**0.5], dtype=torch.float64)
        expected = {
            "mean": [3.0, 4.0, -3.0],
            "min": [1.0, 4.0, -9.0],
            "mean_minus_std": [3.0 - 0.5 * (8 / 3) ** 0.5, 4.0, -3.0 - 0.5 * 18**0.5],
        }
        for aggregation, numbers in expected.items():
            rewards, disagreement = aggregate_scores(scores, aggregation, k=0.5)
            assert_close(rewards, torch.tensor(numbers, dtype=torch.float64))
            assert_close(disagreement, spread)

    @given(
        st.lists(st.tuples(*[st.floats(-100, 100)] * 3), min_size=2, max_size=5),
        st.floats(0.0, 3.0),
        st.floats(-10.0, 10.0),
    )
    def test_members_that_agree_and_shifts(self, rows, k, shift):
        scores = torch.tensor(rows, dtype=torch.float64)
        for aggregation in ("mean", "min", "mean_minus_std"):
            rewards, disagreement = aggregate_scores(scores, aggregation, k)
            assert (rewards <= scores.mean(0) + 1e-9).all(), "disagreement never pays"
            moved, same = aggregate_scores(scores + shift, aggregation, k)
            assert_close(moved, rewards + shift)
            assert_close(same, disagreement, atol=1e-6, rtol=1e-6)
            agreed, zero = aggregate_scores(scores[:1].repeat(3, 1), aggregation, k)
            assert_close(agreed, scores[0], atol=1e-6, rtol=1e-6)
            assert_close(zero, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0.0)
            assert_close(aggregate_scores(scores.flip(0), aggregation, k)[0], rewards, atol=1e-9, rtol=1e-9)

    @pytest.mark.parametrize("shape", [(3,), (1, 3), (0, 3), (2, 3, 1)])
    def test_shapes_that_are_no_ensemble(self, shape):
        with pytest.raises(ValueError, match="two or more members"):
            aggregate_scores(torch.zeros(shape), "mean")


def test_it_is_a_reward_function_and_logs_disagreement():
    metrics = {}
    reward = EnsembleReward([member(row) for row in SCORES], "mean_minus_std", k=0.5, name="trio")
    given = reward(prompts=["a"] * 3, log_metric=lambda name, value: metrics.update({name: value}))
    assert given == pytest.approx([3.0 - 0.5 * (8 / 3) ** 0.5, 4.0, -3.0 - 0.5 * 18**0.5])
    assert metrics == {"rewards/trio/disagreement": pytest.approx(((8 / 3) ** 0.5 + 18**0.5) / 3)}
    assert reward(prompts=["a"] * 3) == given, "outside of the trainer nothing is logged"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "two or more members"),
        ((["one/folder"],), "two or more members"),
        (("one/folder",), "two or more members"),
        ((["one/folder", "./one/folder"],), "in the ensemble twice"),
        ((["a", "b"], "max"), "`aggregation` must be one of"),
        ((["a", "b"], "mean", -1.0), "`k` must be a number from 0"),
        ((["a", "b"], "mean", float("nan")), "`k` must be a number from 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EnsembleReward(*arguments)


def test_async_members_are_refused():
    async def far(prompts, **kwargs):
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match="async function cannot be a member of the ensemble"):
        EnsembleReward([member([1.0]), far])


def test_members_that_are_not_loaded_or_give_no_number():
    with pytest.raises(TypeError, match="'a/folder' is not loaded. Give the ensemble to `PPOTrainer`"):
        EnsembleReward(["a/folder", "b/folder"])(prompts=["a"])
    for bad in (None, float("nan"), float("inf")):
        reward = EnsembleReward([member([1.0]), member([bad], "broken")])
        with pytest.raises(ValueError, match="'broken' gives .* finite score"):
            reward(prompts=["a"])
