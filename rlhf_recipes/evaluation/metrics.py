"""Statistics for comparing a policy with its reference: arrays in, numbers out."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest


def win_outcomes(policy_scores: ArrayLike, reference_scores: ArrayLike) -> NDArray[np.float64]:
    """Compare each score of the policy with the reference's score for the same prompt.

    Args:
        policy_scores: Scores of the policy's completions, shape `(N,)`. Higher is better.
        reference_scores: Scores of the reference's completions, shape `(N,)`.

    Returns:
        1 where the policy wins, 0 where it loses and 0.5 where they tie, shape `(N,)`.

    Raises:
        ValueError: If the shapes differ, there are no scores, or a score is nan.

    Example:
        >>> win_outcomes([3.0, 1.0, 2.0], [1.0, 1.0, 5.0]).tolist()
        [1.0, 0.5, 0.0]
    """
    policy = _check_rows("policy_scores", policy_scores)
    reference = _check_rows("reference_scores", reference_scores)
    if policy.shape != reference.shape:
        raise ValueError(
            f"`policy_scores` has {len(policy)} entries and `reference_scores` has {len(reference)}. "
            "Give both one score per prompt, in the same order."
        )
    return np.where(policy == reference, 0.5, policy > reference)


def win_rate(policy_scores: ArrayLike, reference_scores: ArrayLike) -> float:
    """Share of the prompts on which the policy beats the reference; a tie counts half.

    Args:
        policy_scores: Scores of the policy's completions, shape `(N,)`. Higher is better.
        reference_scores: Scores of the reference's completions, shape `(N,)`.

    Returns:
        A number in [0, 1]; 0.5 if neither is better.

    Raises:
        ValueError: If the shapes differ, there are no scores, or a score is nan.

    Example:
        >>> win_rate([3.0, 1.0, 2.0, 2.0], [1.0, 1.0, 5.0, 0.0])
        0.625
    """
    return float(win_outcomes(policy_scores, reference_scores).mean())


def bootstrap_interval(
    values: ArrayLike, clusters: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of a mean whose rows come in clusters, such as several completions of one prompt.

    Rows of one cluster resemble each other, so whole clusters are drawn with replacement, and the interval is cut
    from the percentiles of the mean over all drawn rows.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997).

    Args:
        values: One value per row, shape `(N,)`.
        clusters: The cluster of each row, shape `(N,)`: numbers or strings.
        level: Probability that the interval is to cover the true mean, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Returns:
        `(low, high)`.

    Raises:
        ValueError: If the shapes differ, a value is nan, there are fewer than two clusters, or `level` is not in
            (0, 1).

    Example:
        >>> low, high = bootstrap_interval([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], clusters=["a", "a", "b", "b", "c", "c"])
        >>> round(low, 2), round(high, 2)
        (0.0, 1.0)
    """
    rows, labels = _check_rows("values", values), np.asarray(clusters)
    if rows.shape != labels.shape:
        raise ValueError(
            f"`values` has shape {rows.shape}, but `clusters` has shape {labels.shape}. Give one per row."
        )
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
    _, index = np.unique(labels, return_inverse=True)
    sums, sizes = np.bincount(index, weights=rows), np.bincount(index)
    count = len(sizes)
    if count < 2:
        raise ValueError("All rows are in one cluster, which says nothing about others. Give at least two clusters.")
    # How often each cluster is drawn in each resample, shape (resamples, clusters).
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    means = (draws @ sums) / (draws @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def proportion_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a proportion, such as a reward model's accuracy on independent pairs.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927).

    Args:
        successes: Number of successes.
        n: Number of trials, at least 1.
        level: Probability that the interval is to cover the true proportion, in (0, 1).

    Returns:
        `(low, high)`, within [0, 1].

    Raises:
        ValueError: If not `0 <= successes <= n`, `n` is 0, or `level` is not in (0, 1).

    Example:
        >>> low, high = proportion_interval(5, 10)
        >>> round(low, 4), round(high, 4)
        (0.2366, 0.7634)
    """
    if not (0 <= successes <= n and n > 0):
        raise ValueError(f"Expected 0 <= successes <= n with n > 0, got successes={successes} and n={n}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def _check_rows(name: str, values: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or len(rows) == 0:
        raise ValueError(f"`{name}` has shape {rows.shape}. Give one number per row, shape (N,), with N > 0.")
    if np.isnan(rows).any():
        raise ValueError(f"`{name}` holds nan in {int(np.isnan(rows).sum())} of {len(rows)} rows. Leave them out.")
    return rows
