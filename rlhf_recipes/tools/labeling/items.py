"""What is labelled: rows of two or more answers to a prompt, checked before anybody sees them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rlhf_recipes.data.bad_rows import BadRows
from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.loading import load_records
from rlhf_recipes.data.preferences import LABEL_WORDS, are_preferences, check_preferences, from_labelled_pairs
from rlhf_recipes.data.preferences.checks import check_row
from rlhf_recipes.data.preferences.pairs import SIDES, find_sides, label_of
from rlhf_recipes.data.preferences.reading import column_names
from rlhf_recipes.data.preferences.schema import JUDGEMENTS, PROVENANCE, TABLE_COLUMNS, place_of, quoted
from rlhf_recipes.tools.labeling.records import Item, dense

MOST_ANSWERS = 9  # each has a key of its own
WRITTEN = (
    *("group", "annotator", "grade", "note", "shown", "shown_at", "judged_at", "milliseconds", "undone_at"),
    *("judgement", "verdict", "left_out", "gold"),
)
"""Columns that an export writes beside those of a preference table."""

_ASIDE = ("gold", "model_a", "model_b", "models")  # what labellers do not see
_NUMBER = "number_of_the_item"
_ADVICE = ", or leave them out with `drop_bad_rows: true`"


def read_items(name: str) -> list[Item]:
    r"""Read the rows to label.

    Args:
        name: File, folder or dataset id with `prompt` and two answers in one of the pairs of columns that
            `from_labelled_pairs` knows, or `completions`, a list of 2 to 9. `model_a` and `model_b`, or the list
            `models`, name who wrote the answers. `gold` is the known answer of a row that checks the labellers: a
            word or a number as in a `label`, or ranks for more than two.

    Returns:
        An item for each row. Prompts and answers are text or chats, as in a preference table.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        ValueError: If columns are missing or judge the answers already, or rows cannot be used; with the first of
            them.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
        >>> _ = path.write_text('{"prompt": "Hi", "response_a": "No.", "response_b": "Hello!", "gold": "second"}\n')
        >>> read_items(str(path))[0].gold
        [2, 1]
    """
    return check_items(load_records(name))


def check_items(records: Sequence[Row]) -> list[Item]:
    """Check rows that are to be labelled; see `read_items`.

    Args:
        records: The rows.

    Returns:
        An item for each row.

    Raises:
        ValueError: As in `read_items`.

    Example:
        >>> check_items([{"prompt": "Hi", "completions": ["Hello!", "No."], "models": ["new", "old"]}])[0].models
        ['new', 'old']
    """
    names = column_names(records)
    _check_columns(names)
    kept: list[Row] = []
    asides, bad = [], BadRows()
    for number, record in enumerate(records):
        row = {name: value for name, value in record.items() if name not in _ASIDE}
        try:
            count = _count(row)
            asides.append((_models(record, count), _gold(record.get("gold"), count)))
        except BadRow as problem:
            bad.add(str(problem), place_of({"row": number} | row))
        else:
            # What nobody has judged yet is a tie, so that the readers of judged rows check it.
            unjudged = {"label": 0.5} if count == 2 else {"ranks": [1] * count}
            kept.append(row | unjudged | {_NUMBER: len(kept)})
    try:
        bad.settle(len(records), len(kept), drop_bad_rows=False)
        table = (check_preferences if "completions" in names else from_labelled_pairs)(kept)
    except ValueError as error:  # whoever labels is to see all rows: there is no option that leaves some out
        raise ValueError(str(error).replace(_ADVICE, "")) from error
    others = [name for name in table.column_names if name not in TABLE_COLUMNS and name != _NUMBER]
    items = []
    for read in table.with_format(None).to_list():
        own = kept[read[_NUMBER]]  # as it was: a table fills up objects of different keys
        row = {name: read[name] for name in ("prompt", "completions", "completion_ids", *PROVENANCE)}
        row |= {name: own[name] for name in others if name in own}
        items.append(Item({key: value for key, value in row.items() if value is not None}, *asides[read[_NUMBER]]))
    return items


def _check_columns(names: Sequence[str]) -> None:
    if judged := [name for name in JUDGEMENTS if name in names]:
        raise ValueError(
            f"{quoted(judged)} judges the answers already. Remove it, or rename it to `gold` to check the labellers "
            "by it."
        )
    if taken := [name for name in (*WRITTEN, "margin") if name in names and name != "gold"]:
        raise ValueError(f"{quoted(taken)} would stand beside a column that the export writes. Rename it.")
    if "completions" not in names:
        find_sides(names)
    elif "prompt" not in names:
        raise ValueError(
            f"Expected the columns `prompt` and `completions`; found {quoted(names)}. Rename the columns."
        )
    others = set(names) - {*WRITTEN, "gold"} - {name for sides in SIDES for name in sides}
    if not are_preferences({*others, "prompt", "completions", "label"}):
        raise ValueError(
            f"With the columns {quoted(names)} the labelled rows would be preferences of two kinds. Rename or remove "
            "those that do not belong to the prompt and the answers."
        )


def _count(row: Row) -> int:
    """Return the number of answers, and refuse what no reader would tell the row of."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("a text holds half of a surrogate pair, which is no character") from None
    if "completions" not in row:
        return 2
    completions = row["completions"]
    if not isinstance(completions, list) or not 2 <= len(completions) <= MOST_ANSWERS:
        raise BadRow(f"`completions` is not a list of 2 to {MOST_ANSWERS} answers")
    if any(first == second for first, second in combinations(completions, 2)):
        raise BadRow("two of the `completions` are the same")
    return len(completions)


def _models(row: Row, count: int) -> list[str] | None:
    models = row.get("models")
    if models is None:
        models = [row.get("model_a"), row.get("model_b")]
    if all(model is None for model in models):
        return None
    if not isinstance(models, list) or len(models) != count:
        raise BadRow("`models`, or `model_a` and `model_b`, do not name one model for each answer")
    if not all(isinstance(model, str) and model.strip() for model in models):
        raise BadRow("`models`, or `model_a` and `model_b`, have a name that is no text, or an empty one")
    return models


def _gold(value: Any, count: int) -> list[int] | None:
    if value is None:
        return None
    if count > 2 or isinstance(value, list):
        try:
            check_row({"prompt": "?", "completions": [str(place) for place in range(count)], "ranks": value})
        except BadRow as problem:
            raise BadRow(str(problem).replace("`ranks`", "`gold`")) from None
        return dense(value)
    try:
        label = label_of(value, LABEL_WORDS)
    except BadRow as problem:
        raise BadRow(str(problem).replace("`label`", "`gold`")) from None
    if label not in (0.0, 0.5, 1.0):
        raise BadRow("`gold` is no known answer: 1 (the first is better), 0 (the second is) or 0.5 (a tie)")
    return dense([2 - 2 * label, 2 * label])
