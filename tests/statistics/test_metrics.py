"""Win rates and confidence intervals against enumeration, closed forms and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlhf_recipes.statistics.metrics import (
    bootstrap_interval,
    length_controlled_interval,
    length_controlled_reward,
    length_controlled_win_rate,
    proportion_interval,
    ratio_interval,
    share_interval,
    sign_test,
    token_mean,
    win_outcomes,
    win_rate,
)

scores = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=20)


class TestWinRate:
    def test_numbers(self):
        assert win_outcomes([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 4.0]).tolist() == [1.0, 0.5, 0.0, 0.5]
        assert win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 4.0]) == 0.5
        assert win_rate([1.0, 2.0, 6.0], [0.0, 1.0, 5.0]) == 1.0

    @given(scores)
    def test_swapping_the_sides_gives_the_complement(self, pairs):
        policy, reference = zip(*pairs, strict=True)
        assert win_rate(policy, reference) == pytest.approx(1 - win_rate(reference, policy))

    @given(scores)
    def test_is_half_the_surplus_of_wins_above_one_half(self, pairs):
        surplus = sum((p > r) - (p < r) for p, r in pairs)
        assert win_rate(*zip(*pairs, strict=True)) == pytest.approx(0.5 + surplus / len(pairs) / 2)

    def test_infinite_scores_tie_with_their_like(self):
        assert win_outcomes([math.inf, math.inf], [math.inf, 0.0]).tolist() == [0.5, 1.0]

    def test_bad_scores_are_refused(self):
        with pytest.raises(ValueError, match="2 entries and `reference_scores` has 1"):
            win_rate([1.0, 2.0], [1.0])
        with pytest.raises(ValueError, match="`policy_scores` holds nan in 1 of 2 rows"):
            win_rate([1.0, math.nan], [1.0, 2.0])
        with pytest.raises(ValueError, match="N > 0"):
            win_rate([], [])
        with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
            win_rate([[1.0, 2.0]], [[1.0, 2.0]])


def exact_bootstrap_distribution(values, clusters):
    """The mean over rows in each of the K^K equally likely resamples of K clusters, sorted."""
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in sorted(set(clusters))]
    resamples = itertools.product(groups, repeat=len(groups))
    return np.sort([np.mean(list(itertools.chain(*resample))) for resample in resamples])


class TestRatioInterval:
    def test_numbers(self):
        # A text of one token and one of three: half of the resamples draw both, with 3 nats over 4 tokens.
        assert ratio_interval([0.0, 3.0], [1, 3], level=0.4) == pytest.approx((0.75, 0.75))
        assert ratio_interval([0.0, 3.0], [1, 3], level=0.9) == pytest.approx((0.0, 1.0))

    def test_rows_of_one_item_are_a_mean(self):
        values = [0.3, 1.2, -0.5, 2.0]
        assert ratio_interval(values, [1] * 4) == bootstrap_interval(values, list(range(4)))

    @pytest.mark.parametrize(("sums", "sizes"), [([1.0], [1]), ([1.0, 2.0], [1, 0]), ([1.0, 2.0], [1])])
    def test_errors(self, sums, sizes):
        with pytest.raises(ValueError, match="at least two rows|Give both"):
            ratio_interval(sums, sizes)


class TestBootstrapInterval:
    values, clusters = [0.3, 1.2, -0.5, 2.0, 0.9, -1.4, 0.1, 0.7, 3.1], ["a", "b", "b", "c", "c", "c", "d", "e", "e"]

    @pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
    def test_equals_the_enumeration_of_all_resamples(self, level):
        exact = exact_bootstrap_distribution(self.values, self.clusters)
        got = bootstrap_interval(self.values, self.clusters, level=level, resamples=50_000)
        assert got == pytest.approx(np.quantile(exact, [(1 - level) / 2, (1 + level) / 2]), abs=0.03)

    def test_numbers(self):
        # Three clusters of one row: of 27 resamples 8 have mean 0, 12 have 1/3, 6 have 2/3 and one has 1 (3.7 %).
        assert bootstrap_interval([0.0, 0.0, 1.0], [0, 1, 2], level=0.9) == pytest.approx((0.0, 2 / 3))
        assert bootstrap_interval([0.0, 0.0, 1.0], [0, 1, 2], level=0.95) == pytest.approx((0.0, 1.0))
        # One row against three: a quarter of the resamples draw the three twice, with mean 1, and half draw both
        # clusters, with the mean over rows, 3/4, not over clusters.
        assert bootstrap_interval([0.0, 1.0, 1.0, 1.0], [0, 1, 1, 1], level=0.9) == pytest.approx((0.0, 1.0))
        assert bootstrap_interval([0.0, 1.0, 1.0, 1.0], [0, 1, 1, 1], level=0.4) == pytest.approx((0.75, 0.75))

    def test_agrees_with_scipy_on_independent_rows(self):
        values = np.random.default_rng(1).normal(size=60)
        expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2)
        got = bootstrap_interval(values, np.arange(60), resamples=20_000)
        assert got == pytest.approx(tuple(expected.confidence_interval), abs=0.01)

    def test_repeating_rows_within_clusters_tells_nothing_new(self):
        values, clusters = np.random.default_rng(0).integers(0, 2, 50), np.arange(50)
        repeated = bootstrap_interval(values.repeat(8), clusters.repeat(8))
        assert repeated == pytest.approx(bootstrap_interval(values, clusters))
        low, high = bootstrap_interval(values.repeat(8), np.arange(400))  # as if the rows were independent
        assert high - low < 0.5 * (repeated[1] - repeated[0])

    def test_covers_the_true_mean_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        covered = 0
        for _ in range(400):
            prompts = rng.normal(size=40)  # shared by the three completions of a prompt
            low, high = bootstrap_interval(
                prompts.repeat(3) + 0.3 * rng.normal(size=120), np.arange(40).repeat(3), level=0.9, resamples=300
            )
            covered += low <= 0 <= high
        low, high = stats.binom(400, 0.9).ppf([1e-4, 1 - 1e-4]) / 400
        assert low - 0.03 <= covered / 400 <= high  # the percentile bootstrap of 40 clusters covers a little less

    @given(st.integers(0, 2**32 - 1), st.floats(-10, 10), st.floats(0.1, 10))
    def test_follows_shift_and_scale_of_the_values(self, seed, shift, scale):
        values = np.random.default_rng(seed).normal(size=9)
        low, high = bootstrap_interval(values, self.clusters, resamples=100, seed=seed)
        got = bootstrap_interval(shift + scale * values, self.clusters, resamples=100, seed=seed)
        assert low <= high
        assert got == pytest.approx((shift + scale * low, shift + scale * high))

    def test_the_seed_decides(self):
        first, again, other = (bootstrap_interval(self.values, self.clusters, seed=seed) for seed in (1, 1, 2))
        assert first == again != other

    def test_bad_input_is_refused(self):
        with pytest.raises(ValueError, match="at least two clusters"):
            bootstrap_interval([1.0, 2.0], ["a", "a"])
        with pytest.raises(ValueError, match="Give one per row"):
            bootstrap_interval([1.0, 2.0], ["a"])
        for level in [0, 1, 95]:
            with pytest.raises(ValueError, match=f"between 0 and 1, got {level}"):
                bootstrap_interval([1.0, 2.0], ["a", "b"], level=level)
        with pytest.raises(ValueError, match="`values` holds nan"):
            bootstrap_interval([1.0, math.nan], ["a", "b"])


class TestShareInterval:
    def test_numbers(self):
        """Wilson's for three and four prompts, `z = 1.959964`: `n / (n + z^2)` is the lower end of wins only."""
        assert share_interval([1.0] * 6, [0, 0, 1, 1, 2, 2]) == pytest.approx((0.438503, 1.0), abs=1e-6)
        assert share_interval([0.0] * 3, ["a", "b", "c"]) == pytest.approx((0.0, 0.561497), abs=1e-6)
        # Ties only: 1/2 -+ z * sqrt(1/16 + z^2 / 64) / (1 + z^2 / 4)
        assert share_interval([0.5] * 8, [0, 1, 2, 3] * 2) == pytest.approx((0.150039, 0.849961), abs=1e-6)

    def test_else_it_is_the_bootstrap(self):
        outcomes, prompts = [1.0, 1.0, 0.5, 1.0, 1.0, 0.0], [0, 0, 1, 1, 2, 3]
        assert share_interval(outcomes, prompts, seed=4) == bootstrap_interval(outcomes, prompts, seed=4)

    def test_covers_a_share_near_one(self):
        """Of 20 prompts with 0.97 each, 54 of 100 samples are wins only, of which the bootstrap says [1, 1]."""
        rng = np.random.default_rng(0)
        samples = (rng.random((300, 20)) < 0.97).astype(float)
        intervals = [share_interval(sample, np.arange(20), resamples=200) for sample in samples]
        assert np.mean([low <= 0.97 <= high for low, high in intervals]) > 0.9

    def test_bad_input_is_refused(self):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -1 to 2"):
            share_interval([-1.0, 2.0], ["a", "b"])
        with pytest.raises(ValueError, match="at least two clusters"):
            share_interval([1.0, 1.0], ["a", "a"])


