"""Which completions are suspicious, against ranks counted by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.evaluation.evidence import most_suspicious

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
