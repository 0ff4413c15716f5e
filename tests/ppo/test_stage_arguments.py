"""The rewards and the judge that the arguments of the PPO stage name."""

import pytest

from rlhf_recipes import PPOArguments
from rlhf_recipes.data.synthetic import GoldScore, write_gold
from rlhf_recipes.rewards import EnsembleReward, GatedReward, RemoteReward


def test_rewards_in_the_order_of_their_weights():
    arguments = PPOArguments(
        reward_adapter="a",
        reward_adapters=["b", "c"],
        reward_ensemble="mean_minus_std",
        reward_ensemble_k=0.5,
        reward_url="http://127.0.0.1:1/score",
    )
    adapter, ensemble, remote = arguments.rewards()
    assert adapter == "a"
    assert isinstance(ensemble, EnsembleReward)
    assert (ensemble.members, ensemble.aggregation, ensemble.k) == (["b", "c"], "mean_minus_std", 0.5)
    assert isinstance(remote, RemoteReward)
    assert PPOArguments().rewards() == []


def test_a_gate_takes_the_place_of_the_reward_that_it_gates():
    gate = {"gate_adapter": "b", "gate_threshold": 0.15, "gate_column": "unsafe"}
    gated, remote = PPOArguments(reward_adapter="a", reward_url="http://127.0.0.1:1/score", **gate).rewards()
    assert isinstance(gated, GatedReward)
    assert (gated.members, gated.threshold, gated.unsafe_column) == (["a", "b"], 0.15, "unsafe")
    assert isinstance(remote, RemoteReward)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward_adapter": "a", "gate_adapter": "b"}, "needs `gate_threshold`, a probability .* got None"),
        ({"reward_adapter": "a", "gate_adapter": "b", "gate_threshold": 1.0}, "needs `gate_threshold`, .* got 1.0"),
        ({"gate_adapter": "b", "gate_threshold": 0.15}, "a gate chooses between two rewards"),
        ({"reward_adapter": "a", "gate_threshold": 0.15}, "`gate_threshold` is of a gate, but there is none"),
        ({"reward_adapter": "a", "gate_column": "unsafe"}, "`gate_column` is of a gate, but there is none"),
    ],
)
def test_gates_that_lack_a_part_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PPOArguments(**fields)


def test_the_judge_is_a_gold_score_or_a_path(tmp_path):
    write_gold(tmp_path / "gold.json", eos_token_id=1)
    assert isinstance(PPOArguments(gold_score=str(tmp_path / "gold.json")).judge(), GoldScore)
    assert PPOArguments(gold_score="outputs/judge").judge() == "outputs/judge"
    assert PPOArguments().judge() is None