class TestProportionInterval:
    @given(st.integers(1, 500), st.floats(0, 1), st.floats(0.5, 0.99))
    def test_equals_wilsons_formula(self, n, share, level):
        successes = round(share * n)
        p, z = successes / n, stats.norm.ppf((1 + level) / 2)
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert proportion_interval(successes, n, level) == pytest.approx((center - reach, center + reach), abs=1e-12)
        expected = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
        assert proportion_interval(successes, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_numbers(self):
        assert proportion_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
        assert proportion_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
        assert proportion_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)

    def test_bad_input_is_refused(self):
        for successes, n in [(-1, 10), (11, 10), (0, 0)]:
            with pytest.raises(ValueError, match="0 <= successes <= n"):
                proportion_interval(successes, n)
        for level in [0, 1, 95]:
            with pytest.raises(ValueError, match=f"between 0 and 1, got {level}"):
                proportion_interval(5, 10, level=level)


class TestSignTest:
    def test_numbers(self):
        """Eight wins and two losses: 2 (1 + 10 + 45) / 2^10."""
        assert sign_test([1.0] * 8 + [0.0] * 2 + [0.5] * 7) == pytest.approx(112 / 1024)
        assert sign_test([0.5, 0.5]) == 1.0

    def test_sides_are_alike(self):
        assert sign_test([1.0] * 9 + [0.0] * 2) == sign_test([0.0] * 9 + [1.0] * 2)


