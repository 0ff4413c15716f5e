import random
from functools import partial

import evalica
import numpy as np
import pytest

from rlhf_recipes.tools.ranking.ranking import bradley_terry, elo
from rlhf_recipes.tools.ranking.score_intervals import bootstrap_scores
from rlhf_recipes.tools.ranking.votes import Vote, votes_of_ranking


def votes_between(chances, size, rng):
    pairs = [(i, j) for i in range(len(chances)) for j in range(i)]
    votes = []
    for _ in range(size):
        i, j = rng.choice(pairs)
        first = rng.random() < chances[i] / (chances[i] + chances[j])
        votes.append(Vote(i, j) if first else Vote(j, i))
    return votes


class TestBootstrapScores:
    def test_agrees_with_evalica_where_votes_stand_alone(self):
        votes = votes_between([1, 2, 4], 150, random.Random(0))
        ours = bootstrap_scores(votes, elo, items=[0, 1, 2], resamples=2000)
        theirs = evalica.bootstrap(
            evalica.elo,
            [vote.winner for vote in votes],
            [vote.loser for vote in votes],
            [evalica.Winner.X] * len(votes),
            n_resamples=2000,
            bootstrap_method="percentile",
            random_state=1,
            k=32,
            initial=1500,
        )
        for item, (score, low, high) in ours.items():
            assert score == pytest.approx(theirs.result.scores[item], abs=1e-9)
            # Standard errors are about 45 points, and those of their quantiles about 2.5.
            assert low == pytest.approx(theirs.low[item], abs=8)
            assert high == pytest.approx(theirs.high[item], abs=8)

    def test_two_groups_by_hand(self):
        # A draw has group x twice (1/4), y twice (1/4) or both (1/2); a's scores are then the three below.
        votes = [Vote("a", "b", group="x"), Vote("a", "b", group="x"), Vote("b", "a", group="y")]
        cases = [votes[:2] * 2, votes[2:] * 2, votes]
        top, bottom, both = (bradley_terry(case, items=["a", "b"])["a"] for case in cases)
        score, low, high = bootstrap_scores(votes, bradley_terry, resamples=400, level=0.9)["a"]
        assert (score, low, high) == pytest.approx((both, bottom, top), abs=1e-8)
        score, low, high = bootstrap_scores(votes, bradley_terry, resamples=400, level=0.2)["a"]
        assert (score, low, high) == pytest.approx((both, both, both), abs=1e-8)

    def test_votes_of_a_group_are_no_independent_evidence(self):
        # 40 raters who each say the same thing five times know no more than 40 votes.
        said = votes_between([1, 2], 40, random.Random(0))
        alone = [vote for vote in said for _ in range(5)]
        raters = [vote._replace(group=rater) for rater, vote in enumerate(said) for _ in range(5)]
        wide, narrow = (bootstrap_scores(votes, bradley_terry, resamples=300)[0] for votes in (raters, alone))
        ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
        assert ratio == pytest.approx(np.sqrt(5), rel=0.25)

    def test_leads(self):
        # Of two items with mean 0 the lead of a over b is twice the score of a.
        votes = votes_between([1, 2], 40, random.Random(0))
        plain = bootstrap_scores(votes, bradley_terry, resamples=100)
        leads = bootstrap_scores(votes, bradley_terry, resamples=100, relative_to=0)
        assert leads[0] == (0.0, 0.0, 0.0)
        assert leads[1] == pytest.approx([2 * value for value in plain[1]], abs=1e-7)

    def test_lead_of_a_pair_that_always_plays_together(self):
        # Who meets c moves both scores of a and b alike: their lead is known better than their scores.
        rng = random.Random(0)
        votes = [vote for group in range(40) for vote in self.round_of(group, rng)]
        plain = bootstrap_scores(votes, bradley_terry, resamples=200)["a"]
        lead = bootstrap_scores(votes, bradley_terry, resamples=200, relative_to="b")["a"]
        assert lead.high - lead.low < plain.high - plain.low

    def round_of(self, group, rng):
        first = rng.random() < 0.5
        lost = [Vote(item, "c", group=group) if first else Vote("c", item, group=group) for item in "ab"]
        return [*lost, Vote("a", "b", tie=True, group=group)]

    def test_groups_may_leave_items_out(self):
        votes = [
            vote for name in "bcd" for order in ([1, 2], [2, 1]) for vote in votes_of_ranking(["a", name], order, name)
        ]
        intervals = bootstrap_scores(votes, bradley_terry, resamples=50)
        assert all(interval.low <= interval.score <= interval.high for interval in intervals.values())
        assert list(intervals) == ["a", "b", "c", "d"]

    @pytest.mark.parametrize("method", [bradley_terry, elo])
    def test_an_item_without_a_loss_or_a_win_has_no_interval(self, method):
        # "new" won its only votes and "old" lost them all: no draw holds another outcome, whatever the method.
        votes = votes_between([1, 2, 4], 60, random.Random(0))
        votes += [Vote("new", item) for item in range(3)] + [Vote(item, "old") for item in range(3)]
        found = bootstrap_scores(votes, method, resamples=50)
        assert {item for item, interval in found.items() if interval.low is None} == {"new", "old"}
        assert str(found["new"]).endswith("(not identified)")
        assert found["new"].score == method(votes)["new"]
        assert all(interval.high is None for item, interval in found.items() if item in ("new", "old"))

    def test_a_group_that_never_loses_is_not_identified_beside_the_others(self):
        # a and b beat each other, so do c and d; but no one of the second two ever beats one of the first.
        votes = [Vote("a", "b"), Vote("b", "a"), Vote("c", "d"), Vote("d", "c"), Vote("a", "c"), Vote("b", "d")] * 5
        assert all(interval.low is None for interval in bootstrap_scores(votes, bradley_terry, resamples=20).values())
        leads = bootstrap_scores(votes, bradley_terry, relative_to="a", resamples=20)
        assert {item for item, interval in leads.items() if interval.low is not None} == {"a", "b"}

    def test_a_tie_is_half_a_loss(self):
        votes = [Vote("a", "b"), Vote("a", "b", tie=True)] * 10
        assert bootstrap_scores(votes, bradley_terry, resamples=50)["a"].low is not None

    @pytest.mark.slow
    def test_covers_the_truth(self):
        truth = np.log([1, 2, 4, 8])
        truth -= truth.mean()
        covered = 0
        for seed in range(100):
            votes = votes_between([1, 2, 4, 8], 400, random.Random(seed))
            intervals = bootstrap_scores(votes, partial(bradley_terry, prior=0.1), range(4), resamples=200)
            covered += sum(intervals[item].low <= truth[item] <= intervals[item].high for item in range(4))
        assert 0.90 <= covered / 400 <= 0.99

    def test_seed(self):
        votes = votes_between([1, 2], 20, random.Random(0))
        one, again, other = (bootstrap_scores(votes, bradley_terry, resamples=20, seed=seed) for seed in (0, 0, 1))
        assert one == again != other

    def test_refusals(self):
        with pytest.raises(ValueError, match="All votes are in one group"):
            bootstrap_scores(votes_of_ranking("abc", [1, 2, 3], group=0), bradley_terry)
        for bad in ({"level": 95}, {"resamples": 0}):
            with pytest.raises(ValueError, match="0 < `level` < 1 and `resamples` from 1 on"):
                bootstrap_scores([Vote("a", "b")] * 2, bradley_terry, **bad)
        with pytest.raises(ValueError, match="`relative_to` is 'x', which is none of the 2 items"):
            bootstrap_scores([Vote("a", "b")] * 2, bradley_terry, relative_to="x")
        with pytest.raises(ValueError, match="fall apart"):
            bootstrap_scores([Vote("a", "b"), Vote("c", "d")], bradley_terry)
        with pytest.raises(ValueError, match="Set `prior` above 0"):  # in a draw
            bootstrap_scores([Vote("a", "b"), Vote("b", "a")], partial(bradley_terry, prior=0))
