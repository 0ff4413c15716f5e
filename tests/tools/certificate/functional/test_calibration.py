"""Calibration against scikit-learn, and C27's numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from rlhf_recipes.tools.certificate.functional.calibration import (
    best_temperature,
    brier_losses,
    calibration,
    chance_calibration_error,
    expected_calibration_error,
    log_losses,
    reliability,
)

RNG = np.random.default_rng(0)
DIFFERENCES = RNG.normal(0.4, 1.5, 500)
LABELS = (RNG.random(500) < expit(0.7 * DIFFERENCES)).astype(float)  # the differences are too large by 1 / 0.7

differences = st.lists(st.tuples(st.floats(-8, 8), st.floats(0, 1)), min_size=1, max_size=40)


class TestBrierLosses:
    def test_numbers(self):
        assert brier_losses([1.0], [1.0])[0] == pytest.approx((1 - 0.731059) ** 2, abs=1e-6)
        oracle = brier_score_loss(LABELS, expit(DIFFERENCES))
        assert brier_losses(DIFFERENCES, LABELS).mean() == pytest.approx(oracle)


class TestLogLosses:
    def test_numbers(self):
        losses = log_losses([1.0, 1.0, 0.0], [1.0, 0.5, 0.2])
        assert losses.tolist() == pytest.approx([0.313262, 0.813262, 0.693147], abs=1e-6)
        assert log_losses(DIFFERENCES, LABELS).mean() == pytest.approx(log_loss(LABELS, expit(DIFFERENCES)))
        assert log_losses([1000.0, -1000.0], [1.0, 1.0]).tolist() == [0.0, 1000.0]


class TestReliability:
    def test_numbers(self):
        confidence = expit(np.abs(DIFFERENCES))
        right = np.where(DIFFERENCES > 0, LABELS, 1 - LABELS)
        # The bins are those of scikit-learn when the confidence is stretched from [0.5, 1] to [0, 1].
        agreement, stretched = calibration_curve(right, 2 * confidence - 1, n_bins=10)
        rows = reliability(DIFFERENCES, LABELS)
        assert [row["agreement"] for row in rows] == pytest.approx(agreement.tolist())
        assert [2 * row["confidence"] - 1 for row in rows] == pytest.approx(stretched.tolist())
        assert sum(row["n"] for row in rows) == 500

    @given(differences)
    def test_the_order_of_a_pair_does_not_matter(self, rows):
        d, y = np.array(rows).T
        assert_rows_equal(reliability(d, y), reliability(-d, 1 - y))

    def test_equal_scores_are_half_right(self):
        [row] = reliability([0.0, 0.0], [1.0, 1.0])
        assert (row["confidence"], row["agreement"], row["low"], row["high"]) == (0.5, 0.5, 0.5, 0.55)


def assert_rows_equal(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other)


class TestExpectedCalibrationError:
    def test_numbers(self):
        # Confidence 0.9 (d = log 9), right in one of two: off by 0.4. Confidence 0.5, right in half: off by 0.
        d = [np.log(9.0), np.log(9.0), 0.0, 0.0]
        assert expected_calibration_error(d, [1.0, 0.0, 1.0, 1.0]) == pytest.approx(0.2)

    @given(differences)
    def test_labels_that_are_the_probabilities_have_none(self, rows):
        d = np.array(rows)[:, 0]
        assert expected_calibration_error(d, expit(d)) == pytest.approx(0.0, abs=1e-9)


class TestChanceCalibrationError:
    def test_numbers(self):
        # One bin: the ECE is |p - share|, and the share of n draws is normal with variance p (1 - p) / n.
        d, p, n = np.full(400, 1.0), expit(1.0), 400
        chance = chance_calibration_error(d, draws=4000)
        std = (p * (1 - p) / n) ** 0.5
        assert chance["mean"] == pytest.approx(std * (2 / np.pi) ** 0.5, rel=0.05)
        assert chance["high"] == pytest.approx(1.96 * std, rel=0.07)


class TestBestTemperature:
    def test_numbers(self):
        assert best_temperature([2.0, 2.0, 2.0, -2.0], [1.0, 1.0, 1.0, 1.0]) == pytest.approx(2 / np.log(3))
        oracle = minimize_scalar(
            lambda log_t: log_losses(DIFFERENCES / np.exp(log_t), LABELS).sum(), bounds=(-3, 3), method="bounded"
        )
        assert best_temperature(DIFFERENCES, LABELS) == pytest.approx(np.exp(oracle.x), rel=1e-4)
        assert 1.1 < best_temperature(DIFFERENCES, LABELS) < 1.9

    def test_edges(self):
        assert best_temperature([1.0, -1.0], [1.0, 1.0]) == float("inf")
        assert best_temperature([0.0, 0.0], [1.0, 1.0]) == float("inf")
        assert best_temperature([-1.0], [1.0]) == float("inf")
        assert best_temperature([1.0, 3.0], [1.0, 1.0]) == 0.0

    @given(st.floats(0.1, 10))
    def test_it_grows_with_the_scale_of_the_scores(self, scale):
        expected = scale * best_temperature(DIFFERENCES, LABELS)
        assert best_temperature(scale * DIFFERENCES, LABELS) == pytest.approx(expected)


class TestCalibration:
    def test_numbers(self):
        result = calibration(DIFFERENCES, LABELS, np.arange(500))
        assert result["brier"]["value"] == pytest.approx(brier_score_loss(LABELS, expit(DIFFERENCES)))
        assert result["log_loss"]["value"] == pytest.approx(log_loss(LABELS, expit(DIFFERENCES)))
        assert result["ece"]["value"] == expected_calibration_error(DIFFERENCES, LABELS)
        rng, errors = np.random.default_rng(5), []
        for _ in range(400):
            rows = rng.integers(0, 500, 500)
            errors.append(expected_calibration_error(DIFFERENCES[rows], LABELS[rows]))
        assert result["ece"]["interval"] == pytest.approx(np.quantile(errors, [0.025, 0.975]).tolist(), abs=0.01)

    def test_one_prompt_has_no_interval(self):
        assert calibration([1.0, 2.0], [1.0, 1.0], ["a", "a"])["ece"]["interval"] is None
