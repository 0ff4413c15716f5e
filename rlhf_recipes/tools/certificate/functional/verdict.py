"""The verdict: is a reward model good enough for PPO? The worst result of a rule, and all reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_recipes.tools.certificate.functional.reasons import Level, Reason
from rlhf_recipes.tools.certificate.functional.rules import RULES

VERDICTS: dict[Level, str] = {"not fit": "not fit", "care": "use with care", "good": "fit for PPO"}

_ORDER: tuple[Level, ...] = ("not fit", "care", "good", "not checked")


def judge(measures: Mapping[str, Any]) -> dict[str, Any]:
    """Judge a reward model by the measures of its certificate.

    A rule passes by an interval only: one whose interval is missing gives `"not checked"`. That does not count against
    a model, except for the accuracy: a model that is not known to be better than guessing is not fit.

    Args:
        measures: What `certify` measured. Parts that are missing or `None` are not checked.

    Returns:
        `verdict`: `"fit for PPO"`, `"use with care"` or `"not fit"`, the worst that a rule gives; `reasons`, the worst
        first, each with `level`, `measure` and `text`; and `not_checked`, the texts of those that could not be judged.

    Example:
        >>> judge({"scores": {"not_finite": 3, "n": 10}})["reasons"][0]["text"]
        '3 of 10 scores are not finite: the reward model diverged.'
    """
    reasons = list(_broken(measures["scores"])) or [reason for rule in RULES for reason in rule(measures)]
    reasons.sort(key=lambda reason: _ORDER.index(reason.level))
    unchecked = [reason for reason in reasons if reason.level == "not checked"]
    blind = any(reason.measure == "accuracy" for reason in unchecked)
    return {
        "verdict": VERDICTS["not fit" if blind else reasons[0].level],
        "reasons": [vars(reason) for reason in reasons],
        "not_checked": [reason.text for reason in unchecked],
    }


def _broken(scores: Mapping[str, Any]) -> Iterator[Reason]:
    if scores["not_finite"]:
        text = f"{scores['not_finite']} of {scores['n']} scores are not finite: the reward model diverged."
        yield Reason("not fit", "scores", text)
    elif scores["constant"]:
        text = f"All {scores['n']} scores are {scores['all']['mean']:.4g}: the reward model is constant."
        yield Reason("not fit", "scores", text)
