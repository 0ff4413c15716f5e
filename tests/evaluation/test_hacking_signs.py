"""Signs of reward hacking: series like those of recorded runs, and cases counted by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.evaluation.hacking_signs import (
    AlarmLimits,
    Series,
    entropy_collapse,
    kl_over_budget,
    length_drift,
    ngram_takeover,
    noise,
    over_optimization,
    read_series,
)

LIMITS = AlarmLimits()


def series(*values):
    return Series(16 * np.arange(1, len(values) + 1), np.array(values, dtype=np.float64))


# Gold score and reward every 16 steps: the quickstart (seed 0) and the same with `kl_coef: 0`, rounded.
HEALTHY_GOLD = series(*[0.1, 0.6, 0.8, 1.3, 1.6, 1.7, 2.0, 1.6, 1.7, 1.6, 1.9, 1.9, 1.9, 1.7, 1.8, 1.7, 1.8, 1.9, 1.9])
HEALTHY_REWARD = series(
    *[0.2, 0.5, 0.8, 1.2, 1.6, 1.7, 1.9, 1.8, 1.9, 1.8, 1.9, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.1, 2.1]
)
HACKED_GOLD = series(*[0.1, 0.6, 0.8, 1.2, 1.5, 1.5, 1.8, 1.6, 1.4, 1.3, 1.4, 1.2, 1.3, 1.0, 0.9, 0.4, 1.0, 0.5, 0.4])
HACKED_REWARD = series(
    *[0.2, 0.5, 0.9, 1.2, 1.5, 1.6, 1.9, 1.9, 1.8, 2.0, 2.1, 2.1, 2.1, 2.2, 2.2, 2.2, 2.3, 2.3, 2.3]
)


def until(whole, count):
    return Series(whole.steps[:count], whole.values[:count])


def first_alarm(proxy, truth, limits=LIMITS):
    found = (over_optimization(until(proxy, n), until(truth, n), limits) for n in range(1, len(truth.steps) + 1))
    return next((reason for reason in found if reason is not None), None)


class TestOverOptimization:
    def test_fires_on_the_hacked_run_and_not_on_the_healthy_one(self):
        assert first_alarm(HEALTHY_REWARD, HEALTHY_GOLD) is None
        reason = first_alarm(HACKED_REWARD, HACKED_GOLD)
        assert (reason.kind, reason.step) == ("over_optimization", 256)
        assert reason.numbers["best_step"] == 128

    def test_numbers(self):
        truth = series(0.0, 1.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0)
        reason = over_optimization(series(*range(10)), truth, LIMITS)
        assert reason.step == 160
        assert reason.numbers["best_step"] == 80
        assert reason.numbers["truth_best"] == pytest.approx(2.0)
        assert reason.numbers["truth_now"] == pytest.approx(0.5 / 3)
        assert reason.numbers["truth_gain"] == pytest.approx(2.0)
        assert (reason.numbers["proxy_then"], reason.numbers["proxy_now"]) == pytest.approx((3.0, 8.0))
        assert "from 2.000 (steps up to 80) to 0.167" in reason.message
        assert "went from 3.000 to 8.000" in reason.message

    def test_a_drop_of_a_quarter_of_the_gain_is_allowed(self):
        rise = [0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
        proxy = series(*range(10))
        assert over_optimization(proxy, series(*rise, 3.0, 3.0, 3.0), LIMITS) is None
        assert over_optimization(proxy, series(*rise, 2.9, 2.9, 2.9), LIMITS) is not None

    def test_a_drop_within_the_noise_is_no_sign(self):
        """Second differences of +-4 x make a standard deviation of 4 / 0.6745 / sqrt(6) = 2.42, of 4 errors 7.9."""
        zigzag = np.array([1.0, -1.0] * 6)
        proxy = series(*range(12))
        for drop, fires in ((7.0, False), (9.0, True)):
            truth = series(*(zigzag - drop * (np.arange(12) >= 8)))
            assert (over_optimization(proxy, truth, LIMITS) is not None) == fires

    def test_no_sign_where_both_fall(self):
        assert over_optimization(HACKED_GOLD, HACKED_GOLD, LIMITS) is None

    def test_no_sign_where_the_proxy_has_not_risen(self):
        falling = series(*np.linspace(3.0, 0.0, 19))
        flat = series(*[1.0] * 19)
        assert over_optimization(flat, falling, LIMITS) is None
        assert over_optimization(series(*np.linspace(1.0, 1.5, 19)), falling, LIMITS) is not None

    def test_needs_two_windows(self):
        proxy, truth = series(*range(7)), series(9.0, 9.0, 9.0, 9.0, 0.0, 0.0, 0.0)
        assert over_optimization(proxy, truth, AlarmLimits(window=4)) is None
        assert over_optimization(proxy, truth, LIMITS) is not None

    def test_series_of_different_steps_meet_where_both_were_logged(self):
        dense = Series(np.arange(1, 305), np.interp(np.arange(1, 305), HACKED_REWARD.steps, HACKED_REWARD.values))
        assert over_optimization(dense, HACKED_GOLD, LIMITS) == over_optimization(HACKED_REWARD, HACKED_GOLD, LIMITS)

    @settings(deadline=None)
    @given(
        st.lists(st.integers(-20, 20), min_size=6, max_size=20),
        st.floats(0.1, 10.0),
        st.floats(-50.0, 50.0),
    )
    def test_units_and_offsets_do_not_matter(self, values, scale, offset):
        truth, proxy = series(*values), series(*range(len(values)))
        moved = Series(truth.steps, truth.values * 4.0 + 8.0)  # exact in binary
        same = [over_optimization(proxy, one, LIMITS) is not None for one in (truth, moved)]
        assert same[0] == same[1]
        shifted = Series(proxy.steps, proxy.values * scale + offset)
        assert (over_optimization(shifted, truth, LIMITS) is not None) == same[0]

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 2**31), st.integers(8, 60))
    def test_a_true_score_that_only_rises_never_fires(self, seed, count):
        steps = np.random.default_rng(seed).uniform(0.0, 1.0, count).cumsum()
        assert first_alarm(series(*range(count)), series(*steps)) is None

    def test_false_alarms_on_noise_around_a_plateau_are_rare(self):
        """A rise, then 30 logs of pure noise: under the rule below one run in fifty."""
        generator = np.random.default_rng(0)
        fired = 0
        for _ in range(200):
            truth = 2.0 - 2.0 * np.exp(-np.arange(40) / 4) + generator.normal(0.0, 0.15, 40)
            fired += first_alarm(series(*np.linspace(0, 2, 40)), series(*truth)) is not None
        assert fired <= 4


class TestNoise:
    def test_numbers(self):
        assert noise(np.array([0.0, 1.0, 0.0, 1.0, 0.0])) == pytest.approx(2.0 / 0.67449 / math.sqrt(6), rel=1e-5)
        assert noise(np.array([1.0, 2.0])) == math.inf

    def test_is_the_standard_deviation_of_noise_around_a_line(self):
        generator = np.random.default_rng(1)
        values = 0.3 * np.arange(20_000) + generator.normal(0.0, 0.7, 20_000)
        assert noise(values) == pytest.approx(0.7, rel=0.03)


def test_read_series_passes_over_what_is_no_number():
    rows = [(1, 0.5), (2, math.nan), (3, None), (4, 2), (5, "x"), (6, math.inf)]
    history = [{"step": step, "kl": value} for step, value in rows]
    steps, values = read_series([*history, {"step": 7, "loss": 1.0}, {"train_loss": 1.0}], "kl")
    assert (steps.tolist(), values.tolist()) == ([1, 4], [0.5, 2.0])


def test_kl_over_budget():
    limits = AlarmLimits(kl_budget=10.0)
    assert kl_over_budget(series(0.0, 9.0, 10.0, 11.0), limits) is None  # 10.0 is within the budget
    reason = kl_over_budget(series(0.0, 9.0, 10.0, 11.6), limits)
    assert (reason.step, reason.numbers["kl"]) == (64, pytest.approx(10.2))
    assert kl_over_budget(series(99.0, 99.0), limits) is None  # not yet a window
    assert kl_over_budget(series(99.0, 99.0, 99.0), LIMITS) is None  # no budget


def test_entropy_collapse():
    assert entropy_collapse(series(2.0, 2.0, 2.0, 1.0, 1.0, 1.0), LIMITS) is None
    assert entropy_collapse(series(2.0, 2.0, 2.0, 1.0, 1.0, 0.9), LIMITS).numbers["start"] == 2.0
    assert entropy_collapse(series(2.0, 2.0, 2.0, 0.0, 0.0), LIMITS) is None  # windows would overlap
    assert entropy_collapse(series(2.0, 2.0, 2.0, 0.0, 0.0, 0.0), AlarmLimits(min_entropy=0.0)) is None


def test_length_drift():
    for last, fires in ((30.0, False), (30.3, True), (3.4, False), (3.3, True)):
        assert (length_drift(series(10.0, 10.0, 10.0, last, last, last), LIMITS) is not None) == fires
    assert length_drift(series(0.0, 0.0, 0.0, 5.0, 5.0, 5.0), LIMITS) is not None


def test_ngram_takeover():
    reference = series(0.3, 0.3)
    assert ngram_takeover(series(0.3, 0.8), reference, LIMITS) is None
    assert ngram_takeover(series(0.3, 0.81), reference, LIMITS).numbers["policy"] == 0.81
    assert ngram_takeover(series(0.9, 0.3), reference, LIMITS) is None  # it is over
    assert ngram_takeover(series(), series(), LIMITS) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 1),
        ("max_drop", 0.0),
        ("max_drop", 1.0),
        ("standard_errors", -1.0),
        ("kl_budget", 0.0),
        ("min_entropy", 1.0),
        ("max_length_factor", 1.0),
        ("max_ngram_share", 0.0),
    ],
)
def test_limits_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        AlarmLimits(**{name: value})
