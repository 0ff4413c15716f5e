import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.tools.ranking.votes import (
    Vote,
    check_undefeated,
    check_votes,
    identified_items,
    read_votes,
    votes_of_ranking,
)


class TestVotesOfRanking:
    def test_numbers(self):
        votes = votes_of_ranking(["a", "b", "c"], [3, 1, 1], group=7)
        assert votes == [Vote("b", "a", False, 7), Vote("c", "a", False, 7), Vote("b", "c", True, 7)]

    @given(st.lists(st.integers(1, 5), min_size=2, max_size=9))
    def test_every_pair_is_judged_once_by_its_ranks(self, ranks):
        votes = votes_of_ranking(range(len(ranks)), ranks)
        assert [{vote.winner, vote.loser} for vote in votes] == [
            {i, j} for i, j in itertools.combinations(range(len(ranks)), 2)
        ]
        for vote in votes:
            assert vote.tie == (ranks[vote.winner] == ranks[vote.loser])
            assert ranks[vote.winner] <= ranks[vote.loser]

    def test_numpy_ranks(self):
        assert votes_of_ranking(["a", "b"], np.array([2, 1])) == [Vote("b", "a")]
        assert votes_of_ranking(["a", "b"], np.array([2, 2]))[0].tie is True

    @pytest.mark.parametrize(
        ("items", "ranks", "message"),
        [
            (["a"], [1], "at least two items"),
            (["a", "b"], [1], "2 items and 1 ranks"),
            (["a", "b", "a"], [1, 2, 3], "contradicts itself: 'a' is in it twice"),
            (["a", "b"], [0, 1], "whole numbers from 1"),
            (["a", "b"], [1.5, 1], "whole numbers from 1"),
            (["a", "b"], [True, 2], "whole numbers from 1"),
            (["a", "b"], [1, None], "whole numbers from 1"),
        ],
    )
    def test_bad_rankings(self, items, ranks, message):
        with pytest.raises(ValueError, match=message):
            votes_of_ranking(items, ranks)


class TestReadVotes:
    def test_rows(self):
        rows = [{"winner": "a", "loser": "b", "rater": "x"}, {"winner": 1, "loser": 0, "tie": True, "group": "eve"}]
        assert read_votes(rows) == [Vote("a", "b"), Vote(1, 0, True, "eve")]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"winner": "b"}, "Vote 1 names no `loser`"),
            ({"winner": None, "loser": "b"}, "Vote 1 names no `winner`"),
            ({"winner": "a", "loser": "b", "tie": "yes"}, "`tie` of vote 1 must be true or false, got 'yes'"),
            ({"winner": "a", "loser": "b", "tie": None}, "`tie` of vote 1 must be true or false, got None"),
            ({"winner": "a", "loser": "b", "tie": 1}, "`tie` of vote 1 must be true or false, got 1"),
            ({"winner": "a", "loser": "a"}, "Vote 1 compares 'a' with itself"),
            ({"winner": math.nan, "loser": "b"}, "Vote 1 names no `winner`"),
            ({"winner": ["a"], "loser": "b"}, "The winner of vote 1 is a list"),
            ({"model_a": "a", "model_b": "b", "winner": "model_a"}, "Vote 1 names no `loser`; its columns are"),
        ],
    )
    def test_bad_rows_are_named(self, row, message):
        with pytest.raises(ValueError, match=message):
            read_votes([{"winner": "a", "loser": "b"}, row])


class TestCheckVotes:
    def test_order_of_items(self):
        votes = [Vote("b", "a"), Vote("a", "c")]
        assert check_votes(votes) == ["b", "a", "c"]
        assert check_votes(votes, ["a", "b", "c"]) == ["a", "b", "c"]
        assert check_votes(votes, ["z", "a", "b", "c"], allow_disconnected=True) == ["z", "a", "b", "c"]

    @pytest.mark.parametrize(
        ("votes", "items", "message"),
        [
            ([], None, "no votes"),
            ([Vote("b", "a"), Vote("a", "a")], None, "Vote 1 compares 'a' with itself"),
            ([Vote("b", "a"), Vote("a", "b", 1)], None, "`tie` of vote 1 must be true or false, got 1. Ranks"),
            ([Vote("a", "b", 0)], None, "`tie` of vote 0 must be true or false, got 0"),
            ([Vote("a", "b", "no")], None, "`tie` of vote 0 must be true or false, got 'no'"),
            ([Vote("a", None)], None, "Vote 0 names no `loser`"),
            ([Vote(math.nan, "a")], None, "Vote 0 names no `winner`"),
            ([Vote("a", "b")], ["a", "b", "a"], "lists an item twice"),
            ([Vote("a", "b")], ["a"], "1 items of the votes are not in `items`, such as 'b'"),
            ([Vote("a", "b")], ["a", "b", "c"], "1 of 3 items were never compared, such as 'c'"),
            ([Vote("a", "b"), Vote("c", "d", tie=True)], None, "2 parts: no chain of votes leads from 'a' to 'c'"),
        ],
    )
    def test_refuses(self, votes, items, message):
        with pytest.raises(ValueError, match=message):
            check_votes(votes, items)

    def test_long_items_are_cut(self):
        with pytest.raises(ValueError, match=r"such as 'xxx.{50,60}\.\.\.\. Leave"):
            check_votes([Vote("a", "b")], ["a", "b", "x" * 1000])


class TestCheckUndefeated:
    def test_refuses_undefeated_items(self):
        with pytest.raises(ValueError, match="2 of 4 items never lose to any of the others, such as 'a'"):
            check_undefeated([Vote("a", "b"), Vote("b", "a"), Vote("b", "c"), Vote("c", "d")], ["a", "b", "c", "d"])

    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=5, max_size=12))
    def test_agrees_with_brute_force(self, rows):
        # Finite scores exist if and only if no split of the items leaves one side without a loss or tie (Ford 1957).
        votes = [Vote(winner, loser, tie) for winner, loser, tie in rows if winner != loser]
        items = list(range(5))
        splits = [set(side) for size in range(1, 5) for side in itertools.combinations(items, size)]
        beaten = all(
            any(
                (vote.loser in side and vote.winner not in side)
                or (vote.tie and vote.winner in side and vote.loser not in side)
                for vote in votes
            )
            for side in splits
        )
        if not votes or {item for vote in votes for item in vote[:2]} != set(items):
            return
        if beaten:
            check_undefeated(votes, items)
        else:
            with pytest.raises(ValueError, match="never lose"):
                check_undefeated(votes, items)


class TestIdentifiedItems:
    def test_the_largest_part_that_beat_each_other(self):
        votes = [Vote("a", "b"), Vote("b", "c"), Vote("c", "b"), Vote("c", "d"), Vote("d", "c")]
        assert identified_items(votes) == {"b", "c", "d"}
        assert identified_items([*votes, Vote("e", "a"), Vote("a", "e")]) == {"b", "c", "d"}
        assert identified_items(votes, anchor="a") == set()

    @pytest.mark.parametrize(
        ("votes", "anchor", "expected"),
        [
            ("ab", None, ""),
            ("ab ba", None, "ab"),
            ("ab bc ca da", None, "abc"),
            ("ab bc ca ad", None, "abc"),
            ("ab ba cd dc ac", None, ""),
            ("ab ba cd dc ac", "d", "cd"),
            ("ab bc ca da", "d", ""),
            ("ab", "z", ""),
        ],
    )
    def test_by_hand(self, votes, anchor, expected):
        assert identified_items([Vote(*pair) for pair in votes.split()], anchor) == set(expected)
