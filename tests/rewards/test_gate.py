"""The gate between helpfulness and safety, against the rule of Llama 2 written with its probabilities."""

import math

import pytest
import torch

from rlhf_recipes.rewards import GatedReward, gate_scores

HELPFUL, SAFE = [3.0, -1.0, 2.5, 0.5, 4.0], [-4.0, -1.7, -1.8, 2.0, -0.5]
TAGS = [False, False, False, True, False]


def constant(values, name="reward"):
    def reward(prompts, **kwargs):
        return values[: len(prompts)]

    reward.__name__ = name
    return reward


def by_the_paper(helpful, safe, threshold, tagged):
    """R_c of section 3.2.3, of scores between 0 and 1, and its logit."""
    r_h, r_s = (1 / (1 + math.exp(-score)) for score in (helpful, safe))
    r_c = r_s if tagged or r_s < threshold else r_h
    return math.log(r_c / (1 - r_c))


@pytest.mark.parametrize("threshold", [0.15, 0.5, 0.9])
def test_it_is_the_rule_of_the_paper(threshold):
    columns = [torch.tensor(values, dtype=torch.float64) for values in (HELPFUL, SAFE)]
    scores, gated = gate_scores(*columns, threshold, torch.tensor(TAGS))
    rows = list(zip(HELPFUL, SAFE, TAGS, strict=True))
    assert scores.tolist() == pytest.approx([by_the_paper(h, s, threshold, tag) for h, s, tag in rows])
    assert gated.tolist() == [tag or 1 / (1 + math.exp(-s)) < threshold for _, s, tag in rows]


def test_a_threshold_of_15_percent_lies_between_two_scores():
    """logit(0.15) = -1.7346."""
    scores, gated = gate_scores(torch.ones(2), torch.tensor([-1.73, -1.74]), 0.15, torch.zeros(2))
    assert gated.tolist() == [False, True]
    assert scores.tolist() == pytest.approx([1.0, -1.74])


def test_it_is_a_reward_function_and_logs_its_parts():
    metrics = {}
    reward = GatedReward(constant(HELPFUL), constant(SAFE), 0.15, unsafe_column="unsafe", name="both")
    given = reward(prompts=["a"] * 5, unsafe=TAGS, log_metric=lambda name, value: metrics.update({name: value}))
    assert given == [-4.0, -1.0, -1.8, 2.0, 4.0]
    assert metrics == {
        "rewards/both/helpfulness": pytest.approx(sum(HELPFUL) / 5),
        "rewards/both/safety": pytest.approx(sum(SAFE) / 5),
        "rewards/both/gated": pytest.approx(3 / 5),
    }
    assert reward.needed_columns == ["unsafe"]
    without = GatedReward(constant(HELPFUL), constant(SAFE), 0.15)
    assert without(prompts=["a"] * 5) == [-4.0, -1.0, -1.8, 0.5, 4.0], "tags that no column was named for"
    assert without.needed_columns == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", None, 0.15), "`safety` is None. A gate chooses between two rewards"),
        ((None, "b", 0.15), "`helpfulness` is None. A gate chooses between two rewards"),
        ((["a", "b"], "c", 0.15), "`helpfulness` is .* A gate chooses between two"),
        (("a", "./a", 0.15), "in the gate twice"),
        (("a", "b", None), "`threshold` must be a probability between 0 and 1, both excluded, got None"),
        (("a", "b", 0.0), "`threshold` must be a probability .* got 0.0"),
        (("a", "b", 1), "`threshold` must be a probability .* got 1"),
        (("a", "b", float("nan")), "`threshold` must be a probability .* got nan"),
        (("a", "b", True), "`threshold` must be a probability .* got True"),
    ],
)
def test_gates_that_lack_a_part_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GatedReward(*arguments)


def test_what_it_is_called_without_is_named():
    with pytest.raises(TypeError, match="The gate's member 'a/folder' is not loaded. Give the gate to `PPOTrainer`"):
        GatedReward("a/folder", constant(SAFE), 0.15)(prompts=["a"])
    reward = GatedReward(constant(HELPFUL), constant(SAFE), 0.15, unsafe_column="unsafe")
    with pytest.raises(
        ValueError, match=r"reads the column 'unsafe', which the rows do not have; .*\['prompts', 'topic'\]"
    ):
        reward(prompts=["a"], topic=["ride"])
    with pytest.raises(ValueError, match="column 'unsafe' has None, but must say true or false"):
        reward(prompts=["a"] * 2, unsafe=[True, None])
    with pytest.raises(ValueError, match="of one shape"):
        gate_scores(torch.zeros(2), torch.zeros(3), 0.15, torch.zeros(2))
    with pytest.raises(ValueError, match="must be a probability"):
        gate_scores(torch.zeros(2), torch.zeros(2), 1.5, torch.zeros(2))


def test_ppo_puts_both_on_its_base_and_looks_for_the_column_first(make_trainer, reward_adapter, prompts, tmp_path):
    import shutil

    other = shutil.copytree(reward_adapter, tmp_path / "safety")
    rows = prompts.add_column("unsafe", [index % 2 == 0 for index in range(len(prompts))])
    reward = GatedReward(str(reward_adapter), str(other), 0.4, unsafe_column="unsafe")
    trainer = make_trainer(reward_funcs=reward, dataset=rows, eval_dataset=rows, max_steps=1, num_iterations=1)
    assert set(trainer.roles.heads) == {"reward_0_0", "reward_0_1", "critic"}
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["rewards/gated/mean"] == pytest.approx(entry["rewards/gated/helpfulness"]), "two copies of one model"
    assert 0.0 < entry["rewards/gated/gated"] <= 1.0
    with pytest.raises(
        ValueError, match=r"reward 'gated' reads the column 'unsafe', but `train_dataset` has \['prompt'\]"
    ):
        make_trainer(reward_funcs=reward)
    with pytest.raises(ValueError, match="reads the column 'unsafe', but `eval_dataset` has"):
        make_trainer(reward_funcs=reward, dataset=rows)
