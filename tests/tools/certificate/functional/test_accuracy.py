"""Accuracy of pairs: overall, by group, by a number, and against baselines and training pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from rlhf_recipes.statistics.metrics import proportion_interval
from rlhf_recipes.tools.certificate.functional.accuracy import (
    accuracy_advantage,
    accuracy_by,
    accuracy_by_value,
    accuracy_gap,
    pair_accuracy,
    value_bins,
    value_groups,
)


class TestPairAccuracy:
    def test_numbers(self):
        result = pair_accuracy([2.0, 0.0, -1.0, 0.5], clusters=list("abcd"))
        low, high = proportion_interval(2, 4)
        assert result == {"value": 0.5, "interval": [low, high], "n": 4, "unit": "rows", "ties": 0.25, "prompts": 4}

    def test_pairs_of_one_prompt_widen_the_interval(self):
        differences = np.repeat([1.0, 1.0, 1.0, -1.0] * 5, 10)
        alone = pair_accuracy(differences, np.arange(200))["interval"]
        together = pair_accuracy(differences, np.repeat(np.arange(20), 10))
        assert together["prompts"] == 20
        assert together["interval"][0] < alone[0] < alone[1] < together["interval"][1]


class TestAccuracyBy:
    def test_numbers(self):
        rows = accuracy_by([1.0, -1.0, 1.0, 1.0], ["b", "a", "b", "a"], clusters=range(4))
        assert [(row["group"], row["value"], row["n"]) for row in rows] == [("b", 1.0, 2), ("a", 0.5, 2)]
        assert rows[1]["interval"] == list(proportion_interval(1, 2))


class TestValueGroups:
    def test_numbers(self):
        assert value_groups([1, 0.333333, 1]) == ["1", "0.3333", "1"]
        assert value_groups(np.arange(10.0), bins=2) == ["0 to 4"] * 5 + ["5 to 9"] * 5


class TestValueBins:
    def test_numbers(self):
        assert value_bins([9.0, 1.0, 2.0, 8.0, 4.0, 5.0], bins=3).tolist() == [2, 0, 0, 2, 1, 1]

    @given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.integers(1, 6))
    def test_order_and_ties_are_kept(self, values, bins):
        index = value_bins(values, bins)
        assert index.min() >= 0
        assert index.max() < bins
        for a, i in zip(values, index, strict=True):
            for b, j in zip(values, index, strict=True):
                assert i <= j or a > b

    @given(st.integers(1, 8), st.integers(1, 10))
    def test_groups_are_of_equal_size(self, bins, size):
        values = np.random.default_rng(0).permutation(bins * size)
        assert np.bincount(value_bins(values, bins)).tolist() == [size] * bins


class TestAccuracyByValue:
    def test_numbers(self):
        values, differences = [3, 1, 3, 2], [1.0, -1.0, -2.0, 4.0]
        rows = accuracy_by_value(differences, values, clusters=range(4))
        found = [(row["group"], row["mean"], row["value"], row["n"]) for row in rows]
        assert found == [("1", 1.0, 0.0, 1), ("2", 2.0, 1.0, 1), ("3", 3.0, 0.5, 2)]

    def test_larger_differences_of_a_calibrated_model_are_right_more_often(self):
        rng = np.random.default_rng(0)
        strength = rng.exponential(1.0, 4000)
        differences = np.where(rng.random(4000) < 1 / (1 + np.exp(-strength)), strength, -strength)
        rows = accuracy_by_value(differences, np.abs(differences), np.arange(4000))
        accuracies = [row["value"] for row in rows]
        assert len(rows) == 5
        assert accuracies == sorted(accuracies)


class TestAccuracyGap:
    def test_numbers(self):
        # Newcombe (1998), method 10: 56 of 70 against 48 of 80 gives 0.2 with [0.0524, 0.3339].
        train, test = [1.0] * 56 + [-1.0] * 14, [1.0] * 48 + [-1.0] * 32
        gap = accuracy_gap(train, range(70), test, range(80))
        assert gap["value"] == pytest.approx(0.2)
        assert gap["interval"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
        assert gap["train"]["interval"] == list(proportion_interval(56, 70))

    def test_one_prompt_has_no_interval(self):
        assert accuracy_gap([1.0, -1.0], ["a", "a"], [1.0], ["b"])["interval"] is None


class TestAccuracyAdvantage:
    def test_numbers(self):
        # right, right, wrong against right, wrong, half: 0 + 1 - 0.5
        result = accuracy_advantage([1.0, 1.0, -1.0], [2.0, -2.0, 0.0], clusters=range(3))
        assert result["value"] == pytest.approx(0.5 / 3)

    def test_the_interval_is_that_of_paired_differences(self):
        rng = np.random.default_rng(2)
        model, baseline = rng.normal(0.5, 1, 400), rng.normal(0.2, 1, 400)
        paired = (model > 0).astype(float) - (baseline > 0)
        half = norm.ppf(0.975) * paired.std() / 20
        low, high = accuracy_advantage(model, baseline, range(400))["interval"]
        assert (low, high) == pytest.approx((paired.mean() - half, paired.mean() + half), abs=0.01)

    def test_a_model_has_no_advantage_over_itself(self):
        result = accuracy_advantage([1.0, -1.0, 2.0] * 4, [1.0, -1.0, 2.0] * 4, clusters=range(12))
        assert (result["value"], result["interval"]) == (0.0, [0.0, 0.0])
