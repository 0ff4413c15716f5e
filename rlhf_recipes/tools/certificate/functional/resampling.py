"""Confidence intervals where rows come in clusters, such as several pairs of one prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_recipes.statistics.metrics import proportion_interval

Summary = dict[str, "float | int | str | list[float] | None"]
Unit = Literal["prompts", "rows"]

FEWEST = 10
"""An interval needs this many independent units: of fewer the draws are too much alike."""

_RESAMPLES, _BLOCK = 1000, 100


def independent_units(clusters: ArrayLike) -> tuple[NDArray[Any], Unit]:
    """Choose what counts as independent: prompts, or single rows where there are too few different prompts.

    Rows of one prompt resemble each other, so prompts are drawn. A few prompts cannot be: an interval would be cut
    from a handful of different draws, and from one draw if there is a single prompt. Then rows are drawn, and the
    interval holds for these prompts only.

    Args:
        clusters: The prompt of each row, shape `(N,)`: numbers or strings.

    Returns:
        The unit of each row, shape `(N,)`, and what it is: `"prompts"`, or `"rows"` below `FEWEST` prompts.

    Example:
        >>> independent_units(["a", "a", "b"])
        (array([0, 1, 2]), 'rows')
    """
    prompts = np.asarray(clusters)
    if len(np.unique(prompts)) >= FEWEST:
        return prompts, "prompts"
    return np.arange(len(prompts)), "rows"


def resampled_sums(columns: ArrayLike, clusters: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """Draw whole clusters with replacement, 1,000 times, and add up the rows that were drawn.

    Any statistic that is a function of sums (means, shares, correlations) can be computed from these.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997).

    Args:
        columns: What is to be added up, shape `(N, K)`.
        clusters: The cluster of each row, shape `(N,)`: numbers or strings.
        seed: Seed of the draws.

    Returns:
        Sums, shape `(1000, K)`.

    Example:
        >>> sums = resampled_sums([[1.0, 2.0], [1.0, 2.0]], clusters=["a", "b"])
        >>> sums.shape, bool((sums == [2.0, 4.0]).all())
        ((1000, 2), True)
    """
    rows = np.asarray(columns, dtype=np.float64)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(index.max()) + 1
    per_cluster = np.stack([np.bincount(index, weights=column, minlength=count) for column in rows.T], axis=1)
    rng, chances = np.random.default_rng(seed), np.full(count, 1 / count)
    # In blocks: all draws at once would take 8 kB of memory per cluster.
    blocks = [rng.multinomial(count, chances, size=_BLOCK) @ per_cluster for _ in range(_RESAMPLES // _BLOCK)]
    return np.concatenate(blocks)


def percentile_interval(statistics: ArrayLike, level: float = 0.95) -> list[float] | None:
    """Cut the interval from the percentiles of a statistic over the bootstrap samples.

    Args:
        statistics: The statistic of each sample, shape `(R,)`; nan where it is not defined.
        level: Probability that the interval is to cover the true value, in (0, 1).

    Returns:
        `[low, high]`, or `None` where the statistic is not defined in more than a tenth of the samples.

    Example:
        >>> [round(end, 2) for end in percentile_interval(list(range(101)), level=0.9)]
        [5.0, 95.0]
    """
    values = np.asarray(statistics, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if not len(defined) or len(defined) < 0.9 * len(values):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def resampled_interval(
    columns: ArrayLike,
    clusters: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    level: float = 0.95,
) -> Summary:
    """Interval of a statistic of sums, by drawing independent units (`independent_units`).

    Args:
        columns: What is to be added up, shape `(N, K)`.
        clusters: The prompt of each row, shape `(N,)`.
        statistic: Makes of sums, shape `(R, K)`, the statistic of each draw, shape `(R,)`.
        level: Probability that the interval is to cover the true value.

    Returns:
        `interval`, and the `unit` that was drawn. Both are `None` where there are fewer than `FEWEST` rows, or the
        statistic is not defined in more than a tenth of the draws.

    Example:
        >>> resampled_interval([[1.0]] * 10, ["a"] * 10, lambda sums: sums[:, 0] / 10)
        {'interval': [1.0, 1.0], 'unit': 'rows'}
        >>> resampled_interval([[1.0]] * 9, ["a"] * 9, lambda sums: sums[:, 0] / 9)
        {'interval': None, 'unit': None}
    """
    units, unit = independent_units(clusters)
    interval = None
    if len(units) >= FEWEST:
        with np.errstate(invalid="ignore", divide="ignore"):
            interval = percentile_interval(statistic(resampled_sums(columns, units)), level)
    return {"interval": interval, "unit": None if interval is None else unit}


def mean_summary(values: ArrayLike, clusters: ArrayLike, level: float = 0.95) -> Summary:
    """Mean of rows with its interval, by drawing independent units.

    Args:
        values: One value per row, shape `(N,)`, `N` > 0.
        clusters: The prompt of each row, shape `(N,)`.
        level: Probability that the interval is to cover the true mean.

    Returns:
        `value`, `n`, the number of rows, and `interval` and `unit` as of `resampled_interval`.

    Example:
        >>> mean_summary([1.0, 3.0] * 10, [prompt for prompt in range(10) for _ in range(2)])
        {'value': 2.0, 'n': 20, 'interval': [2.0, 2.0], 'unit': 'prompts'}
    """
    rows = np.asarray(values, dtype=np.float64)
    columns = np.stack([rows, np.ones_like(rows)], axis=1)
    interval = resampled_interval(columns, clusters, lambda sums: sums[:, 0] / sums[:, 1], level)
    return {"value": float(rows.mean()), "n": len(rows), **interval}


def share_summary(outcomes: ArrayLike, clusters: ArrayLike, level: float = 0.95) -> Summary:
    """Share of rows in which something is so, with its interval.

    Where every row is a unit of its own (`independent_units`) this is Wilson's interval, which needs no least number
    of rows. Else prompts are drawn; if all outcomes are the same, drawing cannot tell how sure that is, and Wilson's
    interval for the number of prompts is given.

    Args:
        outcomes: 1 or true where it is so, shape `(N,)`, `N` > 0.
        clusters: The prompt of each row, shape `(N,)`.
        level: Probability that the interval is to cover the true share.

    Returns:
        `value`, `n`, the number of rows, `interval`, and its `unit`: `"prompts"` or `"rows"`.

    Example:
        >>> share_summary([1, 0, 1, 0], clusters=[0, 1, 2, 3])["value"]
        0.5
    """
    rows = np.asarray(outcomes).astype(bool)
    units, unit = independent_units(clusters)
    share, count = float(rows.mean()), len(np.unique(units))
    if count == len(rows) or share in (0.0, 1.0):
        interval = list(proportion_interval(round(share * count), count, level))
        return {"value": share, "n": len(rows), "interval": interval, "unit": unit}
    return mean_summary(rows, clusters, level)
