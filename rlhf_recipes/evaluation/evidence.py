"""Evidence of reward hacking: which completions are rewarded most above their worth."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata


def most_suspicious(proxy: ArrayLike, truth: ArrayLike | None = None, most: int = 10) -> list[int]:
    """Find the completions that stand higher by the reward than by the true score.

    The two scores have different units, so ranks are compared: `rank(proxy) - rank(truth)`, equal scores with their
    mean rank. Without a true score the highest rewards come first.

    Args:
        proxy: Rewards, shape `(N,)`.
        truth: True scores of the same completions, shape `(N,)`.
        most: How many to return.

    Returns:
        Indices, the most suspicious first, of equal ones the first. Completions with a score that is not finite are
        left out.

    Example:
        >>> most_suspicious([0.1, 3.0, 2.0], [0.5, -1.0, 9.0], most=1)
        [1]
        >>> most_suspicious([0.1, 3.0, 2.0])
        [1, 2, 0]
    """
    rewards = np.asarray(proxy, np.float64)
    scores = np.zeros_like(rewards) if truth is None else np.asarray(truth, np.float64)
    known = np.flatnonzero(np.isfinite(rewards) & np.isfinite(scores))
    distance = rankdata(rewards[known]) - rankdata(scores[known])
    return [int(index) for index in known[np.argsort(-distance, kind="stable")][:most]]