class TestLengthControlledWinRate:
    def test_is_the_win_rate_where_length_does_not_matter(self):
        outcomes = [1.0, 1.0, 1.0, 0.0] * 40
        differences = [5.0, -5.0, 5.0, 5.0, -5.0, 5.0, -5.0, -5.0] * 20
        assert length_controlled_win_rate(outcomes, differences) == pytest.approx(0.75, abs=2e-3)
        assert length_controlled_win_rate(outcomes, [3.0] * 160) != pytest.approx(0.75)  # all are longer: it is shared

    def test_against_scikit_learn(self):
        from sklearn.linear_model import LogisticRegression

        generator = np.random.default_rng(0)
        differences = generator.normal(8.0, 10.0, 300)
        wins = (generator.random(300) < 1 / (1 + np.exp(-0.3 - 0.1 * differences))).astype(float)
        features = np.stack([np.ones(300), np.tanh(differences / differences.std())], axis=1)
        fit = LogisticRegression(C=100.0, fit_intercept=False, tol=1e-10).fit(features, wins)
        expected = 1 / (1 + np.exp(-fit.coef_[0, 0]))
        assert length_controlled_win_rate(wins, differences) == pytest.approx(expected, abs=1e-6)
        assert expected < wins.mean() - 0.05, "the policy is longer, and that is taken away"

    def test_one_side_wins_always(self):
        assert 0.9 < length_controlled_win_rate([1.0] * 50, range(50)) < 1.0

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-30, 30)), min_size=2, max_size=30))
    def test_swapping_the_sides_mirrors_it(self, rows):
        outcomes, differences = np.array(rows, dtype=float).T
        swapped = length_controlled_win_rate(1 - outcomes, -differences)
        assert length_controlled_win_rate(outcomes, differences) == pytest.approx(1 - swapped, abs=1e-5)

    def test_errors(self):
        with pytest.raises(ValueError, match="has 2 entries and `length_differences` has 1"):
            length_controlled_win_rate([1.0, 0.0], [3.0])
        with pytest.raises(ValueError, match=r"`outcomes` must lie in \[0, 1\]"):
            length_controlled_win_rate([2.0], [3.0])


