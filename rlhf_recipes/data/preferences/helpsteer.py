"""Reader of rows as in HelpSteer2: one response a row, rated on five aspects, and the rows of a prompt together."""

from __future__ import annotations

import json
from typing import Any, Literal

from datasets import Dataset

from rlhf_recipes.data.bad_rows import BadRows
from rlhf_recipes.data.conversations import as_chat
from rlhf_recipes.data.dialogues import BadRow, Row, check_kind, filled
from rlhf_recipes.data.preferences.reading import Rows, check_columns, column_names, iterate, read
from rlhf_recipes.data.preferences.schema import PROVENANCE, place_of
from rlhf_recipes.statistics.numbers import is_number

Aspect = Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


def from_helpsteer2(
    rows: Rows, *, rating: Aspect = "helpfulness", drop_bad_rows: bool = False, source: str | None = None
) -> Dataset:
    """Read ratings in the form of HelpSteer2 (https://huggingface.co/papers/2406.08673).

    The rows of a prompt make one row of the table, wherever they are.

    Args:
        rows: Rows with `prompt`, `response` and a number for `rating`; the other aspects may be there.
        rating: The aspect that rates a response.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `ratings`, in the order in which the prompts come. Other columns have a list with one
        value per response.

    Raises:
        ValueError: If columns are missing, rows cannot be used (a rating that is no number), or none is left.

    Example:
        >>> rows = [{"prompt": "Hi", "response": "No.", "helpfulness": 1}]
        >>> rows += [{"prompt": "Hi", "response": "Hello!", "helpfulness": 4}]
        >>> table = from_helpsteer2(rows)
        >>> table[0]["completions"], table[0]["ratings"]
        (['No.', 'Hello!'], [1.0, 4.0])
    """
    names = column_names(rows)
    needs = ("prompt", "response", rating)
    check_columns(names, needs, ())
    others = [name for name in names if name not in {*needs, *PROVENANCE}]
    groups: dict[str, Row] = {}
    bad_rows, kept = BadRows(), 0
    for index, row in enumerate(iterate(rows)):
        origin = {"source": row.get("source"), "row": row.get("row"), "line": row.get("line")}
        origin["row"] = index if origin["row"] is None else origin["row"]
        try:
            prompt = _checked(row, rating)
        except BadRow as problem:
            bad_rows.add(str(problem), place_of(origin))
            continue
        kept += 1
        lists: Row = {name: [] for name in ("completions", "ratings", *others)}
        group = groups.setdefault(json.dumps(prompt, sort_keys=True), {"prompt": prompt, **origin, **lists})
        group["completions"].append(row["response"])
        group["ratings"].append(row[rating])
        for name in others:
            group[name].append(row.get(name))
    bad_rows.settle(len(rows), kept, drop_bad_rows)
    columns = ("prompt", "completions", "ratings")

    def convert(group: Row) -> Row:
        return {name: group[name] for name in columns}

    return read(list(groups.values()), convert, needs=columns, drop_bad_rows=drop_bad_rows, source=source)


def _checked(row: Row, rating: str) -> Any:
    """Check one row by itself, and return its prompt."""
    prompt = as_chat(row.get("prompt"), "prompt")
    for name, value in (("prompt", prompt), ("response", row.get("response"))):
        check_kind(value, name)
        filled(value, name)
    if not is_number(row.get(rating)):
        raise BadRow(f"`{rating}` is not a finite number")
    return prompt
