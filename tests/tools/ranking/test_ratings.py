from functools import partial

import numpy as np
import pytest
from datasets import Dataset

from rlhf_recipes.data.preferences import check_preferences
from rlhf_recipes.tools.ranking.ranking import bradley_terry, elo, round_robin_elo
from rlhf_recipes.tools.ranking.ratings import rate_rankings
from rlhf_recipes.tools.ranking.votes import Vote


def table(*rows):
    return Dataset.from_list([dict(zip(("prompt", "completions", "ranks"), row, strict=True)) for row in rows])


class TestRateRankings:
    def test_numbers(self):
        # C35, each ranking alone; [1, 1, 3] with ties
        rated = rate_rankings(
            table(("q", ["a", "b", "c", "d"], [4, 3, 2, 1]), ("q", ["a", "b", "c"], [1, 1, 3])),
            round_robin_elo,
            normalize=False,
        )
        assert rated["ratings"][:] == [[1452.0, 1484.0, 1516.0, 1548.0], [1516.0, 1516.0, 1468.0]]

    def test_normalized(self):
        rankings = table(("q", list("abcd"), [4, 3, 2, 1]), ("r", list("abc"), [1, 1, 3]))
        plain = rate_rankings(rankings, normalize=False)["ratings"][:]
        rated = rate_rankings(rankings)["ratings"][:]
        flat, flat_plain = (np.concatenate(rows) for rows in (rated, plain))
        assert flat.mean() == pytest.approx(0.0, abs=1e-12)
        assert flat.std() == pytest.approx(1.0, abs=1e-12)
        np.testing.assert_allclose(np.corrcoef(flat, flat_plain)[0, 1], 1.0, atol=1e-12)
        assert rated == [pytest.approx(row) for row in rate_rankings(rankings, partial(bradley_terry))["ratings"][:]]

    def test_pool_prompt(self):
        # Three raters rank overlapping completions of one prompt; another prompt has one of the texts, too.
        rankings = table(
            ("q", ["a", "b"], [1, 2]), ("q", ["c", "b"], [2, 1]), ("q", ["b", "a"], [1, 2]), ("r", ["a", "z"], [1, 2])
        )
        rated = rate_rankings(rankings, pool="prompt", normalize=False)["ratings"][:]
        pooled = bradley_terry([Vote("a", "b"), Vote("b", "c"), Vote("b", "a")])
        alone = bradley_terry([Vote("a", "z")])
        for row, scores in zip(rated, (pooled, pooled, pooled, alone), strict=True):
            completions = rankings["completions"][rated.index(row)]
            assert row == pytest.approx([scores[text] for text in completions], abs=1e-8)

    def test_pool_all(self):
        # Model names as completions: under every prompt the same item.
        rankings = table(("q", ["x", "y"], [1, 2]), ("r", ["y", "z"], [1, 2]), ("s", ["z", "x"], [1, 1]))
        rated = rate_rankings(rankings, pool="all", normalize=False)["ratings"][:]
        scores = bradley_terry([Vote("x", "y"), Vote("y", "z"), Vote("z", "x", tie=True)])
        assert np.concatenate(rated) == pytest.approx([scores[text] for text in "xyyzzx"], abs=1e-8)
        with pytest.raises(ValueError, match="fall apart"):
            rate_rankings(table(("q", ["a", "b"], [1, 2]), ("r", ["c", "d"], [1, 2])), pool="all")

    def test_votes_come_in_the_order_of_rows(self):
        rankings = table(("q", ["x", "y"], [1, 2]), ("r", ["y", "z"], [1, 2]), ("s", ["z", "x"], [1, 2]))
        rated = rate_rankings(rankings, elo, pool="all", normalize=False)["ratings"][:]
        scores = elo([Vote("x", "y"), Vote("y", "z"), Vote("z", "x")])
        assert rated[0] == [scores["x"], scores["y"]]

    def test_chats_and_other_columns(self):
        prompt = [{"role": "user", "content": "hi"}]
        chats = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
        rankings = Dataset.from_list(
            [{"prompt": prompt, "completions": chats, "ranks": [2, 1], "source": "x", "ratings": None}]
        )
        rated = rate_rankings(rankings, pool="prompt")
        assert rated[0]["ratings"] == pytest.approx([-1.0, 1.0])
        assert rated.column_names == ["prompt", "completions", "source", "ratings"]
        assert rated.remove_columns("ratings")[:] == rankings.remove_columns(["ranks", "ratings"])[:]

    def test_tokens_tell_texts_apart(self):
        # The same words, once with an end token and once cut off before it; equal in both, they are one item.
        rankings = table(("q", ["a", "a", "a"], [1, 2, 1])).add_column("completion_ids", [[[5, 1], [5], [5, 1]]])
        expected = bradley_terry([Vote("finished", "cut")])
        for pool in ("row", "prompt"):
            rated = rate_rankings(rankings, pool=pool, normalize=False)["ratings"][0]
            assert rated == [expected["finished"], expected["cut"], expected["finished"]]
        with pytest.raises(ValueError, match="Row 0 contradicts itself"):
            rate_rankings(rankings, pool="all")

    def test_the_result_is_a_preference_table(self):
        # Pooled ratings contradict the last ranking, and equal completions must be rated alike to the last bit.
        rankings = table(*[("q", list("abca"), [1, 2, 3, 1])] * 2, ("q", list("abca"), [3, 2, 1, 3]))
        for pool in ("row", "prompt", "all"):
            check_preferences(rate_rankings(rankings, pool=pool))

    @pytest.mark.parametrize(
        ("row", "pool", "message"),
        [
            (("q", ["a", "b"], [1, 2, 3]), "row", "Row 1 has no ranking"),
            (("q", ["a", "b"], None), "row", "Row 1 has no ranking"),
            (("q", None, [1, 2]), "row", "Row 1 has no ranking"),
            (("q", ["a", "b"], [0, 1]), "row", "Row 1: Ranks are whole numbers from 1"),
            (("q", ["a"], [1]), "row", "Row 1 has fewer than two"),
            (("q", ["a", "a"], [1, 2]), "row", r"Row 1 contradicts itself: it gives the ranks 1 and 2.*\(a\)"),
            (("q", ["a", "a"], [1, 1]), "all", "Row 1 has fewer than two distinct"),
        ],
    )
    def test_bad_rows_are_named(self, row, pool, message):
        with pytest.raises(ValueError, match=message):
            rate_rankings(table(("q", ["a", "b"], [1, 2]), row), pool=pool)

    def test_bad_tables(self):
        with pytest.raises(ValueError, match=r"Expected a table with \['ranks'\]"):
            rate_rankings(Dataset.from_dict({"prompt": ["q"], "completions": [["a", "b"]]}))
        with pytest.raises(ValueError, match="All ratings are equal"):
            rate_rankings(table(("q", ["a", "b"], [1, 1])))
