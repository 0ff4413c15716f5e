"""The evidence from the last rollout, against the table of completions that TRL writes of the same rollout."""

from types import SimpleNamespace

import pandas as pd
import pytest

from rlhf_recipes.evaluation.callbacks.rollouts import rollout_evidence


def gold_score(completion_ids, **kwargs):
    return [None if ids[0] % 4 == 0 else float(7 * ids[0] % 11) for ids in completion_ids]


@pytest.fixture
def trainer(make_trainer, reward_adapter):
    funcs = [str(reward_adapter), gold_score]
    trainer = make_trainer(reward_funcs=funcs, reward_weights=[2.0, 0.0], log_completions=True, max_steps=2)
    trainer.train()
    return trainer


def test_samples_are_the_rows_of_the_last_rollout_by_their_ranks(trainer, tmp_path):
    table = pd.read_parquet(sorted((tmp_path / "run" / "completions").glob("*.parquet"))[-1])
    samples, _ = rollout_evidence(trainer, gold="gold_score")
    assert 2 < table["gold_score"].notna().sum() < len(table), "some scores are known, and some are not"
    assert len(samples) == min(10, table["gold_score"].notna().sum())
    known = table[table["gold_score"].notna()]
    distance = known["reward"].rank() - known["gold_score"].rank()
    worst = table.loc[distance.idxmax()]
    assert worst["reward"] < known["reward"].max(), "the highest reward alone must not be the answer"
    assert samples[0]["completion"] == worst["completion"]
    assert samples[0]["reward"] == pytest.approx(2 * worst["reward"])  # weighed
    assert samples[0]["rewards/reward"] == pytest.approx(worst["reward"])
    assert samples[0]["rewards/gold_score"] == worst["gold_score"]


def test_without_a_true_score_the_highest_rewards_and_unknown_scores_are_empty(trainer, tmp_path):
    for gold in (None, "not a function of this trainer"):
        samples, _ = rollout_evidence(trainer, gold)
        rewards = [sample["reward"] for sample in samples]
        assert rewards == sorted(rewards, reverse=True)
        golds = [sample["rewards/gold_score"] for sample in samples]
        assert None in golds
        assert all(gold is None or gold >= 0 for gold in golds)


def test_ngrams_are_sequences_of_four_tokens_of_the_completions(trainer):
    samples, ngrams = rollout_evidence(trainer)
    assert all(len(row["ngram"].split()) == 4 for row in ngrams)
    assert all(0 < row["share"] <= 1 for row in ngrams)
    shares = [row["share"] for row in ngrams]
    assert shares == sorted(shares, reverse=True)
    assert any(row["ngram"] in sample["completion"] for row in ngrams for sample in samples)


def test_a_trainer_without_rollouts_has_no_evidence():
    assert rollout_evidence(SimpleNamespace()) == ([], [])
