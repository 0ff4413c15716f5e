"""The best-of-n estimator against all draws, and the spread of scores."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from rlhf_recipes.tools.certificate.functional.samples import (
    best_of_n,
    describe,
    expected_best_of_n,
    score_spread,
)


def over_all_draws(proxy, gold, n):
    """Mean gold of the best by the proxy over all sets of n samples; among equals each is as likely."""
    means = []
    for drawn in combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in drawn)
        means.append(np.mean([gold[i] for i in drawn if proxy[i] == best]))
    return np.mean(means)


class TestExpectedBestOfN:
    def test_numbers(self):
        # Sorted by the proxy gold is 0, 6, 3. Of two: {1,2} gives 6, {1,3} and {2,3} give 3.
        assert expected_best_of_n([1.0, 2.0, 3.0], [0.0, 6.0, 3.0]).tolist() == pytest.approx([3.0, 4.0, 3.0])
        # Equal proxies: of both, either is taken.
        assert expected_best_of_n([5.0, 5.0], [0.0, 1.0]).tolist() == pytest.approx([0.5, 0.5])

    @given(st.lists(st.tuples(st.integers(0, 5), st.floats(-3, 3)), min_size=1, max_size=9))
    def test_it_is_the_mean_over_all_draws(self, rows):
        proxy, gold = zip(*rows, strict=True)
        expected = [over_all_draws(proxy, gold, n) for n in range(1, len(proxy) + 1)]
        assert expected_best_of_n(proxy, gold).tolist() == pytest.approx(expected, abs=1e-9)

    @given(st.lists(st.floats(-3, 3), min_size=1, max_size=30))
    def test_the_proxy_itself_never_falls(self, proxy):
        values = expected_best_of_n(proxy, proxy)
        assert (np.diff(values) >= -1e-9).all()
        assert values[-1] == pytest.approx(max(proxy))

    def test_many_samples(self):
        values = expected_best_of_n(np.arange(2000.0), np.ones(2000))
        assert values == pytest.approx(np.ones(2000), abs=1e-9)

    def test_it_is_unbiased(self):
        rng = np.random.default_rng(0)
        proxy = rng.normal(size=(4000, 8))
        gold = proxy + rng.normal(size=proxy.shape)
        estimates = np.array([expected_best_of_n(p, g)[3] for p, g in zip(proxy, gold, strict=True)])
        of_four = rng.normal(size=(200_000, 4)).max(axis=1)
        assert estimates.mean() == pytest.approx(of_four.mean(), abs=0.04)


class TestBestOfN:
    def test_numbers(self):
        proxy, gold = [1.0, 2.0, 3.0, 5.0, 9.0], [0.0, 2.0, 1.0, 0.0, 7.0]
        result = best_of_n(proxy, ["a", "a", "b", "b", "c"], gold)  # the prompt with one sample is left out
        assert result["prompts"] == 2
        first, second = result["curve"]
        assert (first["n"], first["kl"], first["proxy"]["value"], first["gold"]["value"]) == (1, 0.0, 2.75, 0.75)
        assert (second["n"], second["proxy"]["value"], second["gold"]["value"]) == (2, 3.5, 1.0)
        assert second["kl"] == pytest.approx(np.log(2) - 0.5)
        assert second["oracle"]["value"] == 1.5
        assert (result["gain"]["value"], result["best_n"], result["drop"]["value"]) == (0.25, 2, 0.0)

    def test_over_optimisation_shows(self):
        rng = np.random.default_rng(0)
        proxy = rng.normal(size=(40, 32))
        gold = proxy - proxy**2  # best at 0.5: choosing further up hurts
        result = best_of_n(proxy.ravel(), [str(i) for i in range(40) for _ in range(32)], gold.ravel())
        steps = [row["n"] for row in result["curve"]]
        assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
        assert result["gain"]["interval"][1] < 0
        assert result["drop"]["interval"][1] < 0
        assert result["best_n"] < 32

    def test_without_gold_scores(self):
        result = best_of_n([1.0, 2.0], ["a", "a"])
        assert set(result) == {"prompts", "curve"}
        assert set(result["curve"][0]) == {"n", "kl", "proxy"}

    def test_one_sample_for_most_prompts(self):
        assert best_of_n([1.0, 2.0, 3.0], ["a", "b", "c"]) is None


class TestScoreSpread:
    def test_numbers(self):
        spread = score_spread([0.0, 4.0], [3.0, 3.0, 6.0, 8.0])
        assert (spread["shift"], spread["outside"]) == (1.5, 0.5)
        assert spread["std_ratio"] == pytest.approx(np.std([3, 3, 6, 8]) / 2)
        assert spread["data"]["n"] == 2

    def test_intervals(self):
        rng = np.random.default_rng(0)
        data, samples = rng.normal(5.0, 2.0, 100), rng.normal(7.0, 1.0, 80)
        found = score_spread(data, samples)["intervals"]
        for name, statistic in {
            "shift": lambda drawn, axis: (drawn.mean(axis=axis) - data.mean()) / data.std(),
            "std_ratio": lambda drawn, axis: drawn.std(axis=axis) / data.std(),
        }.items():
            oracle = bootstrap((samples,), statistic, method="percentile", rng=1).confidence_interval
            assert found[name]["interval"] == pytest.approx([oracle.low, oracle.high], abs=0.02)
        copies = score_spread(data, np.repeat(samples[:20], 20), np.repeat(np.arange(20), 20))["intervals"]["shift"]
        once = score_spread(data, samples[:20])["intervals"]["shift"]
        assert copies["interval"] == pytest.approx(once["interval"])
        assert (copies["unit"], once["unit"]) == ("prompts", "prompts")

    def test_constant_data_has_no_scale(self):
        spread = score_spread([1.0, 1.0], [1.0, 2.0])
        assert spread["intervals"]["shift"]["interval"] is None
        assert spread["shift"] is spread["std_ratio"] is None


class TestDescribe:
    def test_numbers(self):
        summary = describe(np.arange(101.0))
        assert (summary["mean"], summary["n"]) == (50.0, 101)
        assert summary["std"] == pytest.approx(np.arange(101.0).std())
        assert [summary["quantiles"][q] for q in ("0.01", "0.05", "0.5", "0.99")] == [1.0, 5.0, 50.0, 99.0]
