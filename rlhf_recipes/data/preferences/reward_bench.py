"""Reader of rows as in RewardBench 2: one or more right answers to a prompt, and several wrong ones."""

from __future__ import annotations

from datasets import Dataset

from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.preferences.reading import Rows, check_columns, column_names, iterate, read


def from_reward_bench(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    """Read the best of K in the form of RewardBench 2 (https://huggingface.co/papers/2506.01937).

    Do not train on the benchmark that measures the result: this is for rows of your own in its form.

    Args:
        rows: Rows with `prompt`, `chosen` and `rejected`: lists of texts, right and wrong answers.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `best`. A row with several right answers (the subset of ties) gives a row for each:
        it is better than all wrong ones, and nothing is said about two right ones.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> table = from_reward_bench([{"prompt": "1 + 1?", "chosen": ["2", "two"], "rejected": ["3", "4"]}])
        >>> table["completions"][:], table["best"][:]
        ([['2', '3', '4'], ['two', '3', '4']], [0, 0])
    """
    needs = ("prompt", "chosen", "rejected")
    check_columns(column_names(rows), needs, ())
    spread = []
    for index, row in enumerate(iterate(rows)):
        answers = row.get("chosen")
        number = index if row.get("row") is None else row["row"]
        spread += [
            {**row, "row": number, "chosen": answer}
            for answer in (answers if isinstance(answers, list) and answers else [None])
        ]

    def convert(row: Row) -> Row:
        wrong = row["rejected"]
        if not isinstance(wrong, list) or not all(isinstance(text, str) for text in (row["chosen"], *wrong)):
            raise BadRow("`chosen` and `rejected` are not lists of texts with at least one each")
        return {"prompt": row["prompt"], "completions": [row["chosen"], *wrong], "best": 0}

    return read(spread, convert, needs=needs, drop_bad_rows=drop_bad_rows, source=source)
