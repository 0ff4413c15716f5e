"""The law of over-optimization, against curves made of it and against a general optimizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rlhf_recipes.statistics.frontier import fit_frontier, frontier

D = np.linspace(0.05, 5.0, 30)


def test_numbers_of_both_laws():
    rl = fit_frontier(D, 0.3 + D * (1.2 - 0.8 * np.log(D)))
    assert (rl.start, rl.alpha, rl.beta) == pytest.approx((0.3, 1.2, 0.8))
    assert rl.peak == pytest.approx(np.exp(1.2 / 0.8 - 1))
    best = fit_frontier(D, -0.3 + D * (1.2 - 0.2 * D), form="best_of_n")
    assert (best.start, best.alpha, best.beta, best.peak) == pytest.approx((-0.3, 1.2, 0.2, 3.0))
    assert best.peak_score == pytest.approx(-0.3 + 3 * (1.2 - 0.6))
    assert best.residual == pytest.approx(0.0, abs=1e-9)


def test_the_peak_is_the_highest_point_of_the_curve():
    fit = fit_frontier(D, D * (1.0 - 0.7 * np.log(D)))
    grid = np.linspace(0.01, 5.0, 100_000)
    curve = grid * (1.0 - 0.7 * np.log(grid))
    assert fit.peak == pytest.approx(grid[curve.argmax()], abs=1e-3)
    assert fit.peak_score == pytest.approx(curve.max(), abs=1e-6)


def test_a_straight_line_has_no_peak():
    fit = fit_frontier(D, 1.0 + 2.0 * D, form="best_of_n")
    assert (fit.alpha, fit.beta, fit.peak, fit.peak_score) == (
        pytest.approx(2.0),
        pytest.approx(0.0, abs=1e-9),
        None,
        None,
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["rl", "best_of_n"]))
def test_it_is_the_least_squares_fit(seed, form):
    generator = np.random.default_rng(seed)
    scores = generator.normal(0.0, 0.3, len(D)) + D * (1.0 - 0.3 * D)
    fit = fit_frontier(D, scores, form)

    def loss(numbers):
        bend = np.log(D) if form == "rl" else D
        return np.square(numbers[0] + D * (numbers[1] - numbers[2] * bend) - scores).sum()

    best = minimize(loss, [0.0, 1.0, 0.1], bounds=[(None, None), (0, None), (0, None)])
    assert loss([fit.start, fit.alpha, fit.beta]) <= best.fun + 1e-6
    assert fit.residual == pytest.approx(np.sqrt(loss([fit.start, fit.alpha, fit.beta]) / len(D)))


def test_frontier_reads_what_has_a_kl_and_a_score():
    history = [
        {"step": 1, "kl": -0.01, "reward": 0.5, "gold": 0.4},
        {"step": 2, "kl": 4.0, "reward": float("nan"), "gold": 0.6},
        {"step": 3, "kl": None, "reward": 1.0},
        {"step": 4, "kl": 9.0},
    ]
    assert frontier(history, "kl", {"reward": "reward", "true": "gold"})["points"] == [
        {"step": 1, "kl": -0.01, "distance": 0.0, "reward": 0.5, "true": 0.4},
        {"step": 2, "kl": 4.0, "distance": 2.0, "true": 0.6},
    ]
    long = [{"step": i, "kl": float(i), "gold": 1.0 + i} for i in range(8)]
    assert frontier(long, "kl", {"true": "gold"})["fits"]["true"]["form"] == "rl"
    assert frontier(long[:7], "kl", {"true": "gold"})["fits"] == {}


@pytest.mark.parametrize(
    ("distances", "scores", "form", "message"),
    [
        ([1.0] * 3, [1.0] * 3, "rl", "at least 4 distances"),
        ([1.0] * 4, [1.0] * 5, "rl", r"got shapes \(4,\) and \(5,\)"),
        ([1.0, 2.0, 3.0, -1.0], [1.0] * 4, "rl", "not negative"),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, np.nan], "rl", "finite"),
        ([1.0] * 4, [1.0] * 4, "ppo", "`form` must be 'rl' or 'best_of_n', got 'ppo'"),
    ],
)
def test_errors(distances, scores, form, message):
    with pytest.raises(ValueError, match=message):
        fit_frontier(distances, scores, form)
