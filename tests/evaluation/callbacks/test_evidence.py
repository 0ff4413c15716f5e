"""The evidence from the last rollout, against the table of completions that TRL writes of the same rollout."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.evaluation.callbacks.evidence import most_suspicious, rollout_evidence


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


SCORES = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0, math.nan, math.inf]))


def test_ranks_are_compared():
    # ranks of the reward 1 2 3 4, of the true score 4 1 3 2: the distances are -3, 1, 0 and 2
    assert most_suspicious([0.0, 1.0, 2.0, 3.0], [900.0, -900.0, 0.5, 0.4]) == [3, 1, 2, 0]


def test_equal_scores_share_a_rank_and_keep_their_order():
    assert most_suspicious([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == [0, 1, 2]
    assert most_suspicious([1.0, 1.0, 0.0], [0.0, 1.0, 0.0]) == [0, 1, 2]  # 2.5 - 1.5, 2.5 - 3, 1 - 1.5


def test_without_a_true_score_the_highest_rewards():
    assert most_suspicious([0.1, 3.0, 2.0, -1.0], most=2) == [1, 2]


def test_unknown_scores_are_left_out():
    assert most_suspicious([math.nan, 1.0, math.inf, 2.0], [0.0, 1.0, 2.0, math.nan]) == [1]
    assert most_suspicious([]) == []


@given(st.lists(st.tuples(SCORES, SCORES), max_size=12), st.integers(1, 12))
def test_as_by_counting(rows, most):
    known = [i for i, row in enumerate(rows) if all(map(math.isfinite, row))]

    def rank(column, i):
        below = sum(rows[j][column] < rows[i][column] for j in known)
        same = sum(rows[j][column] == rows[i][column] for j in known)
        return below + (same + 1) / 2

    expected = sorted(known, key=lambda i: rank(1, i) - rank(0, i))[:most]
    assert most_suspicious([row[0] for row in rows], [row[1] for row in rows], most) == expected


@pytest.mark.parametrize("truth", [None, [1.0, 2.0]])
def test_most_is_the_limit(truth):
    assert len(most_suspicious([1.0, 2.0], truth, most=1)) == 1
