"""Reader of rows as in PKU-SafeRLHF: two responses, of which one is more helpful and one is safer."""

from __future__ import annotations

from typing import Literal

from datasets import Dataset

from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.preferences.pairs import read_pairs, two_completions
from rlhf_recipes.data.preferences.reading import Rows
from rlhf_recipes.statistics.numbers import is_number

_SIDES = ("response_0", "response_1")


def from_safe_rlhf(
    rows: Rows,
    *,
    preference: Literal["better", "safer"] = "better",
    drop_bad_rows: bool = False,
    source: str | None = None,
) -> Dataset:
    """Read pairs in the form of PKU-SafeRLHF (https://huggingface.co/papers/2406.15513).

    Args:
        rows: Rows with `prompt`, `response_0`, `response_1`, and `better_response_id` or `safer_response_id`: 0 or 1.
        preference: Which one wins: the "better" one, which is the more helpful one whether it is safe or not, or the
            "safer" one.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `label`; whether each response is safe stays beside it.

    Raises:
        ValueError: If columns are missing, rows cannot be used (an id that is neither 0 nor 1), or none is left.

    Example:
        >>> row = {"prompt": "Hi", "response_0": "No.", "response_1": "Hello!", "better_response_id": 1}
        >>> from_safe_rlhf([row])["label"][:]
        [0.0]
    """
    if preference not in ("better", "safer"):
        raise ValueError(f'`preference` must be "better" or "safer", got {preference!r}.')
    name = f"{preference}_response_id"

    def convert(row: Row) -> Row:
        winner = row[name]
        if not is_number(winner) or winner not in (0, 1):
            raise BadRow(f"`{name}` is neither 0 nor 1")
        return two_completions(row, _SIDES) | {"label": float(winner == 0)}

    return read_pairs(rows, convert, _SIDES, needs=[name], drop_bad_rows=drop_bad_rows, source=source)
