import doctest
import math
import random
from functools import partial
from pathlib import Path

import evalica
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rlhf_recipes.tools.ranking.ranking import (
    ELO_PER_NAT,
    average_elo,
    bradley_terry,
    elo,
    round_robin_elo,
    win_probability,
)
from rlhf_recipes.tools.ranking.votes import Vote, votes_of_ranking

METHODS = [elo, partial(average_elo, rounds=5), round_robin_elo, bradley_terry]
RANKING = votes_of_ranking("abcd", [1, 2, 3, 4])


def random_votes(rng, items=6, size=40, ties=0.2):
    """Votes on items that are connected, in which everybody loses at times."""
    ring = [Vote(item, (item + 1) % items) for item in range(items)]
    pairs = [rng.sample(range(items), 2) for _ in range(size)]
    return ring + [Vote(*pair, tie=rng.random() < ties) for pair in pairs]


def posterior(votes, items, prior):
    """The most probable Bradley-Terry scores by a general optimizer, from the definition; mean 0."""

    def loss(scores):
        total = 2 * prior * np.sum(np.logaddexp(0, -scores) + np.logaddexp(0, scores)) / 2
        for winner, loser, tie, _ in votes:
            difference = scores[winner] - scores[loser]
            total += 0.5 * tie * np.logaddexp(0, difference) + (1 - 0.5 * tie) * np.logaddexp(0, -difference)
        return total

    found = minimize(loss, np.zeros(items), method="BFGS", options={"gtol": 1e-9}).x
    return found - found.mean()


class TestWinProbability:
    def test_numbers(self):
        # C35
        assert win_probability(400.0) == pytest.approx(10 / 11, abs=1e-12)
        assert win_probability(0.0) == 0.5
        assert pytest.approx(173.718, abs=5e-4) == ELO_PER_NAT
        assert win_probability(ELO_PER_NAT) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-12)
        assert (win_probability(1e9), win_probability(-1e9)) == (1.0, 0.0)


class TestElo:
    def test_numbers(self):
        # C35
        assert elo([Vote("a", "b")]) == {"a": 1516.0, "b": 1484.0}
        assert elo([Vote("a", "b", tie=True)]) == {"a": 1500.0, "b": 1500.0}
        scores = elo(RANKING)
        assert list(scores.values()) == pytest.approx([1545.83, 1515.36, 1484.77, 1454.04], abs=5e-3)

    def test_is_the_recursion(self):
        votes = random_votes(random.Random(0))
        scores = dict.fromkeys(range(6), 1000.0)
        for winner, loser, tie, _ in votes:
            gain = 20 * ((0.5 if tie else 1.0) - 1 / (1 + 10 ** ((scores[loser] - scores[winner]) / 400)))
            scores[winner], scores[loser] = scores[winner] + gain, scores[loser] - gain
        found = elo(votes, items=range(6), k=20, initial=1000)
        assert found == pytest.approx(scores, abs=1e-9)

    def test_an_item_without_votes_stays_where_it_was(self):
        assert elo([Vote("a", "b")], items=["c", "a", "b"], allow_disconnected=True)["c"] == 1500.0


class TestAverageElo:
    def test_numbers(self):
        # Two votes have two orders: a beats b and then c, or c and then b. The mean of both, by hand.
        votes = [Vote("a", "b"), Vote("a", "c")]
        second = 32 * (1 - win_probability(16))
        scores = average_elo(votes, rounds=2000)
        assert scores["a"] == pytest.approx(1516 + second, abs=1e-9)
        assert scores["b"] == pytest.approx(1500 - (16 + second) / 2, abs=0.1)

    def test_rounds_take_out_the_order(self):
        votes = random_votes(random.Random(1))
        turned = votes[::-1]
        once = max(abs(elo(votes)[item] - elo(turned)[item]) for item in range(6))
        averaged = [average_elo(way, rounds=200, seed=seed) for seed, way in enumerate((votes, turned))]
        assert max(abs(averaged[0][item] - averaged[1][item]) for item in range(6)) < once / 5

    def test_seed(self):
        votes = random_votes(random.Random(1))
        assert average_elo(votes, rounds=3, seed=4) == average_elo(votes, rounds=3, seed=4)
        assert average_elo(votes, rounds=3, seed=4) != average_elo(votes, rounds=3, seed=5)

    def test_refuses_no_rounds(self):
        with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
            average_elo(RANKING, rounds=0)


