"""Intervals by drawing clusters, against scipy and against counting."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from rlhf_recipes.statistics.metrics import bootstrap_interval, proportion_interval
from rlhf_recipes.tools.certificate.functional.resampling import (
    independent_units,
    mean_summary,
    percentile_interval,
    resampled_sums,
    share_summary,
)


class TestIndependentUnits:
    def test_prompts_or_rows(self):
        for prompts, unit in {1: "rows", 2: "rows", 9: "rows", 10: "prompts", 40: "prompts"}.items():
            names = [f"prompt {index % prompts}" for index in range(40)]
            units, name = independent_units(names)
            assert (list(units), name) == (names if unit == "prompts" else list(range(40)), unit)


class TestResampledSums:
    def test_numbers(self):
        # Clusters of two rows (sum 3) and of one row (sum 10): two draws give 6, 13 or 20, with 1/4, 1/2 and 1/4.
        sums = resampled_sums([[1.0, 1.0], [2.0, 1.0], [10.0, 1.0]], clusters=["a", "a", "b"])
        assert sums.shape == (1000, 2)
        assert set(sums[:, 0]) == {6.0, 13.0, 20.0}
        assert np.array_equal(sums[:, 1], np.select([sums[:, 0] == 6, sums[:, 0] == 13], [4.0, 3.0], 2.0))
        assert (sums[:, 0] == 13).mean() == pytest.approx(0.5, abs=0.06)

    def test_every_draw_is_its_own_and_can_be_repeated(self):
        columns, clusters = np.random.default_rng(0).random((50, 1)), np.arange(50)
        sums = resampled_sums(columns, clusters)
        assert len(np.unique(sums)) == 1000
        assert np.array_equal(sums, resampled_sums(columns, clusters))


class TestPercentileInterval:
    def test_numbers(self):
        assert percentile_interval(np.arange(101.0), level=0.8) == pytest.approx([10.0, 90.0])

    def test_undefined_statistics(self):
        assert percentile_interval([np.nan, *range(99)]) is not None
        assert percentile_interval([np.nan] * 20 + [1.0] * 80) is None
        assert percentile_interval([np.nan]) is None


class TestMeanSummary:
    def test_numbers(self):
        values = np.random.default_rng(1).normal(3.0, 1.0, 80)
        summary = mean_summary(values, np.arange(80))
        assert summary["value"] == pytest.approx(values.mean())
        assert summary["n"] == 80
        oracle = bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
        assert summary["interval"] == pytest.approx([oracle.low, oracle.high], abs=0.03)
        clusters = np.arange(80) // 8
        oracle = bootstrap_interval(values, clusters, resamples=4000, seed=7)
        assert mean_summary(values, clusters)["interval"] == pytest.approx(oracle, abs=0.03)

    def test_too_few_rows_have_no_interval(self):
        nothing = {"interval": None, "unit": None}
        assert mean_summary([1.0, 2.0], ["a", "a"]) == {"value": 1.5, "n": 2, **nothing}
        assert mean_summary([1.0] * 9, range(9)) == {"value": 1.0, "n": 9, **nothing}
        assert mean_summary([math.nan, *[1.0] * 20], range(21))["interval"] is None

    @pytest.mark.parametrize("prompts", range(1, 12))
    def test_rows_are_drawn_where_prompts_are_few(self, prompts):
        values = np.random.default_rng(2).normal(size=60)
        summary = mean_summary(values, np.arange(60) % prompts)
        units = np.arange(60) if prompts < 10 else np.arange(60) % prompts
        assert summary["unit"] == ("rows" if prompts < 10 else "prompts")
        assert summary["interval"] == pytest.approx(bootstrap_interval(values, units, seed=7), abs=0.06)


class TestShareSummary:
    def test_numbers(self):
        summary = share_summary([1, 1, 1, 0], clusters=[0, 1, 2, 3])
        assert summary == {"value": 0.75, "interval": list(proportion_interval(3, 4)), "n": 4, "unit": "rows"}
        one_prompt = share_summary([1, 1, 1, 0] * 20, clusters=["a"] * 80)
        assert one_prompt == {"value": 0.75, "interval": list(proportion_interval(60, 80)), "n": 80, "unit": "rows"}

    def test_copies_of_a_row_say_nothing_new(self):
        rows, clusters = [1, 0, 1, 1, 0, 1, 0, 1, 1, 1], list("abcdefghij")
        once, often = share_summary(rows, clusters), share_summary(rows * 20, clusters * 20)
        assert often["value"] == once["value"]
        width = [interval[1] - interval[0] for interval in (once["interval"], often["interval"])]
        assert width[1] == pytest.approx(width[0], rel=0.25)
        assert share_summary([1] * 200, clusters * 20)["interval"] == list(proportion_interval(10, 10))

    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=30))
    def test_the_share_lies_in_its_interval(self, rows):
        outcomes, clusters = zip(*rows, strict=True)
        summary = share_summary(outcomes, clusters)
        if summary["interval"] is not None:
            assert summary["interval"][0] - 1e-9 <= summary["value"] <= summary["interval"][1] + 1e-9
