"""Items, what labellers say of them, and where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

STRENGTHS = ("slightly", "clearly", "much")
"""By how much the better one of two answers is better."""
VERDICTS = ("ranked", "incomparable", "skipped")


class Item(NamedTuple):
    """What is shown at once.

    Attributes:
        row: `prompt`, `completions`, and the other columns of its row in the data, also where it comes from.
        models: Who wrote each of the answers, in the order of `completions`; None where the row does not say.
        gold: Ranks of the answers that are known to be right, 1 for the best; None where nothing is known.
    """

    row: dict[str, Any]
    models: list[str] | None = None
    gold: list[int] | None = None


class Answer(NamedTuple):
    """What a labeller says of an item.

    Attributes:
        verdict: One of `VERDICTS`.
        ranks: With "ranked", the rank of each of `completions`, 1 for the best; ties share one.
        strength: For a pair with a better answer, one of `STRENGTHS`, or None where it is not known.
        note: In the labeller's own words.
    """

    verdict: str
    ranks: list[int] | None = None
    strength: str | None = None
    note: str = ""


class Judgement(NamedTuple):
    """An answer with where it comes from.

    Attributes:
        number: In the order in which they came, from 1.
        item: The item's number.
        labeller: Who gave it.
        answer: What was said.
        shown: Which answer stood where, as in `Showing`; None where it is not known.
        shown_at: When it came on the page, in UTC; None where that is not known, as for the other two.
        judged_at: When it was judged.
        milliseconds: How long the page was seen.
        undone_at: When it was taken back; None if it holds.
    """

    number: int
    item: int
    labeller: str
    answer: Answer
    shown: list[int] | None
    shown_at: str | None
    judged_at: str | None
    milliseconds: int | None
    undone_at: str | None


def checked(answer: Answer, number: int) -> Answer:
    """Check an answer, and number its ranks from 1 without gaps.

    Args:
        answer: The answer.
        number: How many completions the item has.

    Returns:
        The answer; a tie has no strength.

    Raises:
        ValueError: If it does not fit the item.

    Example:
        >>> checked(Answer("ranked", [3, 1, 3]), 3).ranks
        [2, 1, 2]
    """
    if answer.verdict not in VERDICTS or (answer.ranks is None) != (answer.verdict != "ranked"):
        raise ValueError(f"Expected ranks with the verdict `ranked` alone, got {answer.verdict!r} and {answer.ranks}.")
    if answer.ranks is None:
        return answer._replace(strength=None)
    if len(answer.ranks) != number or not all(1 <= rank <= number for rank in answer.ranks):
        raise ValueError(f"Expected a rank from 1 to {number} for each of the {number} answers, got {answer.ranks}.")
    if answer.strength is not None and answer.strength not in STRENGTHS:
        raise ValueError(f"Expected a strength of {', '.join(STRENGTHS)}, got {answer.strength!r}.")
    ranks = dense(answer.ranks)
    return answer._replace(ranks=ranks, strength=answer.strength if number == 2 and max(ranks) == 2 else None)


def dense(ranks: Sequence[float]) -> list[int]:
    """Number ranks from 1 without gaps.

    Args:
        ranks: A number for each answer, the smallest for the best.

    Returns:
        The ranks; ties share one.

    Example:
        >>> dense([1, 3, 1, 7])
        [1, 2, 1, 3]
    """
    places = sorted(set(ranks))
    return [places.index(rank) + 1 for rank in ranks]


def fingerprint(items: Sequence[Item]) -> str:
    """Hash items: the same for the same rows, wherever their file lies.

    Args:
        items: The items.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> one, other = ({"prompt": "Hi", "completions": ["a", "b"], "source": name} for name in ("x", "y"))
        >>> fingerprint([Item(one)]) == fingerprint([Item(other)])
        True
    """
    rows = [[{k: v for k, v in item.row.items() if k != "source"}, item.models, item.gold] for item in items]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
