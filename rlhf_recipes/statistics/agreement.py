"""Agreement of a judge, or of a reward model, with people, where their labels exist."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from rlhf_recipes.statistics.metrics import proportion_interval


def human_agreement(outcomes: ArrayLike, human: ArrayLike) -> dict[str, float | list[float]]:
    """Compare the choices between two completions with those of people.

    Accuracy is over the pairs in which people preferred one; a tie of the judge there counts as half. Cohen's kappa,
    `(p - p_chance) / (1 - p_chance)`, is over all pairs with the three answers win, tie and loss: 1 is agreement on
    all, 0 what chance gives with the same shares of answers. People agree with each other with a kappa of about 0.3
    to 0.6 on preferences, so more is not to be expected.

    Source: Cohen, A coefficient of agreement for nominal scales (1960); the comparison with people as in
    https://huggingface.co/papers/2306.05685, section 4.

    Args:
        outcomes: The judge's outcomes, shape `(N,)`: 1 where the first wins, 0 where it loses, 0.5 for a tie. Numbers
            in between, such as probabilities, count as the side they lean to.
        human: The people's, in the same way, shape `(N,)`.

    Returns:
        `accuracy` with `accuracy_ci`, Wilson's 95 % interval over the pairs that both decided, `kappa`, `pairs`, and
        `ties`, the share of the judge's ties. Accuracy is `nan` without a pair that people decided, and kappa where
        all give one and the same answer.

    Raises:
        ValueError: If the shapes differ, there is no pair, or an outcome is a text, missing or not in [0, 1]; with the
            row (from 0).

    Example:
        >>> found = human_agreement([1.0, 0.0, 1.0, 0.5], [1.0, 0.0, 0.0, 1.0])
        >>> found["accuracy"], round(found["kappa"], 3)
        (0.625, 0.2)
    """
    ours, theirs = _numbers("outcomes", outcomes), _numbers("human", human)
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"Give one outcome per pair for both, got shapes {ours.shape} and {theirs.shape}.")
    for name, values in (("outcomes", ours), ("human", theirs)):
        if (outside := np.flatnonzero((values < 0) | (values > 1))).size:
            raise ValueError(
                f"`{name}` must lie in [0, 1], got {values[outside[0]]:g} in row {outside[0]}. For grades on another "
                "scale take `grade_agreement`."
            )
    outcomes, labels = (np.sign(values - 0.5) / 2 + 0.5 for values in (ours, theirs))
    decided = labels != 0.5
    both = decided & (outcomes != 0.5)
    right = int((outcomes == labels)[both].sum())
    ties = outcomes == 0.5
    accuracy = (right + 0.5 * (decided & ties).sum()) / decided.sum() if decided.any() else float("nan")
    one_answer = len(set(outcomes.tolist()) | set(labels.tolist())) == 1
    by_chance = sum((outcomes == answer).mean() * (labels == answer).mean() for answer in (0.0, 0.5, 1.0))
    kappa = float("nan") if one_answer else ((outcomes == labels).mean() - by_chance) / (1 - by_chance)
    interval = proportion_interval(right, int(both.sum())) if both.any() else (float("nan"), float("nan"))
    return {
        "accuracy": float(accuracy),
        "accuracy_ci": list(interval),
        "kappa": float(kappa),
        "pairs": len(ours),
        "ties": float(ties.mean()),
    }


def grade_agreement(grades: ArrayLike, human: ArrayLike) -> dict[str, float]:
    """Compare grades, such as 1 to 10, with those of people: as numbers in their order.

    `kappa` is Cohen's weighted kappa with the squared difference of the grades as weight,
    `1 - mean((x_i - y_i)^2) / mean over all i, j of (x_i - y_j)^2`: 1 is agreement on all, 0 what chance gives with
    the same grades, below 0 less than that. A judge that is stricter throughout loses kappa, but no rank correlation.

    Source: Cohen, Weighted kappa: Nominal scale agreement with provision for scaled disagreement or partial credit
    (1968).

    Args:
        grades: The judge's grades, shape `(N,)`. Numbers: as texts "10" would come before "9".
        human: The people's grades on the same scale, shape `(N,)`.

    Returns:
        `kappa`; `spearman`, the rank correlation; `exact`, the share of equal grades; `difference`, the mean of the
        judge's minus the people's grade; `rows`. Kappa is `nan` where all grades are one and the same, and the rank
        correlation where one side gives a single grade.

    Raises:
        ValueError: If the shapes differ, there is no row, or a grade is a text or not finite; with the row (from 0).

    Example:
        >>> found = grade_agreement([9, 10, 2, 5], [8, 10, 2, 4])
        >>> round(found["kappa"], 3), found["spearman"], found["exact"], found["difference"]
        (0.976, 1.0, 0.5, 0.5)
    """
    ours, theirs = _numbers("grades", grades), _numbers("human", human)
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"Give one grade per row for both, got shapes {ours.shape} and {theirs.shape}.")
    by_chance = ours.var() + theirs.var() + (ours.mean() - theirs.mean()) ** 2
    varied = ours.min() < ours.max() and theirs.min() < theirs.max()
    return {
        "kappa": float(1 - ((ours - theirs) ** 2).mean() / by_chance) if by_chance else math.nan,
        "spearman": float(spearmanr(ours, theirs).statistic) if varied else math.nan,
        "exact": float((ours == theirs).mean()),
        "difference": float((ours - theirs).mean()),
        "rows": len(ours),
    }


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    # One finite number per row. numpy would read texts as numbers, and None as nan.
    rows = values.tolist() if hasattr(values, "tolist") else list(values)  # type: ignore[arg-type]
    for row, value in enumerate(rows):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"`{name}` must hold one finite number per row, got {value!r} in row {row}. Turn texts into numbers, "
                "and leave out rows without an answer."
            )
    return np.array(rows, dtype=np.float64)
