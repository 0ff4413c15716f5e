"""Calibration of the probabilities that a reward model implies: reliability, ECE, Brier score, log loss.

A reward model implies that the first of two completions is preferred with probability `sigmoid(difference of scores)`
(Bradley and Terry, Rank Analysis of Incomplete Block Designs, 1952).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit

from rlhf_recipes.tools.certificate.functional.resampling import mean_summary, resampled_interval

_BINS = 10


def calibration(differences: ArrayLike, labels: ArrayLike, clusters: ArrayLike, level: float = 0.95) -> dict[str, Any]:
    """Compare the probability that a reward model gives its preference with how often it is right.

    Args:
        differences: Score of the first minus score of the second completion (reward units), shape `(N,)`.
        labels: Probability that the first is preferred: 1 for hard labels, 0.5 for ties, shape `(N,)`.
        clusters: The prompt of each pair, shape `(N,)`.
        level: Probability that the intervals are to cover the true values.

    Returns:
        `brier`, `log_loss` (nats per pair; 0.693 for a model that knows nothing) and `ece` with `value`, `n`,
        `interval` and `unit`; `ece_if_calibrated`, what a calibrated model with the same scores would show by chance
        (`mean` and the 95 % quantile `high`); `temperature`, by which differences are best divided; and the
        `reliability` rows.

    Example:
        >>> result = calibration([0.0, 0.0], [1.0, 0.0], clusters=[0, 1])
        >>> result["brier"]["value"], round(result["log_loss"]["value"], 3), result["ece"]["value"]
        (0.25, 0.693, 0.0)
    """
    d, y = np.asarray(differences, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    confidence, right, index = _confidences(d, y)
    columns = [(index == bin_) * (confidence - right) for bin_ in range(_BINS)]
    interval = resampled_interval(
        np.stack([*columns, np.ones_like(d)], axis=1),
        clusters,
        lambda sums: np.abs(sums[:, :_BINS]).sum(axis=1) / sums[:, _BINS],
        level,
    )
    return {
        "brier": mean_summary(brier_losses(d, y), clusters, level),
        "log_loss": mean_summary(log_losses(d, y), clusters, level),
        "ece": {"value": expected_calibration_error(d, y), "n": len(d), **interval},
        "ece_if_calibrated": chance_calibration_error(d),
        "temperature": best_temperature(d, y),
        "reliability": reliability(d, y),
    }


def brier_losses(differences: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Squared error of the probability of each pair, `(sigmoid(d) - label) ** 2`, shape `(N,)`.

    Source: Brier, Verification of Forecasts Expressed in Terms of Probability (1950).

    Example:
        >>> brier_losses([0.0], [1.0]).tolist()
        [0.25]
    """
    errors: NDArray[np.float64] = expit(np.asarray(differences, dtype=np.float64)) - np.asarray(labels)
    return errors**2


