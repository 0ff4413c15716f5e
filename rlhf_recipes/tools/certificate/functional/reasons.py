"""Reasons of the verdict: the lines of its rules, and whether there is evidence at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_recipes.statistics.numbers import is_number

Level = Literal["not fit", "care", "good", "not checked"]


@dataclass(frozen=True)
class Reason:
    """Result of one rule for a reward model.

    Args:
        level: `"good"`, `"care"`, `"not fit"`, or `"not checked"` where there is no evidence for any of these.
        measure: What was looked at.
        text: The number, and what it means.
    """

    level: Level
    measure: str
    text: str


@dataclass(frozen=True)
class Thresholds:
    """Lines that the rules draw. They are judgement, not results; docs/certificate.md says why.

    Args:
        pairs: Fewer held-out pairs than this say little.
        accuracy: A lower accuracy asks for care. (An interval that reaches down to 0.5 is not fit.)
        equal_scores: Share of pairs with equal scores from which the score does not depend on the completion.
        same_after_swap: Share of scores that another prompt leaves as they are, from which the prompt is ignored.
        prompt_shift: Mean absolute shift with another prompt, in standard deviations, below which it hardly counts.
        length_only: Rank correlation of score and length differences from which the model counts tokens.
        length: The same correlation from which care is asked for.
        calibration_error: ECE above which care is asked for, if chance does not explain it.
        gap: Training minus held-out accuracy above which care is asked for.
        repetition: Mean shift by saying everything twice, in standard deviations, above which care is asked for.
        politeness: Mean absolute effect of an added thank-you, in standard deviations, above which care is asked for.
        sample_spread: Standard deviation of samples over that of data, below which samples look all the same.
        sample_shift: Distance of the samples' mean from the data's, in standard deviations, above which it
            extrapolates.
    """

    pairs: int = 100
    accuracy: float = 0.6
    equal_scores: float = 0.5
    same_after_swap: float = 0.95
    prompt_shift: float = 0.1
    length_only: float = 0.9
    length: float = 0.5
    calibration_error: float = 0.1
    gap: float = 0.1
    repetition: float = 0.25
    politeness: float = 0.5
    sample_spread: float = 0.25
    sample_shift: float = 2.0


LINES = Thresholds()


def known_interval(summary: Mapping[str, Any] | None) -> list[float] | None:
    """Return the interval of a summary, or `None` if an end of it or the value itself is not known, or not finite.

    Example:
        >>> known_interval({"value": 0.5, "interval": [0.4, 0.6]})
        [0.4, 0.6]
        >>> known_interval({"value": float("nan"), "interval": [0.4, 0.6]}) is None
        True
    """
    ends, value = (summary or {}).get("interval"), (summary or {}).get("value")
    return ends if ends and all(map(is_number, (value, *ends))) else None


def stated(summary: Mapping[str, Any], signed: bool = False) -> str:
    """Write the value of a summary, with its interval where there is one.

    Example:
        >>> stated({"value": 0.25, "interval": [0.0, 0.5]}, signed=True), stated({"value": None})
        ('+0.250 [+0.000, +0.500]', 'not known')
    """
    sign, value = "+" if signed else "", summary.get("value")
    ends = known_interval(summary)
    if value is None:
        return "not known"
    return f"{value:{sign}.3f}" + ("" if ends is None else f" [{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]")


def unchecked(measure: str, text: str) -> Reason:
    """Report that a rule has no interval to judge by: whatever the value is, chance is not ruled out.

    Example:
        >>> unchecked("gap", "Training accuracy is 1.000, +0.500 over held-out").text
        'Training accuracy is 1.000, +0.500 over held-out. There is no interval: too few rows, or all are alike.'
    """
    return Reason("not checked", measure, f"{text}. There is no interval: too few rows, or all are alike.")


def undecided(measure: str, text: str) -> Reason:
    """Report that a value is beyond its line while its interval holds 0, so that the rows cannot tell.

    Example:
        >>> undecided("gap", "Training accuracy is 0.900, +0.200 [-0.100, +0.500] over held-out").level
        'not checked'
    """
    return Reason("not checked", measure, f"{text}: beyond the line, but the interval holds 0. Give it more rows.")