class TestRoundRobinElo:
    def test_numbers(self):
        # C35
        assert list(round_robin_elo(RANKING).values()) == [1548.0, 1516.0, 1484.0, 1452.0]
        tied = round_robin_elo(votes_of_ranking("abc", [1, 1, 3]), k=10, initial=0)
        assert tied == {"a": 5.0, "b": 5.0, "c": -10.0}


class TestBradleyTerry:
    def test_numbers(self):
        # Three wins to one: the odds are 3. With the prior of one win and one loss against 0: 2 s(x) - 1 = 1 - s(2x).
        scores = bradley_terry([Vote("a", "b")] * 3 + [Vote("b", "a")], prior=0)
        assert scores["a"] - scores["b"] == pytest.approx(math.log(3), abs=1e-8)
        [x, y] = bradley_terry([Vote("a", "b")]).values()
        assert x == -y
        assert 2 / (1 + math.exp(-x)) - 1 == pytest.approx(1 - 1 / (1 + math.exp(-2 * x)), abs=1e-8)

    @pytest.mark.parametrize("prior", [0, 0.1, 1.0])
    def test_is_the_most_probable(self, prior):
        votes = random_votes(random.Random(2))
        found = bradley_terry(votes, items=range(6), prior=prior)
        np.testing.assert_allclose(list(found.values()), posterior(votes, 6, prior), atol=1e-6)

    def test_prior_is_what_the_optimizer_finds(self):
        votes = random_votes(random.Random(4))
        found = bradley_terry(votes, items=range(6), prior=2.0)
        np.testing.assert_allclose(list(found.values()), posterior(votes, 6, 2.0), atol=1e-6)

    def test_agrees_with_evalica(self):
        votes = random_votes(random.Random(3), ties=0.5)
        winners = [evalica.Winner.Draw if vote.tie else evalica.Winner.X for vote in votes]
        result = evalica.bradley_terry(
            [vote.winner for vote in votes], [vote.loser for vote in votes], winners, solver="naive", tolerance=1e-12
        )
        logs = np.log(result.scores.sort_index())
        found = bradley_terry(votes, items=range(6), prior=0)
        np.testing.assert_allclose(list(found.values()), logs - logs.mean(), atol=1e-8)

    def test_undefeated_items_are_finite(self):
        scores = bradley_terry(RANKING, prior=0.01)
        np.testing.assert_allclose(
            list(scores.values()), posterior(votes_of_ranking(range(4), [1, 2, 3, 4]), 4, 0.01), atol=1e-4
        )
        spread = [max(bradley_terry(RANKING, prior=prior).values()) for prior in (0.01, 0.1, 1, 10)]
        assert spread == sorted(spread, reverse=True)
        with pytest.raises(ValueError, match="1 of 4 items never lose.*'a'.*Set `prior` above 0"):
            bradley_terry(RANKING, prior=0)

    def test_contradicting_votes_cancel_out(self):
        circle = [Vote("a", "b"), Vote("b", "c"), Vote("c", "a")]
        for votes in (circle, [Vote("a", "b"), Vote("b", "a")]):
            assert list(bradley_terry(votes).values()) == pytest.approx([0.0] * len(bradley_terry(votes)), abs=1e-9)

    def test_half_a_win_each_is_a_tie(self):
        rest = [Vote("a", "c"), Vote("c", "b")]
        tied = bradley_terry([*rest, Vote("a", "b", tie=True), Vote("a", "b", tie=True)])
        split = bradley_terry([*rest, Vote("a", "b"), Vote("b", "a")])
        assert tied == pytest.approx(split, abs=1e-8)

    def test_disconnected_parts_are_scored_apart(self):
        votes, more = [Vote("a", "b")], [Vote("c", "d"), Vote("c", "d")]
        with pytest.raises(ValueError, match="fall apart"):
            bradley_terry(votes + more)
        both = bradley_terry(votes + more, allow_disconnected=True)
        assert {item: both[item] for item in "ab"} == pytest.approx(bradley_terry(votes), abs=1e-8)
        assert {item: both[item] for item in "cd"} == pytest.approx(bradley_terry(more), abs=1e-8)
        assert bradley_terry(votes, items="xab", allow_disconnected=True)["x"] == pytest.approx(0.0, abs=1e-8)
        with pytest.raises(ValueError, match="fall apart"):  # without a prior nothing holds the parts together
            bradley_terry(votes + more, allow_disconnected=True, prior=0)

    def test_recovers_the_truth(self):
        # 400 votes a pair: the standard error of a difference is about 0.1.
        rng, truth = random.Random(0), [-1.5, -0.5, 0.0, 0.5, 1.5]
        votes = []
        for i in range(5):
            for j in range(i):
                for _ in range(400):
                    first = rng.random() < 1 / (1 + math.exp(truth[j] - truth[i]))
                    votes.append(Vote(i, j) if first else Vote(j, i))
        np.testing.assert_allclose(list(bradley_terry(votes, items=range(5)).values()), truth, atol=0.2)

    @pytest.mark.parametrize("prior", [-1.0, math.inf, math.nan])
    def test_bad_priors(self, prior):
        with pytest.raises(ValueError, match="`prior` must be 0 or more"):
            bradley_terry(RANKING, prior=prior)

    def test_a_fit_without_end_is_refused(self):
        chain = [Vote(item, item + 1) for item in range(100)]
        with pytest.raises(RuntimeError, match="Give a larger `prior`"):
            bradley_terry(chain, prior=1e-9)

    def test_a_fit_that_stops_early_does_not_hide_behind_many_votes(self):
        # evalica's last step leaves the chain 0.006 nats off. In votes that is little beside 60,000 others.
        chain = [Vote(item, item + 1) for item in range(1, 40)] * 4 + [Vote(item + 1, item) for item in range(1, 40)]
        with pytest.raises(RuntimeError, match=r"off by 0\.006\d* nats after evalica's last step"):
            bradley_terry([Vote(0, 1), Vote(1, 0)] * 30_000 + chain, prior=0)

    def test_evalica_gets_sides_and_no_ranks(self, monkeypatch):
        # Its `Winner` is an integer: 0 a draw, 1 the first side. A rank or an index would pass for one.
        given = []
        fit = evalica.bradley_terry
        monkeypatch.setattr(
            evalica, "bradley_terry", lambda *args, **options: given.extend(args[2]) or fit(*args, **options)
        )
        bradley_terry(votes_of_ranking("abc", np.array([2, 1, 2])))
        assert {type(side) for side in given} == {evalica.Winner}
        assert [side.name for side in given[:3]] == ["X", "Draw", "X"]
        for rank in (0, 1, 2, np.int64(1)):
            with pytest.raises(ValueError, match="`tie` of vote 0 must be true or false"):
                bradley_terry([Vote("a", "b", rank)])


