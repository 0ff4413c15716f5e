"""Readers of pairs with a grade: by how much the better one is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from datasets import Dataset

from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.preferences.checks import is_whole
from rlhf_recipes.data.preferences.pairs import (
    LABEL_WORDS,
    SIDES,
    find_sides,
    label_of,
    read_pairs,
    two_completions,
)
from rlhf_recipes.data.preferences.reading import Rows, column_names, read
from rlhf_recipes.statistics.numbers import is_number

LLAMA2_SMALL_MARGINS: Mapping[str, float] = MappingProxyType(
    {
        "significantly better": 1.0,
        "better": 2 / 3,
        "slightly better": 1 / 3,
        "negligibly better": 0.0,
        "negligibly better / unsure": 0.0,
    }
)
"""Margins by grade (https://huggingface.co/papers/2307.09288, appendix A.3.3, "margin small")."""

LLAMA2_LARGE_MARGINS: Mapping[str, float] = MappingProxyType(
    {grade: 3 * margin for grade, margin in LLAMA2_SMALL_MARGINS.items()}
)
"""Margins by grade (same table, "margin large")."""

HELPSTEER2_MARGINS: Mapping[int, float] = MappingProxyType({0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0})
"""Margins by absolute strength (https://huggingface.co/papers/2410.01257)."""


def from_graded_pairs(
    rows: Rows,
    *,
    margins: Mapping[Any, float] = LLAMA2_SMALL_MARGINS,
    drop_bad_rows: bool = False,
    source: str | None = None,
) -> Dataset:
    """Read pairs with a grade that says by how much the better one is better.

    Args:
        rows: Rows with two completions (one of the pairs of columns in `SIDES`) and `strength`, the grade. A `label`
            (as in `from_labelled_pairs`) says which one is better; without it, `chosen` is.
        margins: Margin by grade, words in lower case.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `label` and `margin`.

    Raises:
        ValueError: If columns are missing, rows cannot be used (a grade that `margins` does not have, a tie with a
            margin), or none is left.

    Example:
        >>> pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
        >>> rows = [pair | {"strength": "Significantly better"}, pair | {"strength": "slightly better"}]
        >>> from_graded_pairs(rows, margins={"significantly better": 1.0, "slightly better": 0.25})["margin"][:]
        [1.0, 0.25]
    """
    names = column_names(rows)
    sides = find_sides(names)
    needs = ("strength",) if sides == SIDES[0] else ("strength", "label")

    def convert(row: Row) -> Row:
        label = label_of(row["label"], LABEL_WORDS) if "label" in names else 1.0
        return two_completions(row, sides) | {"label": label, "margin": _margin_of(row["strength"], margins)}

    return read_pairs(
        rows, convert, sides, needs=needs, may_have=["label"], drop_bad_rows=drop_bad_rows, source=source
    )


def from_signed_pairs(
    rows: Rows,
    *,
    margins: Mapping[int, float] = HELPSTEER2_MARGINS,
    drop_bad_rows: bool = False,
    source: str | None = None,
) -> Dataset:
    """Read pairs with a signed strength, as in HelpSteer2-Preference (https://huggingface.co/papers/2410.01257).

    Args:
        rows: Rows with two completions (one of the pairs of columns in `SIDES`) and `preference_strength`: below 0 the
            first one is better, above 0 the SECOND one, 0 is a tie.
        margins: Margin by absolute strength.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `label` and `margin`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> pair = {"prompt": "Hi", "response_1": "Hello!", "response_2": "No."}
        >>> table = from_signed_pairs([pair | {"preference_strength": strength} for strength in (-3, 0, 1)])
        >>> list(zip(table["label"], table["margin"]))
        [(1.0, 3.0), (0.5, 0.0), (0.0, 1.0)]
    """
    sides = find_sides(column_names(rows))

    def convert(row: Row) -> Row:
        return two_completions(row, sides) | _signed(row["preference_strength"], "preference_strength", margins)

    return read_pairs(rows, convert, sides, needs=["preference_strength"], drop_bad_rows=drop_bad_rows, source=source)


def from_helpsteer3(
    rows: Rows,
    *,
    margins: Mapping[int, float] = HELPSTEER2_MARGINS,
    drop_bad_rows: bool = False,
    source: str | None = None,
) -> Dataset:
    """Read pairs in the form of HelpSteer3-Preference (https://huggingface.co/papers/2505.11475).

    Args:
        rows: Rows with `context` (a chat, or text), `response1`, `response2` and `overall_preference`: below 0 the
            first one is better, above 0 the SECOND one, 0 is a tie.
        margins: Margin by absolute strength.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `label` and `margin`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> pair = {"context": [{"role": "user", "content": "Hi"}], "response1": "No.", "response2": "Hello!"}
        >>> table = from_helpsteer3([pair | {"overall_preference": 2}])
        >>> table[0]["completions"][1], table[0]["label"], table[0]["margin"]
        ([{'role': 'assistant', 'content': 'Hello!'}], 0.0, 2.0)
    """
    sides = ("response1", "response2")

    def convert(row: Row) -> Row:
        pair = two_completions({"prompt": row["context"], **{side: row[side] for side in sides}}, sides)
        return pair | _signed(row["overall_preference"], "overall_preference", margins)

    needs = ("context", *sides, "overall_preference")
    return read(rows, convert, needs=needs, drop_bad_rows=drop_bad_rows, source=source)


def _signed(strength: Any, name: str, margins: Mapping[int, float]) -> Row:
    if not is_number(strength) or abs(strength) not in margins:
        raise BadRow(f"`{name}` is none of the strengths that have a margin")
    label = 0.5 if strength == 0 else float(strength < 0)
    return {"label": label, "margin": margins[abs(int(strength))]}


def _margin_of(value: Any, margins: Mapping[Any, float]) -> float:
    grade = value.strip().lower() if isinstance(value, str) else value
    if not (isinstance(grade, str) or is_number(grade)) or grade not in margins:
        raise BadRow(f"`strength` is none of the grades {', '.join(map(str, margins))}")
    margin = float(margins[grade])
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"The margin of {grade!r} must be at least 0, got {margin}.")
    return margin


def confidence_margin(confidence: int, low: int = 1, high: int = 9) -> float:
    """Make a margin of a labeller's confidence: its distance from the middle of the scale, from 0 to 1.

    With `margin_use: scale` it is the weight of a pair, with `margin_use: ignore` nothing, as in the paper.

    Source: the scale is that of the comparisons of https://huggingface.co/papers/2009.01325.

    Args:
        confidence: A whole number on the scale; its middle says that the labeller was undecided.
        low: Lowest confidence.
        high: Highest one.

    Returns:
        The margin, in [0, 1].

    Raises:
        ValueError: If the confidence is not a whole number on the scale.

    Example:
        >>> [confidence_margin(confidence) for confidence in (1, 5, 6, 9)]
        [1.0, 0.0, 0.25, 1.0]
    """
    if not is_whole(confidence) or not low <= confidence <= high:
        raise ValueError(f"`confidence` must be a whole number from {low} to {high}, got {confidence!r}.")
    return abs(2 * confidence - low - high) / (high - low)
