"""Dependence of scores on the length of the text."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from rlhf_recipes.tools.certificate.functional.resampling import resampled_interval, share_summary

_SIMILAR = 0.1


def correlation(x: ArrayLike, y: ArrayLike, clusters: ArrayLike, level: float = 0.95) -> dict[str, Any]:
    """Rank correlation (Spearman) and linear correlation (Pearson) of two numbers per row.

    Args:
        x: First number, such as the score, shape `(N,)`, or `(N, K)` for K values that stay together, such as the
            scores of both sides of a pair.
        y: Second number, such as the length in tokens, of the same shape.
        clusters: The prompt of each row, shape `(N,)`.
        level: Probability that the interval is to cover the true rank correlation.

    Returns:
        `value`, the rank correlation; its `interval` and `unit`, drawing rows with their ranks; `pearson`; and `n`,
        the number of values. Where one of the numbers never changes, or is not finite, all but `n` are `None`.

    Example:
        >>> correlation([1.0, 2.0, 4.0], [10, 20, 21], clusters=[0, 1, 2])["value"]
        1.0
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = np.isfinite(first).all() and np.isfinite(second).all()
    if first.size < 3 or not known or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"value": None, "interval": None, "unit": None, "pearson": None, "n": first.size}
    ranks = _moments(_centred_ranks(first), _centred_ranks(second))
    linear = _moments(first - first.mean(), second - second.mean())
    value, pearson = (float(_pearson(moments.sum(axis=0, keepdims=True))[0]) for moments in (ranks, linear))
    return {
        "value": value,
        **resampled_interval(ranks, clusters, _pearson, level),
        "pearson": pearson,
        "n": first.size,
    }


def length_controlled_accuracy(
    differences: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    clusters: ArrayLike,
    level: float = 0.95,
) -> dict[str, Any]:
    """Accuracy on pairs in which length does not help.

    Two ways: pairs are weighted so that in half of them the chosen completion is the longer one (`balanced`: the mean
    of the accuracies where it is longer and where it is shorter; whoever counts tokens gets 0.5); or only pairs are
    kept whose lengths differ by at most 10 % of the longer (`similar`).

    Source: https://huggingface.co/papers/2310.03716, which finds reward models of this kind and balances the lengths
    of training pairs; that this is done for an accuracy is ours.

    Args:
        differences: Score of the chosen minus score of the rejected completion, shape `(N,)`.
        chosen_lengths: Tokens of the chosen completions, shape `(N,)`.
        rejected_lengths: Tokens of the rejected completions, shape `(N,)`.
        clusters: The prompt of each pair, shape `(N,)`.
        level: Probability that the intervals are to cover the true values.

    Returns:
        `longer_chosen`, `shorter_chosen` (accuracies where it is so), `balanced` and `similar`, each with `value`,
        `interval`, `unit` and `n`; `None` where there are no such pairs.

    Example:
        >>> result = length_controlled_accuracy([1.0, 1.0, 1.0, -1.0], [9, 9, 9, 5], [5, 5, 5, 9], clusters=range(4))
        >>> result["longer_chosen"]["value"], result["shorter_chosen"]["value"], result["balanced"]["value"]
        (1.0, 0.0, 0.5)
    """
    right, labels = np.asarray(differences, dtype=np.float64) > 0, np.asarray(list(np.asarray(clusters)))
    chosen, rejected = np.asarray(chosen_lengths, dtype=np.float64), np.asarray(rejected_lengths, dtype=np.float64)
    longer, shorter = chosen > rejected, chosen < rejected
    similar = np.abs(chosen - rejected) <= _SIMILAR * np.maximum(chosen, rejected)

    def accuracy(part: NDArray[np.bool_]) -> dict[str, Any] | None:
        return share_summary(right[part], labels[part], level) if part.any() else None

    balanced = None
    if longer.any() and shorter.any():
        columns = np.stack([longer * right, longer, shorter * right, shorter], axis=1)
        balanced = {
            "value": float((right[longer].mean() + right[shorter].mean()) / 2),
            "n": int((longer | shorter).sum()),
            **resampled_interval(columns, labels, _balanced, level),
        }
    return {
        "longer_chosen": accuracy(longer),
        "shorter_chosen": accuracy(shorter),
        "balanced": balanced,
        "similar": accuracy(similar),
    }


def _balanced(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return (sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3]) / 2


def _centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    ranks: NDArray[np.float64] = rankdata(values).reshape(values.shape) - (values.size + 1) / 2
    return ranks


def _moments(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over the values of each row, shape `(N, 6)`, of which correlations are made."""
    rows = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)
    return rows if a.ndim == 1 else rows.sum(axis=2)


def _pearson(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    n, a, b, aa, bb, ab = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        result: NDArray[np.float64] = (ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n))
    return result