@pytest.mark.parametrize("method", METHODS)
class TestAllMethods:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 1000), names=st.permutations("uvwxyz"))
    def test_permuting_ids_permutes_scores(self, method, seed, names):
        votes = random_votes(random.Random(seed))
        renamed = [Vote(names[vote.winner], names[vote.loser], vote.tie) for vote in votes]
        expected = {names[item]: score for item, score in method(votes).items()}
        assert method(renamed) == pytest.approx(expected, abs=1e-7)

    def test_order_of_items_is_kept(self, method):
        scores = method(RANKING, "dcba")
        assert list(scores) == list("dcba")
        assert scores == pytest.approx(method(RANKING), abs=1e-9)
        assert scores["a"] > scores["b"] > scores["c"] > scores["d"]

    def test_sum_stays(self, method):
        votes = random_votes(random.Random(5))
        assert sum(method(votes).values()) == pytest.approx(0.0 if method is bradley_terry else 6 * 1500.0, abs=1e-6)

    def test_refuses_disconnected_votes(self, method):
        with pytest.raises(ValueError, match="fall apart into 2 parts"):
            method([Vote("a", "b"), Vote("c", "d")])
        with pytest.raises(ValueError, match="never compared"):
            method([Vote("a", "b")], ["a", "b", "c"])
        with pytest.raises(ValueError, match="no votes"):
            method([])


@pytest.mark.parametrize("method", [elo, average_elo, round_robin_elo])
@pytest.mark.parametrize("k", [0.0, -1.0, math.inf, math.nan])
def test_bad_k(method, k):
    with pytest.raises(ValueError, match="`k` must be a positive number"):
        method(RANKING, k=k)


def test_examples_of_the_page_run():
    page = Path(__file__).parents[3] / "docs" / "rankings.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert failed == 0
    assert tried > 10
