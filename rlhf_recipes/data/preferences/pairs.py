"""Readers of pairs: a winner, ties, soft labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from datasets import Dataset

from rlhf_recipes.data.conversations import read_conversation
from rlhf_recipes.data.dialogues import BadRow, Row, check_kind, split_pair, two_prompts
from rlhf_recipes.data.preferences.reading import Rows, column_names, read
from rlhf_recipes.data.preferences.schema import quoted

SIDES = (
    ("chosen", "rejected"),
    ("completion_a", "completion_b"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
)

LABEL_WORDS: Mapping[str, float] = MappingProxyType(
    dict.fromkeys(("first", "a", "left", "chosen"), 1.0)
    | dict.fromkeys(("second", "b", "right", "rejected"), 0.0)
    | dict.fromkeys(("tie", "equal", "same", "neither", "both"), 0.5)
)
"""Words for the better one of two, as probability that the first one is better."""


def from_pairs(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    r"""Read pairs with a winner: `chosen` and `rejected`, as TRL's `RewardTrainer` takes them.

    The prompt is the column `prompt`, or what two whole dialogues share before their last assistant turn (hh-rlhf,
    https://huggingface.co/papers/2204.05862). Pairs whose prompts differ are left out and counted.

    Args:
        rows: Rows with `chosen` and `rejected`; `prompt`, `chosen_ids`, `rejected_ids` and `margin` may be there.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table: `label` is 1.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> rows = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}]
        >>> table = from_pairs(rows)
        >>> table[0]["prompt"], table[0]["completions"], table[0]["label"]
        ('\n\nHuman: Hi\n\nAssistant:', [' Hello!', ' No.'], 1.0)
    """

    def convert(row: Row) -> Row:
        return two_completions(row, SIDES[0]) | {"label": 1.0, "margin": row.get("margin")}

    return read_pairs(rows, convert, SIDES[0], may_have=["margin"], drop_bad_rows=drop_bad_rows, source=source)


def from_labelled_pairs(
    rows: Rows,
    *,
    labels: Mapping[str, float] = LABEL_WORDS,
    drop_bad_rows: bool = False,
    source: str | None = None,
) -> Dataset:
    """Read pairs with a label that may be a tie or a probability.

    Args:
        rows: Rows with two completions (one of the pairs of columns in `SIDES`) and `label`: the probability that the
            FIRST one is better (1: it is, 0: the second one is, 0.5: a tie), or a word. `prompt` and `margin` may be
            there.
        labels: Probability by word, in lower case.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `label`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> pair = {"prompt": "Hi", "response_a": "Hello!", "response_b": "Hey!"}
        >>> from_labelled_pairs([pair | {"label": "tie"}, pair | {"label": 0.7}])["label"][:]
        [0.5, 0.7]
    """
    sides = find_sides(column_names(rows))

    def convert(row: Row) -> Row:
        return two_completions(row, sides) | {"label": label_of(row["label"], labels), "margin": row.get("margin")}

    return read_pairs(
        rows, convert, sides, needs=["label"], may_have=["margin"], drop_bad_rows=drop_bad_rows, source=source
    )


def find_sides(names: Sequence[str]) -> tuple[str, str]:
    """Find the columns of the two completions.

    Args:
        names: The columns that there are.

    Returns:
        One of `SIDES`.

    Raises:
        ValueError: If none or several are there.

    Example:
        >>> find_sides(["prompt", "response_a", "response_b"])
        ('response_a', 'response_b')
    """
    matches = [sides for sides in SIDES if set(sides) <= set(names)]
    if len(matches) != 1:
        known = "; ".join(quoted(sides) for sides in SIDES)
        raise ValueError(f"Expected two completions in one of these pairs of columns: {known}. Found {quoted(names)}.")
    return matches[0]


def label_of(value: Any, labels: Mapping[str, float]) -> float:
    """Read a label.

    Args:
        value: A probability, or a word.
        labels: Probability by word, in lower case.

    Returns:
        The probability that the first one is better.

    Raises:
        BadRow: If it is neither a number nor one of the words.

    Example:
        >>> label_of(" Tie ", LABEL_WORDS), label_of("0.25", LABEL_WORDS), label_of(True, LABEL_WORDS)
        (0.5, 0.25, 1.0)
    """
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, str) and word in labels:
        return labels[word]
    try:
        return float(word)
    except (TypeError, ValueError):
        raise BadRow(f"`label` is neither a number nor one of the words {', '.join(labels)}") from None


def two_completions(row: Row, sides: tuple[str, str]) -> Row:
    """Make the prompt, the completions and their token ids from two columns.

    Args:
        row: Values by column.
        sides: The columns of the two.

    Returns:
        `prompt`, `completions` and `completion_ids`.

    Raises:
        BadRow: If they are no pair.

    Example:
        >>> two_completions({"prompt": "Hi", "chosen": "a", "rejected": "b"}, ("chosen", "rejected"))["completions"]
        ['a', 'b']
    """
    row = read_conversation(row)
    for name in ("prompt", *sides):
        check_kind(row.get(name), name)
    prompt, first, second = split_pair(row, sides)
    ids = [row.get(f"{side}_ids") for side in sides]
    if (ids[0] is None) != (ids[1] is None):
        raise BadRow("only one of the two completions has token ids")
    return {"prompt": prompt, "completions": [first, second], "completion_ids": None if ids[0] is None else ids}


def read_pairs(
    rows: Rows,
    convert: Callable[[Row], Row],
    sides: tuple[str, str],
    *,
    needs: Sequence[str] = (),
    may_have: Sequence[str] = (),
    drop_bad_rows: bool,
    source: str | None,
) -> Dataset:
    """Make a preference table of rows with two completions; see `reading.read`.

    Args:
        rows: The rows.
        convert: Makes the table's columns of a row.
        sides: The columns of the two completions.
        needs: Further columns that `convert` reads.
        may_have: Further columns that `convert` reads where they are there.
        drop_bad_rows: Whether to leave out bad rows.
        source: Name of the source.

    Returns:
        The table, without the pairs whose prompts differ.

    Raises:
        ValueError: As `read`.

    Example:
        >>> rows = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}]
        >>> def convert(row):
        ...     return two_completions(row, SIDES[0]) | {"label": 1.0}
        >>> read_pairs(rows, convert, SIDES[0], drop_bad_rows=False, source=None)["label"][:]
        [1.0]
    """
    return read(
        rows,
        convert,
        needs=(*sides, *needs),
        may_have=("prompt", *(f"{side}_ids" for side in sides), *may_have),
        drop_bad_rows=drop_bad_rows,
        source=source,
        harmless={two_prompts(sides)},
    )
