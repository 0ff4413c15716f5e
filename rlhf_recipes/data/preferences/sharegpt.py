"""Reader of pairs in ShareGPT's form: a conversation of turns with `from` and `value`, and two answers to it."""

from __future__ import annotations

from datasets import Dataset

from rlhf_recipes.data.dialogues import Row
from rlhf_recipes.data.preferences.pairs import SIDES, read_pairs, two_completions
from rlhf_recipes.data.preferences.reading import Rows


def from_sharegpt(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    """Read pairs that answer a conversation, as many tools for fine-tuning write them.

    Args:
        rows: Rows with `conversations` (turns with `from` and `value`, or `role` and `content`), `chosen` and
            `rejected` (a turn, a list of turns, or text). `system`, `prompt` (which only repeats a part of it) and
            `margin` may be there.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table of chats: `label` is 1.

    Raises:
        ValueError: If columns are missing, rows cannot be used (a turn from nobody known), or none is left.

    Example:
        >>> said = [{"from": "human", "value": "Hi"}]
        >>> sides = {"chosen": {"from": "gpt", "value": "Hello!"}, "rejected": {"from": "gpt", "value": "No."}}
        >>> from_sharegpt([{"conversations": said} | sides])[0]["prompt"]
        [{'role': 'user', 'content': 'Hi'}]
    """

    def convert(row: Row) -> Row:
        return two_completions(row, SIDES[0]) | {"label": 1.0, "margin": row.get("margin")}

    return read_pairs(
        rows,
        convert,
        SIDES[0],
        needs=["conversations"],
        may_have=["system", "margin"],
        drop_bad_rows=drop_bad_rows,
        source=source,
    )
