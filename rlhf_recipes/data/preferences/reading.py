"""Reading that all readers of preferences share: take rows of a kind, convert and check each, count the bad ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeAlias

from datasets import Dataset

from rlhf_recipes.data.bad_rows import BadRows
from rlhf_recipes.data.conversations import as_chat
from rlhf_recipes.data.dialogues import BadRow, Row, as_answer, read_tools
from rlhf_recipes.data.preferences.checks import check_row
from rlhf_recipes.data.preferences.schema import PROVENANCE, TABLE_COLUMNS, make_table, place_of, quoted

Rows: TypeAlias = Dataset | Sequence[Row]


def read(
    rows: Rows,
    convert: Callable[[Row], Row],
    *,
    needs: Collection[str],
    may_have: Collection[str] = (),
    drop_bad_rows: bool,
    source: str | None,
    harmless: Collection[str] = (),
) -> Dataset:
    """Make a preference table of rows.

    Args:
        rows: A dataset, or a list of rows whose values may be of different types.
        convert: Makes the table's columns of a row, or raises `BadRow`.
        needs: Columns that `convert` reads.
        may_have: Columns that `convert` reads where they are there.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.
        harmless: Reasons for which a row is left out in any case.

    Returns:
        The table, with the columns that `convert` does not read beside it.

    Raises:
        ValueError: If columns are missing, a column that is not read has the name of one of the table's, rows cannot
            be used, or none is left.

    Example:
        >>> rows = [{"q": "Hi", "a": "Hello!", "b": "No.", "by": "Ann"}]
        >>> def convert(row):
        ...     return {"prompt": row["q"], "completions": [row["a"], row["b"]], "label": 1.0}
        >>> table = read(rows, convert, needs=["q", "a", "b"], drop_bad_rows=False, source="survey")
        >>> table["source"][:], table["by"][:]
        (['survey'], ['Ann'])
    """
    names = column_names(rows)
    check_columns(names, needs, may_have)
    others = [name for name in names if name not in {*needs, *may_have, *PROVENANCE}]
    table_rows, bad_rows = [], BadRows()
    for index, row in enumerate(iterate(rows)):
        row = {name: row.get(name) for name in names}
        origin = {
            "source": source if row.get("source") is None else str(row["source"]),
            "row": index if row.get("row") is None else row["row"],
            "line": row.get("line"),
        }
        try:
            if not all(isinstance(origin[name], int | None) for name in ("row", "line")):
                raise BadRow("`row` or `line` is not the number of a row or a line")
            converted = _with_chats(convert(row)) | origin
            check_row(converted)
            if "tools" in others and isinstance(converted["prompt"], list):
                row["tools"] = read_tools(row["tools"])
        except BadRow as problem:
            bad_rows.add(str(problem), place_of(origin))
        else:
            table_rows.append(converted | {name: row[name] for name in others})
    bad_rows.settle(len(rows), len(table_rows), drop_bad_rows, harmless)
    types: dict[str, Any] = dict(rows.features) if isinstance(rows, Dataset) else {}
    return make_table(table_rows, {name: types.get(name) for name in others})


def _with_chats(row: Row) -> Row:
    """Bring the chats of a row of the table to `role` and `content`, also text that answers a chat."""
    prompt, completions = as_chat(row["prompt"], "prompt"), row["completions"]
    if isinstance(completions, list):
        completions = [as_answer(as_chat(completion, "completions"), prompt) for completion in completions]
    return {**row, "prompt": prompt, "completions": completions}


def check_columns(names: Sequence[str], needs: Collection[str], may_have: Collection[str]) -> None:
    """Check the columns of rows before they are read.

    Args:
        names: The columns that there are.
        needs: Columns that must be there.
        may_have: Columns that may be there.

    Raises:
        ValueError: If one is missing, or one that is not read has the name of one of the table's.

    Example:
        >>> check_columns(["prompt", "chosen", "ranks"], ["chosen"], ["prompt"])
        Traceback (most recent call last):
        ...
        ValueError: `ranks` would not be read from rows of this kind, and means something else in a preference ...
    """
    missing = [name for name in needs if name not in names]
    if missing:
        raise ValueError(f"Expected the columns {quoted(list(needs))}; found {quoted(names)}. Rename the columns.")
    unread = [name for name in names if name in TABLE_COLUMNS and name not in {*needs, *may_have, *PROVENANCE}]
    if unread:
        raise ValueError(
            f"{quoted(unread)} would not be read from rows of this kind, and means something else in a preference "
            "table. Rename or remove it, or use the reader that reads it."
        )


def column_names(rows: Rows) -> list[str]:
    """Return the columns of rows: those of any row.

    Args:
        rows: A dataset or a list of rows.

    Returns:
        The names, in the order in which they come.

    Example:
        >>> column_names([{"prompt": "a"}, {"prompt": "b", "label": 1}])
        ['prompt', 'label']
    """
    if isinstance(rows, Dataset):
        return list(rows.column_names)
    return list(dict.fromkeys(name for row in rows for name in row))


def iterate(rows: Rows) -> Iterable[Row]:
    """Go through rows as plain Python values.

    Args:
        rows: A dataset or a list of rows.

    Returns:
        The rows.

    Example:
        >>> list(iterate(Dataset.from_dict({"label": [1]}).with_format("numpy")))
        [{'label': 1}]
    """
    plain: Iterable[Row] = rows.with_format(None) if isinstance(rows, Dataset) else rows
    return plain
