"""A grade as a reward: its expected value by hand, and no reward where there is no grade."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.evaluation.judges import Budget
from rlhf_recipes.evaluation.judges.budget import BudgetSpentError
from rlhf_recipes.evaluation.judges.grades import GradeReward
from rlhf_recipes.rewards import checked


class Model:
    """Gives the probabilities, raises the error, or returns whatever it is told to."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def weigh(self, messages, options):
        self.asked.append((messages[-1]["content"], list(options)))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return dict.fromkeys(options, 0.0) | reply


def call(reward, count):
    return reward(prompts=["p"] * count, completions=[f"c{row}" for row in range(count)], completion_ids=[[1]] * count)


def test_numbers():
    model = Model({"1": 0.1, "5": 0.5}, {"10": 0.8, "9": 0.2})
    assert call(GradeReward(model, "Is it polite?"), 1) == [pytest.approx((0.1 + 2.5) / 0.6)]
    assert call(GradeReward(model, "Is it polite?", high=10), 1) == [pytest.approx(9.8)]
    asked, options = model.asked[1]
    assert options == [str(grade) for grade in range(1, 11)]
    assert "Is it polite?" in asked
    assert "from 1 (worst) to 10 (best)" in asked


def test_failures_have_no_reward_and_pass_the_check_of_rewards():
    failures = [ValueError("html"), {"1": 0.3}, {}, TimeoutError("slow")]
    model = Model({"4": 0.9}, *failures, {"2": 0.9})
    assert call(checked(GradeReward(model, "?")), 6) == [4.0, None, None, None, None, 2.0]


def test_it_gives_up_on_a_model_that_is_down_and_asks_again_the_next_time():
    model = Model(*[ConnectionError()] * 6)
    reward = GradeReward(model, "?", give_up_after=3)
    for _ in range(2):
        assert call(reward, 20) == [None] * 20
    assert len(model.asked) == 6


def test_a_spent_budget_gives_no_reward():
    class Counted(Model):
        def weigh(self, messages, options):
            budget.begin()
            return super().weigh(messages, options)

    budget = Budget(calls=2)
    assert call(GradeReward(Counted({"4": 1.0}, {"5": 1.0}), "?"), 4) == [4.0, 5.0, None, None]
    with pytest.raises(BudgetSpentError):
        budget.begin()


def test_ppo_pays_other_rewards_where_there_is_no_grade_and_stops_where_there_are_none(make_trainer):
    class EverySecond:
        """Grades every second completion that it is asked about with 5."""

        asked = 0

        def weigh(self, messages, options):
            self.asked += 1
            if self.asked % 2:
                raise ValueError("junk")
            return dict.fromkeys(options, 0.0) | {"5": 1.0}

    def one(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = make_trainer(reward_funcs=[GradeReward(EverySecond(), "?"), one], max_steps=1)
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "reward" in row)
    assert (logged["rewards/grade/mean"], logged["rewards/one/mean"]) == (5.0, 1.0)
    assert logged["reward"] == pytest.approx(1 + 5 / 2)
    alone = make_trainer(reward_funcs=GradeReward(EverySecond(), "?"), max_steps=1)
    with pytest.raises(ValueError, match=r"Every reward function \(grade\) returned None"):
        alone.train()


@given(st.dictionaries(st.sampled_from("12345"), st.floats(0, 0.2)), st.floats(0, 1))
def test_a_grade_lies_on_its_scale(weights, least_mass):
    [grade] = call(GradeReward(Model(weights), "?", least_mass=least_mass), 1)
    mass = sum(weights.values())
    assert (grade is None) == (mass == 0 or mass < least_mass)
    assert grade is None or (math.isfinite(grade) and 1 - 1e-9 <= grade <= 5 + 1e-9)


@pytest.mark.parametrize("options", [{"low": 5}, {"low": -1}, {"least_mass": 2}, {"workers": 0}, {"give_up_after": 0}])
def test_bad_numbers(options):
    with pytest.raises(ValueError, match="`low` must be at least 0 and below `high`"):
        GradeReward(Model(), "?", **options)
