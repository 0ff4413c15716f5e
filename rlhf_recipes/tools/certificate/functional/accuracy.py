"""Accuracy of a reward model: over all pairs, by group, and by how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_recipes.tools.certificate.functional.resampling import (
    FEWEST,
    Summary,
    mean_summary,
    share_summary,
)


def pair_accuracy(differences: ArrayLike, clusters: ArrayLike, level: float = 0.95) -> dict[str, Any]:
    """Share of pairs whose chosen completion scores higher; a tie is no success.

    Args:
        differences: Score of the chosen minus score of the rejected completion (reward units), shape `(N,)`.
        clusters: The prompt of each pair, shape `(N,)`: pairs of one prompt are not independent.
        level: Probability that the interval is to cover the true accuracy.

    Returns:
        `value`, `n`, `interval` and `unit` as of `share_summary`; `ties`, the share of pairs with equal scores;
        `prompts`, the number of different ones.

    Example:
        >>> result = pair_accuracy([1.0, 0.0, -1.0, 2.0], clusters=["a", "b", "c", "d"])
        >>> result["value"], result["ties"], result["prompts"]
        (0.5, 0.25, 4)
    """
    rows = np.asarray(differences, dtype=np.float64)
    prompts = len(np.unique(np.asarray(clusters)))
    return {**share_summary(rows > 0, clusters, level), "ties": float((rows == 0).mean()), "prompts": prompts}


def accuracy_by(
    differences: ArrayLike, groups: Sequence[str], clusters: ArrayLike, level: float = 0.95
) -> list[dict[str, Any]]:
    """Accuracy within each group of pairs, in the order in which the groups first appear.

    Args:
        differences: Score of the chosen minus score of the rejected completion, shape `(N,)`.
        groups: The group of each pair, such as a category, length `N`.
        clusters: The prompt of each pair, shape `(N,)`.
        level: Probability that each interval is to cover the true accuracy.

    Returns:
        For each group its name as `group`, `value`, `interval`, `unit` and `n`.

    Example:
        >>> rows = accuracy_by([1.0, -1.0, 2.0], ["chat", "code", "chat"], clusters=[0, 1, 2])
        >>> [(row["group"], row["value"], row["n"]) for row in rows]
        [('chat', 1.0, 2), ('code', 0.0, 1)]
    """
    rows, names, labels = np.asarray(differences, dtype=np.float64), np.asarray(groups), np.asarray(clusters)
    parts = [(group, names == group) for group in dict.fromkeys(groups)]
    return [{"group": group, **share_summary(rows[part] > 0, labels[part], level)} for group, part in parts]


def value_groups(values: ArrayLike, bins: int = 5) -> list[str]:
    """Name the group of each value: the value itself where there are few, else one of `bins` of about equal size.

    Args:
        values: Numbers, such as the strength of a preference, shape `(N,)`.
        bins: Number of groups, at most.

    Returns:
        The name of each value's group: `"2"`, or the ends of its group, `"0.13 to 0.4"`.

    Example:
        >>> value_groups([3, 1, 1])
        ['3', '1', '1']
        >>> value_groups([0.0, 1.0, 2.0, 3.0], bins=2)
        ['0 to 1', '0 to 1', '2 to 3', '2 to 3']
    """
    rows = np.asarray(values, dtype=np.float64)
    distinct = np.unique(rows)
    if len(distinct) <= bins:
        return [f"{value:.4g}" for value in rows]
    index = value_bins(rows, bins)
    names = {bin_: f"{rows[index == bin_].min():.3g} to {rows[index == bin_].max():.3g}" for bin_ in set(index)}
    return [names[bin_] for bin_ in index]


def value_bins(values: ArrayLike, bins: int) -> NDArray[np.int64]:
    """Number the group of each value, from low to high; equal values are in one group.

    Args:
        values: Numbers, shape `(N,)`.
        bins: Number of groups of about equal size, at most.

    Returns:
        Numbers from 0, shape `(N,)`.

    Example:
        >>> value_bins([5.0, 1.0, 1.0, 7.0], bins=2).tolist()
        [1, 0, 0, 1]
    """
    rows = np.asarray(values, dtype=np.float64)
    edges = np.quantile(rows, np.arange(1, bins) / bins)
    return np.searchsorted(edges, rows, side="left").astype(np.int64)


def accuracy_by_value(
    differences: ArrayLike, values: ArrayLike, clusters: ArrayLike, bins: int = 5, level: float = 0.95
) -> list[dict[str, Any]]:
    """Accuracy by a number that each pair has, from low to high: its margin, the labeller's confidence, its score gap.

    Args:
        differences: Score of the chosen minus score of the rejected completion, shape `(N,)`.
        values: The number of each pair, shape `(N,)`.
        clusters: The prompt of each pair, shape `(N,)`.
        bins: Number of groups, at most.
        level: Probability that each interval is to cover the true accuracy.

    Returns:
        Rows as of `accuracy_by`, with `mean`, the mean of the number.

    Example:
        >>> rows = accuracy_by_value([1.0, -1.0, 2.0], [3, 1, 3], clusters=[0, 1, 2])
        >>> [(row["group"], row["mean"], row["value"]) for row in rows]
        [('1', 1.0, 0.0), ('3', 3.0, 1.0)]
    """
    numbers, labels = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    order = np.argsort(numbers, kind="stable")
    groups = value_groups(numbers[order], bins)
    rows = accuracy_by(np.asarray(differences)[order], groups, labels[order], level)
    means = {name: float(numbers[order][np.asarray(groups) == name].mean()) for name in dict.fromkeys(groups)}
    return [{**row, "mean": means[row["group"]]} for row in rows]


def accuracy_gap(
    train_differences: ArrayLike,
    train_clusters: ArrayLike,
    differences: ArrayLike,
    clusters: ArrayLike,
    level: float = 0.95,
) -> dict[str, Any]:
    """Accuracy on training pairs minus accuracy on held-out pairs.

    Args:
        train_differences: Chosen minus rejected on pairs that the model was trained on, shape `(M,)`.
        train_clusters: Their prompts, shape `(M,)`.
        differences: Chosen minus rejected on held-out pairs, shape `(N,)`.
        clusters: Their prompts, shape `(N,)`.
        level: Probability that the interval is to cover the true gap.

    Returns:
        `train`, the accuracy on training pairs with its interval; `value`, the gap; its `interval`, from the two
        intervals (Newcombe's method: the two sets of pairs are independent), `None` where one of them has fewer than
        `FEWEST` pairs; and its `unit`, `"rows"` where one of the two has it.

    Example:
        >>> gap = accuracy_gap([1.0, 2.0], [0, 1], [1.0, -1.0], [2, 3])
        >>> gap["train"]["value"], gap["value"]
        (1.0, 0.5)
    """
    train: Any = share_summary(np.asarray(train_differences) > 0, train_clusters, level)
    held_out: Any = share_summary(np.asarray(differences) > 0, clusters, level)
    gap = train["value"] - held_out["value"]
    if min(train["n"], held_out["n"]) < FEWEST or train["interval"] is None or held_out["interval"] is None:
        return {"train": train, "value": gap, "interval": None, "unit": None}
    (train_low, train_high), (low, high) = train["interval"], held_out["interval"]
    below = np.hypot(train["value"] - train_low, high - held_out["value"])
    above = np.hypot(train_high - train["value"], held_out["value"] - low)
    unit = "rows" if "rows" in (train["unit"], held_out["unit"]) else "prompts"
    return {"train": train, "value": gap, "interval": [float(gap - below), float(gap + above)], "unit": unit}


def accuracy_advantage(
    differences: ArrayLike, baseline_margins: ArrayLike, clusters: ArrayLike, level: float = 0.95
) -> Summary:
    """Accuracy of the model minus that of a baseline on the same pairs, with the interval of paired differences.

    Args:
        differences: The model's score of the chosen minus the rejected completion, shape `(N,)`.
        baseline_margins: The same of the baseline; where it is 0 the baseline is half right, shape `(N,)`.
        clusters: The prompt of each pair, shape `(N,)`.
        level: Probability that the interval is to cover the true difference.

    Returns:
        `value`, `n`, `interval` and `unit`.

    Example:
        >>> accuracy_advantage([1.0, 1.0, -1.0, 1.0], [1.0, -1.0, 0.0, 0.0], clusters=[0, 1, 2, 3])["value"]
        0.25
    """
    baseline = (np.sign(np.asarray(baseline_margins, dtype=np.float64)) + 1) / 2
    return mean_summary((np.asarray(differences) > 0) - baseline, clusters, level)