class TestLengthControlledInterval:
    def sample(self, seed, rows=240):
        """Outcomes of which the logarithm of the odds is 0.4 at equal length, and grows with the length."""
        generator = np.random.default_rng(seed)
        differences = generator.normal(6.0, 10.0, rows)
        chance = 1 / (1 + np.exp(-0.4 - 0.8 * np.tanh(differences / 10.0)))
        return (generator.random(rows) < chance).astype(float), differences

    def test_its_width_is_the_spread_of_repeated_experiments(self):
        rates = [length_controlled_win_rate(*self.sample(seed)) for seed in range(300)]
        widths = [np.subtract(*length_controlled_interval(*self.sample(seed), range(240))[::-1]) for seed in range(5)]
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(rates), rel=0.12)
        assert np.mean(rates) == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.01)

    def test_equals_a_bootstrap_of_rows_with_scikit_learn(self):
        from sklearn.linear_model import LogisticRegression

        wins, differences = self.sample(0, rows=90)
        clusters = np.arange(90) // 3
        feature = np.tanh(differences / differences.std())
        generator, rates = np.random.default_rng(3), []
        for _ in range(400):
            drawn = np.concatenate([np.flatnonzero(clusters == c) for c in generator.integers(0, 30, 30)])
            features = np.stack([np.ones(len(drawn)), feature[drawn]], axis=1)
            fit = LogisticRegression(C=100.0, fit_intercept=False).fit(features, wins[drawn])
            rates.append(1 / (1 + np.exp(-fit.coef_[0, 0])))
        low, high = length_controlled_interval(wins, differences, clusters)
        assert (low, high) == pytest.approx(np.quantile(rates, [0.025, 0.975]), abs=0.025)

    def test_copies_of_a_row_in_its_cluster_add_nothing(self):
        wins, differences = self.sample(1, rows=60)
        once = length_controlled_interval(wins, differences, range(60))
        four = length_controlled_interval(np.repeat(wins, 4), np.repeat(differences, 4), np.repeat(range(60), 4))
        assert four == pytest.approx(once, abs=2e-3)  # the penalty of the fit weighs a quarter

    def test_one_side_wins_always(self):
        low, high = length_controlled_interval([1.0] * 30, range(30), range(30))
        assert 0.5 < low <= high <= 1.0

    def test_errors(self):
        with pytest.raises(ValueError, match=r"`clusters` has shape \(1,\), but there are 2 outcomes"):
            length_controlled_interval([1.0, 0.0], [1.0, 2.0], [0])
        with pytest.raises(ValueError, match="All rows are in one cluster"):
            length_controlled_interval([1.0, 0.0], [1.0, 2.0], [0, 0])
        with pytest.raises(ValueError, match="`level` must lie between 0 and 1, got 95"):
            length_controlled_interval([1.0, 0.0], [1.0, 2.0], [0, 1], level=95)
        with pytest.raises(ValueError, match="`outcomes` must lie in"):
            length_controlled_interval([2.0, 0.0], [1.0, 2.0], [0, 1])


class TestLengthControlledReward:
    def test_numbers(self):
        """One tenth per token in both sets; the policy is 20 tokens longer and 0.5 better besides."""
        assert length_controlled_reward([3.5, 5.5], [30, 50], [1.0, 3.0], [10, 30]) == pytest.approx(2.5)

    def test_without_a_spread_of_lengths_it_is_the_mean(self):
        assert length_controlled_reward([3.0, 5.0], [30, 30], [1.0], [10]) == 4.0

    def test_against_a_regression_with_both_sets(self):
        from sklearn.linear_model import LinearRegression

        generator = np.random.default_rng(1)
        lengths = [generator.integers(5, 60, 40), generator.integers(5, 30, 25)]
        scores = [generator.normal(0.05 * one + level, 1.0) for one, level in zip(lengths, (1.0, 0.2), strict=True)]
        sides = np.concatenate([np.ones(40), np.zeros(25)])
        fit = LinearRegression().fit(np.stack([sides, np.concatenate(lengths)], axis=1), np.concatenate(scores))
        expected = fit.predict([[1.0, lengths[1].mean()]])[0]
        found = length_controlled_reward(scores[0], lengths[0], scores[1], lengths[1])
        assert found == pytest.approx(expected)


def test_token_mean_weighs_every_token_alike():
    assert token_mean([2.0, 0.0], [10, 30]) == 0.05
    assert token_mean([0.0], [0]) == 0.0
