"""Two answers to one question: a judge is shown a pair in both orders, and a label is made of what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard, get_args

from scipy.stats import binomtest

from rlhf_recipes.statistics.numbers import is_number

Choice = Literal["first", "second", "tie"]
Answer = Choice | float
"""What a judge says: a word, or the probability that the completion shown first is better."""

REASONED = (0.4, 0.6)
"""Bounds of the labels of a judge that reasons first, in Constitutional AI (https://huggingface.co/papers/2212.08073)."""

_BOTH_SAY: dict[tuple[Answer, Answer], float] = {("first", "second"): 1.0, ("second", "first"): 0.0}
_AS_NUMBER: dict[Answer, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}


class Judge(Protocol):
    """Any callable that names the better one of two completions as it is shown them."""

    def __call__(self, prompt: str, first: str, second: str, /) -> Answer:
        """Say "first", "second" or "tie", or give the probability that the first one is better."""


@dataclass(frozen=True)
class Judgement:
    """What a judge said about `N` pairs in both orders.

    Attributes:
        labels: Probability that the first completion of each pair wins, `N` numbers (`label_of_both`). This is the
            `label` of a preference table and of `pairwise_loss`.
        agreement: Share of pairs whose two answers agree; two ties agree, and of probabilities the sides that they
            lean to.
        shown_first: Number of pairs in which the judge chose what was shown first, both times.
        shown_second: Number of pairs in which it chose what was shown second, both times.
        position_bias: `(shown_first - shown_second) / N`, from -1 to 1: 0 for a judge that does not care about
            positions, 1 for one that always takes the first.
        position_bias_p_value: Probability of so uneven a split of those pairs, or a more uneven one, without bias
            (exact two-sided sign test); 1 if there are none.
    """

    labels: list[float]
    agreement: float
    shown_first: int
    shown_second: int
    position_bias: float
    position_bias_p_value: float


def is_answer(value: Any) -> TypeGuard[Answer]:
    """Return whether a value is an answer: "first", "second", "tie", or a probability.

    Example:
        >>> [is_answer(value) for value in ("tie", 0.3, 1.5, float("nan"), True, None, "A")]
        [True, True, False, False, False, False, False]
    """
    return value in get_args(Choice) if isinstance(value, str) else is_number(value) and 0 <= value <= 1


def label_of_both(answer: Answer, swapped: Answer) -> float:
    """Make a label of the two answers about a pair.

    Words count where both name the same completion; else the pair is a tie. Of probabilities it is the mean of what
    they give the first completion: `(p + 1 - q) / 2`.

    Source: https://huggingface.co/papers/2309.00267, which averages the probabilities of both orders.

    Args:
        answer: About the pair.
        swapped: About the pair with its completions swapped.

    Returns:
        Probability that the first completion is better.

    Example:
        >>> label_of_both("first", "second"), label_of_both("first", "first"), label_of_both(0.9, 0.5)
        (1.0, 0.5, 0.7)
    """
    if isinstance(answer, str) and isinstance(swapped, str):
        return _BOTH_SAY.get((answer, swapped), 0.5)
    return (_AS_NUMBER.get(answer, answer) + 1.0 - _AS_NUMBER.get(swapped, swapped)) / 2  # type: ignore[operator]


def clamped(label: float, bounds: tuple[float, float] | None) -> float:
    """Keep a label within bounds.

    Source: https://huggingface.co/papers/2212.08073: a judge that has given reasons is nearly certain of its choice,
    more than it is right, so that its labels are kept within 0.4 and 0.6 (`REASONED`).

    Args:
        label: The label.
        bounds: The lowest and the highest label. `None`: as it is.

    Raises:
        ValueError: If the bounds are not those of labels.

    Example:
        >>> clamped(0.97, REASONED), clamped(0.45, REASONED), clamped(0.97, None)
        (0.6, 0.45, 0.97)
    """
    if bounds is None:
        return label
    low, high = bounds
    if not 0 <= low <= 0.5 <= high <= 1:
        raise ValueError(f"The bounds of a label lie on both sides of 0.5, from 0 to 1; got {low:g} and {high:g}.")
    return min(max(label, low), high)


def judge_in_both_orders(judge: Judge, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> Judgement:
    """Ask a judge about every pair twice, with the completions swapped, and make labels of what it says.

    Source: https://huggingface.co/papers/2309.00267, which averages the answers for both orders.

    Args:
        judge: The judge.
        prompts: `N` prompts.
        completions: Two completions for each prompt.

    Returns:
        Labels for the pairwise loss, and how consistent the judge was.

    Raises:
        ValueError: If there is no pair, the lengths differ, a row does not have two completions, or the judge answers
            anything but "first", "second", "tie" or a probability; with the row (from 0).

    Example:
        >>> def longer(prompt, first, second):
        ...     return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"
        >>> judged = judge_in_both_orders(longer, ["q", "q", "q"], [("aa", "a"), ("a", "aa"), ("a", "b")])
        >>> judged.labels, judged.agreement, judged.position_bias
        ([1.0, 0.0, 0.5], 1.0, 0.0)
    """
    if not prompts or len(prompts) != len(completions):
        raise ValueError(f"Expected one pair per prompt, got {len(prompts)} prompts and {len(completions)} pairs.")
    answers = []
    for row, (prompt, pair) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"A judge compares two completions; row {row} has {pair!r}.")
        answers.append((_ask(judge, prompt, pair[0], pair[1], row), _ask(judge, prompt, pair[1], pair[0], row)))
    return judgement_of(answers)


def judgement_of(answers: Sequence[tuple[Answer, Answer]]) -> Judgement:
    """Sum up answers about pairs in both orders.

    Args:
        answers: For each pair the answer, and the one with the completions swapped. At least one pair.

    Returns:
        The labels, and how consistent the judge was.

    Example:
        >>> judgement_of([(0.9, 0.2), (0.8, 0.9)]).shown_first
        1
    """
    sides = [(_side(answer), _side(swapped)) for answer, swapped in answers]
    agreed = sum(both in (("first", "second"), ("second", "first"), ("tie", "tie")) for both in sides)
    shown_first, shown_second = sides.count(("first", "first")), sides.count(("second", "second"))
    biased = shown_first + shown_second
    return Judgement(
        labels=[label_of_both(*both) for both in answers],
        agreement=agreed / len(answers),
        shown_first=shown_first,
        shown_second=shown_second,
        position_bias=(shown_first - shown_second) / len(answers),
        position_bias_p_value=float(binomtest(shown_first, biased).pvalue) if biased else 1.0,
    )


def _side(answer: Answer) -> Choice:
    if isinstance(answer, str):
        return answer
    return "first" if answer > 0.5 else "second" if answer < 0.5 else "tie"


def _ask(judge: Judge, prompt: str, first: str, second: str, row: int) -> Answer:
    answer = judge(prompt, first, second)
    if not is_answer(answer):
        raise ValueError(
            f'The judge must answer "first", "second", "tie" or a probability, got {answer!r} for row {row}.'
        )
    return answer
