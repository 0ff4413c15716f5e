"""Correlation with length against scipy, and accuracy where length does not help."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from rlhf_recipes.statistics.metrics import proportion_interval
from rlhf_recipes.tools.certificate.functional.length import correlation, length_controlled_accuracy


class TestCorrelation:
    def test_numbers(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 30, 200).astype(float)  # with ties
        scores = 0.1 * lengths + rng.normal(0, 1, 200) ** 3
        result = correlation(scores, lengths, np.arange(200))
        assert result["value"] == pytest.approx(spearmanr(scores, lengths).statistic)
        assert result["pearson"] == pytest.approx(pearsonr(scores, lengths).statistic)
        assert result["n"] == 200
        rank = spearmanr(scores, lengths).statistic
        half = 1.96 * ((1 + rank**2 / 2) / 197) ** 0.5 * (1 - rank**2)  # Bonett and Wright (2000)
        assert result["interval"] == pytest.approx([rank - half, rank + half], abs=0.03)

    def test_both_sides_of_a_pair_stay_together(self):
        rng = np.random.default_rng(0)
        scores, lengths = rng.normal(size=(80, 2)), rng.integers(1, 30, (80, 2))
        pairs = correlation(scores, lengths, ["one prompt"] * 80)
        assert pairs["value"] == pytest.approx(spearmanr(scores.ravel(), lengths.ravel()).statistic)
        flat = correlation(scores.ravel(), lengths.ravel(), np.repeat(np.arange(80), 2))  # a prompt for each pair
        assert pairs["interval"] == pytest.approx(flat["interval"], abs=1e-12)
        assert (pairs["n"], pairs["unit"], flat["unit"]) == (160, "rows", "prompts")

    def test_no_spread_has_no_correlation(self):
        assert correlation([1.0, 1.0, 1.0], [1, 2, 3], range(3))["value"] is None
        assert correlation([1.0, np.nan, 3.0], [1, 2, 3], range(3))["value"] is None
        assert correlation([1.0, 2.0, 3.0], [2, 2, 2], range(3))["value"] is None

    @given(st.lists(st.integers(-50, 50), min_size=3, max_size=20, unique=True))
    def test_counting_tokens_correlates_fully(self, lengths):
        assert correlation(np.exp(np.array(lengths) / 50), lengths, range(len(lengths)))["value"] == pytest.approx(1.0)


class TestLengthControlledAccuracy:
    def test_numbers(self):
        # Three pairs whose chosen side is longer (two right), one shorter (wrong), one of equal length (right).
        differences, chosen, rejected = [1.0, 2.0, -1.0, -3.0, 1.0], [30, 20, 20, 10, 20], [10, 19, 5, 40, 20]
        result = length_controlled_accuracy(differences, chosen, rejected, clusters=range(5))
        assert result["longer_chosen"]["value"] == pytest.approx(2 / 3)
        assert (result["shorter_chosen"]["value"], result["shorter_chosen"]["n"]) == (0.0, 1)
        assert (result["balanced"]["value"], result["balanced"]["n"]) == (pytest.approx(1 / 3), 4)
        assert (result["similar"]["value"], result["similar"]["n"]) == (1.0, 2)
        assert result["longer_chosen"]["interval"] == list(proportion_interval(2, 3))

    def test_counting_tokens_gets_one_half_whatever_share_is_longer(self):
        rng = np.random.default_rng(0)
        chosen, rejected = rng.integers(20, 60, 300), rng.integers(10, 50, 300)
        result = length_controlled_accuracy(chosen - rejected, chosen, rejected, np.arange(300))
        assert result["balanced"]["value"] == 0.5
        assert (result["longer_chosen"]["value"], result["shorter_chosen"]["value"]) == (1.0, 0.0)

    def test_the_interval_is_that_of_two_independent_shares(self):
        rng = np.random.default_rng(1)
        longer = np.arange(400) < 300
        right = rng.random(400) < np.where(longer, 0.9, 0.6)
        lengths = np.where(longer, 2, 1), np.where(longer, 1, 2)
        result = length_controlled_accuracy(np.where(right, 1.0, -1.0), *lengths, np.arange(400))["balanced"]
        a, b = right[longer].mean(), right[~longer].mean()
        half = 1.96 * (a * (1 - a) / 300 + b * (1 - b) / 100) ** 0.5 / 2
        assert result["interval"] == pytest.approx([result["value"] - half, result["value"] + half], abs=0.01)

    def test_parts_without_pairs_are_none(self):
        result = length_controlled_accuracy([1.0, 1.0], [9, 9], [3, 3], clusters=range(2))
        assert result["shorter_chosen"] is result["balanced"] is result["similar"] is None
