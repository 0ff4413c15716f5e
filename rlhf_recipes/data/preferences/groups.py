"""Readers of K completions of one prompt: rankings, the best one, ratings."""

from __future__ import annotations

import string
from typing import Any

from datasets import Dataset

from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.preferences.reading import Rows, column_names, read
from rlhf_recipes.data.preferences.schema import quoted

_TWICE = "`ranking` names a completion twice, so it contradicts itself"


def from_rankings(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    """Read rankings of K completions (https://huggingface.co/papers/2203.02155, section 3.5: K from 4 to 9).

    Args:
        rows: Rows with `prompt`, `completions`, and either `ranks` (for each completion its rank from 1, ties share
            one), or `ranking` (the completions from the best to the worst one): letters in the order of `completions`
            ("B > A = C"), or indices from 0, ties as a list ([1, [0, 2]]). `completion_ids` may be there.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `ranks`.

    Raises:
        ValueError: If columns are missing, rows cannot be used (a ranking that contradicts itself, say), or none is
            left.

    Example:
        >>> row = {"prompt": "Hi", "completions": ["No.", "Hello!", "Bye."]}
        >>> from_rankings([row | {"ranking": "B > A = C"}])["ranks"][:]
        [[2, 1, 2]]
    """
    name = _one_of(column_names(rows), "ranks", "ranking")

    def convert(row: Row) -> Row:
        return _group(row) | {"ranks": row[name] if name == "ranks" else _ranks(row[name], row["completions"])}

    return _read(rows, convert, name, drop_bad_rows, source)


def from_choices(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    """Read choices of the best of K completions (https://huggingface.co/papers/1909.08593, section 2).

    Args:
        rows: Rows with `prompt`, `completions` and `best`, an index from 0. `completion_ids` may be there.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `best`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> from_choices([{"prompt": "Hi", "completions": ["No.", "Hello!", "Bye.", "Hm."], "best": 1}])["best"][:]
        [1]
    """

    def convert(row: Row) -> Row:
        return _group(row) | {"best": row["best"]}

    return _read(rows, convert, "best", drop_bad_rows, source)


def from_ratings(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    """Read ratings: a number per completion, on one scale for all rows.

    Args:
        rows: Rows with `prompt`, `completions` and `ratings`; or with `prompt`, `completion` and `rating`, a row per
            completion. `completion_ids` may be there: a list per completion, or one for the one completion.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `ratings`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> from_ratings([{"prompt": "Hi", "completion": "Hello!", "rating": 4}])[0]["ratings"]
        [4.0]
    """
    name = _one_of(column_names(rows), "ratings", "rating")

    def convert(row: Row) -> Row:
        return _group(row) | {"ratings": row["ratings"] if name == "ratings" else [row["rating"]]}

    return _read(rows, convert, name, drop_bad_rows, source, single=name == "rating")


def from_token_labels(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    """Read labels of single tokens.

    Args:
        rows: Rows with `prompt`, `completions`, `completion_ids` and `token_labels` (each a list per completion); or
            with `prompt`, `completion`, `completion_ids` and `token_labels`, a row per completion. The ids are those
            of the whole sequence, prompt and completion, with a label for each: a number, or null where there is
            none (the prompt's tokens).
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `token_labels`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> row = {"prompt": "Hi", "completion": "Hello!", "completion_ids": [5, 6, 1], "token_labels": [None, 1, 0.5]}
        >>> from_token_labels([row])[0]["token_labels"]
        [[None, 1.0, 0.5]]
    """
    single = _one_of(column_names(rows), "completions", "completion") == "completion"

    def convert(row: Row) -> Row:
        return _group(row) | {"token_labels": [row["token_labels"]] if single else row["token_labels"]}

    return _read(rows, convert, "token_labels", drop_bad_rows, source, single=single)


def _read(
    rows: Rows, convert: Any, judgement: str, drop_bad_rows: bool, source: str | None, *, single: bool = False
) -> Dataset:
    return read(
        rows,
        convert,
        needs=["prompt", "completion" if single else "completions", judgement],
        may_have=["completion_ids"],
        drop_bad_rows=drop_bad_rows,
        source=source,
    )


def _one_of(names: list[str], *choices: str) -> str:
    matches = [name for name in choices if name in names]
    if len(matches) != 1:
        raise ValueError(f"Expected one of the columns {quoted(choices)}; found {quoted(names)}.")
    return matches[0]


def _group(row: Row) -> Row:
    """Take the columns that all kinds share, those of one completion as lists of one."""
    ids = row.get("completion_ids")
    if "completion" in row:
        return {
            "prompt": row["prompt"],
            "completions": [row["completion"]],
            "completion_ids": None if ids is None else [ids],
        }
    return {"prompt": row["prompt"], "completions": row["completions"], "completion_ids": ids}


def _ranks(ranking: Any, completions: Any) -> list[int]:
    """Turn an order, best first, into ranks; ties share a rank and the next one follows without a gap."""
    count = len(completions) if isinstance(completions, list) else 0
    levels = _levels(ranking)
    flat = [index for level in levels for index in level]
    if not all(isinstance(index, int) and 0 <= index < count for index in flat):
        raise BadRow("`ranking` names a completion that is not there")
    if len(set(flat)) < len(flat):
        raise BadRow(_TWICE)
    if len(flat) < count:
        raise BadRow("`ranking` leaves out a completion")
    rank_of = {index: rank for rank, level in enumerate(levels, 1) for index in level}
    return [rank_of[index] for index in range(count)]


def _levels(ranking: Any) -> list[list[Any]]:
    if isinstance(ranking, list):
        return [level if isinstance(level, list) else [level] for level in ranking]
    if not isinstance(ranking, str):
        raise BadRow("`ranking` is neither letters such as 'B > A = C' nor a list of indices")
    letters = [[letter.strip().upper() for letter in level.split("=")] for level in ranking.split(">")]
    if not all(letter and letter in string.ascii_uppercase for level in letters for letter in level):
        raise BadRow("`ranking` is neither letters such as 'B > A = C' nor a list of indices")
    return [[string.ascii_uppercase.index(letter) for letter in level] for level in letters]
