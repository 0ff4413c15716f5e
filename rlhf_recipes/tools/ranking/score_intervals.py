"""Bootstrap intervals of scores from votes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_recipes.tools.ranking.ranking import ScoringMethod
from rlhf_recipes.tools.ranking.votes import Vote, identified_items


class Interval(NamedTuple):
    """A score and its confidence interval, in the unit of the method.

    Attributes:
        score: The score.
        low: Lower end; None where votes do not identify the score, such as that of an item that never lost.
        high: Upper end; None likewise.

    Example:
        >>> print(Interval(0.5, 0.25, 0.75), Interval(2.0, None, None), sep="; ")
        0.5 [0.25, 0.75]; 2 (not identified)
    """

    score: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.score:.4g} (not identified)"
        return f"{self.score:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_scores(
    votes: Sequence[Vote],
    method: ScoringMethod,
    items: Sequence[Hashable] | None = None,
    relative_to: Hashable = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[Hashable, Interval]:
    """Score items with confidence intervals: how far other raters, prompts or votes could have moved the scores.

    Votes are drawn with replacement, all votes of a `group` together, and scored again; the interval is cut from the
    percentiles. A drawn order of votes is the order of the draws.

    No draw holds a loss of an item that never lost, so its interval would be the narrowest of all while nothing says
    how far ahead it is. Such an item has no interval (`identified_items`); its score comes from the prior or from `k`.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997). `evalica.bootstrap` knows single
    votes only; where every vote stands alone, the two agree.

    Args:
        votes: The votes. Without `group` each one is drawn alone, as if votes were independent of each other.
        method: Turns votes into scores. Use Bradley-Terry with a prior: without one, a draw in which an item never
            loses has no scores.
        items: All items, in the wanted order; by default those of the votes.
        relative_to: An item: give every score as its lead over this one, in each draw. Two items are compared by the
            interval of the lead; whether the intervals of their scores overlap says little, as all share one zero.
        level: Probability that an interval is to cover the true score, in (0, 1).
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        The score from all votes and its interval, for each item; without the ends where the votes do not identify it,
        or with `relative_to` its lead.

    Raises:
        ValueError: If `level` is not in (0, 1), `resamples` is below 1, `relative_to` is not an item, all votes are in
            one group, or the votes are refused by the method.

    Example:
        >>> from rlhf_recipes.tools.ranking.ranking import bradley_terry
        >>> votes = [Vote("a", "b")] * 30 + [Vote("b", "a")] * 10
        >>> score, low, high = bootstrap_scores(votes, bradley_terry, resamples=200)["a"]
        >>> 0 < low < score < high < 1.5
        True
        >>> print(bootstrap_scores([*votes, Vote("c", "a"), Vote("c", "b")], bradley_terry, resamples=200)["c"])
        0.9202 (not identified)
    """
    scores = method(votes, items)
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"Expected 0 < `level` < 1 and `resamples` from 1 on, got {level} and {resamples}.")
    if relative_to is not None and relative_to not in scores:
        raise ValueError(f"`relative_to` is {relative_to!r}, which is none of the {len(scores)} items.")
    draws = bootstrap_draws(votes, method, list(scores), resamples, seed)
    if relative_to is not None:
        draws -= draws[:, [list(scores).index(relative_to)]]
        scores = {item: score - scores[relative_to] for item, score in scores.items()}
    lows, highs = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    identified = identified_items(votes, relative_to)
    return {
        item: Interval(score, float(low), float(high)) if item in identified else Interval(score, None, None)
        for (item, score), low, high in zip(scores.items(), lows, highs, strict=True)
    }


def bootstrap_draws(
    votes: Sequence[Vote], method: ScoringMethod, items: Sequence[Hashable], resamples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Score items again and again, each time from votes that are drawn with replacement, whole groups together.

    Args:
        votes: The votes.
        method: Turns votes into scores.
        items: All items, in the wanted order.
        resamples: Number of draws, R.
        seed: Seed of the draws.

    Returns:
        Scores of the K items in each draw, shape `(R, K)`.

    Raises:
        ValueError: If all votes are in one group, or the votes are refused by the method.

    Example:
        >>> from rlhf_recipes.tools.ranking.ranking import bradley_terry
        >>> bootstrap_draws([Vote("a", "b"), Vote("b", "a")], bradley_terry, ["a", "b"], resamples=5).shape
        (5, 2)
    """
    groups: dict[object, list[Vote]] = {}
    for index, vote in enumerate(votes):
        groups.setdefault(("alone", index) if vote.group is None else ("group", vote.group), []).append(vote)
    if len(groups) < 2:
        raise ValueError("All votes are in one group, which says nothing about others. Give at least two groups.")
    pools, rng = list(groups.values()), np.random.default_rng(seed)
    draws = np.empty((resamples, len(items)))
    for row in draws:
        drawn = [vote for pool in rng.integers(len(pools), size=len(pools)) for vote in pools[pool]]
        row[:] = list(method(drawn, items, allow_disconnected=True).values())
    return draws