def log_losses(differences: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Cross-entropy of each pair in nats, `-label log sigmoid(d) - (1 - label) log sigmoid(-d)`, shape `(N,)`.

    Example:
        >>> [round(loss, 5) for loss in log_losses([1.0, 1.0], [1.0, 0.5]).tolist()]
        [0.31326, 0.81326]
    """
    d, y = np.asarray(differences, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    losses: NDArray[np.float64] = y * np.logaddexp(0, -d) + (1 - y) * np.logaddexp(0, d)
    return losses


def reliability(differences: ArrayLike, labels: ArrayLike) -> list[dict[str, Any]]:
    """Compare confidence and agreement in ten bins of confidence between 0.5 and 1.

    The confidence is the probability of the completion that the model prefers, and the agreement the probability that
    the label gives it. Which of the two completions comes first makes no difference.

    Source: https://huggingface.co/papers/1706.04599, section 2, for two classes.

    Args:
        differences: Score of the first minus score of the second completion, shape `(N,)`.
        labels: Probability that the first is preferred, shape `(N,)`.

    Returns:
        For each bin that has pairs: `low`, `high`, mean `confidence`, mean `agreement`, and `n`.

    Example:
        >>> [row] = reliability([2.0, -2.0], [1.0, 1.0])
        >>> round(row["confidence"], 2), row["agreement"], row["n"]
        (0.88, 0.5, 2)
    """
    confidence, right, index = _confidences(np.asarray(differences), np.asarray(labels))
    rows = []
    for bin_ in np.unique(index):
        part = index == bin_
        rows.append(
            {
                "low": 0.5 + 0.5 * float(bin_) / _BINS,
                "high": 0.5 + 0.5 * float(bin_ + 1) / _BINS,
                "confidence": float(confidence[part].mean()),
                "agreement": float(right[part].mean()),
                "n": int(part.sum()),
            }
        )
    return rows


def expected_calibration_error(differences: ArrayLike, labels: ArrayLike) -> float:
    """Mean distance of confidence and agreement over the bins of `reliability`, weighted by their pairs.

    Source: https://huggingface.co/papers/1706.04599, equation 3.

    Example:
        >>> round(expected_calibration_error([2.0, -2.0], [1.0, 1.0]), 3)
        0.381
    """
    rows = reliability(differences, labels)
    total = sum(row["n"] for row in rows)
    return float(sum(row["n"] * abs(row["confidence"] - row["agreement"]) for row in rows) / total)


def chance_calibration_error(differences: ArrayLike, draws: int = 500, seed: int = 0) -> dict[str, float]:
    """Compute the ECE that chance alone gives: labels are drawn with the very probabilities that the model implies.

    The ECE of a few pairs is never 0. A model whose ECE is not above `high` cannot be told from a calibrated one.

    Args:
        differences: Score differences of the pairs, shape `(N,)`.
        draws: How often the labels are drawn.
        seed: Seed of the draws.

    Returns:
        The `mean` and the 95 % quantile, `high`.

    Example:
        >>> chance = chance_calibration_error([0.5] * 100)
        >>> 0.02 < chance["mean"] < 0.06 < chance["high"] < 0.15
        True
    """
    d = np.asarray(differences, dtype=np.float64)
    confidence, _, index = _confidences(d, np.ones_like(d))
    rng, members = np.random.default_rng(seed), np.eye(_BINS)[index]
    errors = [np.abs((confidence - (rng.random(len(d)) < confidence)) @ members).sum() / len(d) for _ in range(draws)]
    return {"mean": float(np.mean(errors)), "high": float(np.quantile(errors, 0.95))}


def best_temperature(differences: ArrayLike, labels: ArrayLike) -> float:
    """Find the temperature T for which `sigmoid(difference / T)` has the smallest log loss.

    Above 1 the model is too sure of itself, below 1 not sure enough.

    Source: https://huggingface.co/papers/1706.04599, section 4.2.

    Args:
        differences: Score differences of the pairs, shape `(N,)`.
        labels: Probability that the first of each pair is preferred, shape `(N,)`.

    Returns:
        T; `inf` if the differences say nothing or the wrong thing, and 0 if they are always right.

    Example:
        >>> round(best_temperature([2.0, 2.0, 2.0, -2.0], [1.0, 1.0, 1.0, 1.0]), 3)  # 2 / log 3
        1.82
    """
    d, y = np.asarray(differences, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    scale = np.abs(d).max(initial=0.0)
    if scale == 0 or (d * (0.5 - y)).sum() >= 0:
        return float("inf")
    unit = d / scale

    def slope(inverse: float) -> float:  # of the log loss, which is convex in the inverse temperature
        return float((unit * (expit(inverse * unit) - y)).sum())

    if (np.maximum(unit, 0) - unit * y).sum() <= 1e-12:  # the slope at infinity: no pair is against it
        return 0.0
    high = 1.0
    while slope(high) < 0 and high < 1e9:
        high *= 2
    return float(scale / brentq(slope, 0.0, high, xtol=1e-12)) if slope(high) >= 0 else 0.0


def _confidences(
    d: NDArray[Any], y: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    confidence = expit(np.abs(d.astype(np.float64)))
    right = np.where(d > 0, y, np.where(d < 0, 1 - y, 0.5))
    index = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(np.int64), _BINS - 1)
    return confidence, right.astype(np.float64), index
