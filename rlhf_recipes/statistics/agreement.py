"""Agreement of a judge, or of a reward model, with people where their labels exist, and of people with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from rlhf_recipes.statistics.metrics import bootstrap_interval, proportion_interval, sign_test


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


def people_agreement(
    labels: ArrayLike, human: ArrayLike, completions: Sequence[tuple[str, str]], seed: int = 0
) -> dict[str, Any]:
    """Compare a judge's labels with those of people, and with two rules that need no judge.

    Accuracies are over the pairs in which people preferred one completion; where the judge or the rule prefers none,
    the pair counts half. Chance has 0.5.

    Args:
        labels: The judge's probability that the first completion is better, shape `(N,)`.
        human: The people's, shape `(N,)`.
        completions: The two completions of each pair, as texts.
        seed: Seed of the bootstrap.

    Returns:
        `pairs`, which people decided, and `ties`, which they did not; `judge`, `longer` and `shorter` (the judge, and
        the rules that prefer the answer with more or with fewer characters), each with `accuracy` and Wilson's 95 %
        interval `accuracy_ci`; `chance_p_value`, the probability of so uneven a split of right and wrong labels of a
        judge that guesses (exact, two-sided); `over_length`, the judge's accuracy minus that of the better of the two
        rules, with its interval `over_length_ci` (paired bootstrap over pairs); and `kappa`, Cohen's, over all
        pairs in both orders, so that it does not matter which completion comes first.

    Raises:
        ValueError: If the numbers of labels and pairs differ, or people decided no pair.

    Example:
        >>> pairs = [("a", "bb"), ("aaa", "b"), ("aaa", "b"), ("a", "bb")]
        >>> found = people_agreement([0.9, 0.8, 0.3, 0.1], [1.0, 1.0, 0.0, 0.0], pairs)
        >>> found["judge"]["accuracy"], found["longer"]["accuracy"], found["over_length"]
        (1.0, 0.5, 0.5)
    """
    ours, theirs = np.asarray(labels, dtype=np.float64), np.asarray(human, dtype=np.float64)
    human_agreement(ours, theirs)  # refuses labels that are none
    if len(completions) != len(ours):
        raise ValueError(f"Give two completions for each label, got {len(ours)} labels and {len(completions)} pairs.")
    side = np.sign(theirs - 0.5)
    decided = side != 0
    if not decided.any():
        raise ValueError(f"People decided none of the {len(ours)} pairs: all of their labels are 0.5.")
    lengths = np.array([len(first.strip()) - len(second.strip()) for first, second in completions])
    margins = {"judge": ours - 0.5, "longer": lengths, "shorter": -lengths}
    right = {name: _right(values * side)[decided] for name, values in margins.items()}
    rule = max(("longer", "shorter"), key=lambda name: right[name].mean())
    differences = right["judge"] - right[rule]
    several = len(differences) > 1
    return {
        "pairs": int(decided.sum()),
        "ties": int((~decided).sum()),
        **{name: _accuracy(values) for name, values in right.items()},
        "chance_p_value": sign_test(right["judge"]),
        "over_length": float(differences.mean()),
        "over_length_ci": list(bootstrap_interval(differences, np.arange(len(differences)), seed=seed))
        if several
        else None,
        # In both orders: where people's choice is always the first, agreement by chance would be all there is.
        "kappa": human_agreement([*ours, *(1 - ours)], [*theirs, *(1 - theirs)])["kappa"],
    }


def _right(margins: NDArray[Any]) -> NDArray[np.float64]:
    """1 for a pair that is right, 0 for a wrong one, 0.5 where neither is preferred."""
    right: NDArray[np.float64] = np.sign(margins) / 2 + 0.5
    return right


def _accuracy(right: NDArray[np.float64]) -> dict[str, Any]:
    return {"accuracy": float(right.mean()), "accuracy_ci": list(proportion_interval(float(right.sum()), len(right)))}


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


def krippendorff_alpha(values: ArrayLike, units: ArrayLike, *, interval: bool = False) -> float:
    """Agreement of any number of people on what they judged, each on some of it: Krippendorff's alpha.

    `1 - D_o / D_e`: the mean difference of two judgements of one unit, over that of any two judgements. 1 is agreement
    on all, 0 what chance gives. Krippendorff asks for 0.8, and for 0.667 where conclusions are tentative; on
    preferences people reach less.

    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), sections C and D.

    Args:
        values: The judgements, as numbers, shape `(N,)`.
        units: What each of them judges, shape `(N,)`: numbers or strings. Units with one judgement do not count.
        interval: Whether the difference of two judgements is that of the numbers, squared. Otherwise it is 1 for two
            different ones, however far apart.

    Returns:
        Alpha; `nan` where no unit was judged twice, or all judgements of those that were are one and the same.

    Raises:
        ValueError: If the shapes differ, or a value is a text, missing or not finite; with the row (from 0).

    Example:
        >>> krippendorff_alpha([1, 1, 0, 0, 1, 0], ["a", "a", "b", "b", "c", "c"])
        0.4444444444444444
    """
    numbers, labels = _numbers("values", values), np.asarray(units)
    if numbers.shape != labels.shape:
        raise ValueError(f"Give one unit per value, got shapes {labels.shape} and {numbers.shape}.")
    names, unit = np.unique(labels, return_inverse=True)
    levels, level = np.unique(numbers, return_inverse=True)
    counts = np.zeros((len(names), len(levels)))
    np.add.at(counts, (unit, level), 1)
    counts = counts[counts.sum(axis=1) > 1]
    totals = counts.sum(axis=0)
    # How often two judgements of a unit are this one and that one; a unit counts as often as it was judged.
    weighted = counts / (counts.sum(axis=1, keepdims=True) - 1)
    coincidences = weighted.T @ counts - np.diag(weighted.sum(axis=0))
    gaps = levels[:, None] - levels
    differences = gaps**2 if interval else (gaps != 0).astype(np.float64)
    expected = totals @ differences @ totals
    return float(1 - (totals.sum() - 1) * (coincidences * differences).sum() / expected) if expected else math.nan


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
