"""The rewards and the judge that the arguments of the PPO stage name."""

from rlhf_recipes import PPOArguments
from rlhf_recipes.data.synthetic import GoldScore, write_gold
from rlhf_recipes.rewards import EnsembleReward, RemoteReward


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


def test_the_judge_is_a_gold_score_or_a_path(tmp_path):
    write_gold(tmp_path / "gold.json", eos_token_id=1)
    assert isinstance(PPOArguments(gold_score=str(tmp_path / "gold.json")).judge(), GoldScore)
    assert PPOArguments(gold_score="outputs/judge").judge() == "outputs/judge"
    assert PPOArguments().judge() is None
