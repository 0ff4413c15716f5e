"""Reader of labels of steps, as process reward models are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.preferences.reading import Rows, read


def from_steps(
    rows: Rows,
    *,
    separator: str = "\n",
    grades: Mapping[Any, float] | None = None,
    drop_bad_rows: bool = False,
    source: str | None = None,
) -> Dataset:
    r"""Read labels of the steps of one completion, in the columns that TRL's former `PRMTrainer` took.

    For PRM800K (https://huggingface.co/papers/2305.20050) and Math-Shepherd (https://huggingface.co/papers/2312.08935)
    in that form.

    Args:
        rows: Rows with `prompt`, `completions` (the texts of the steps, in their order) and `labels` (one per step:
            true or false, a probability between 0 and 1, or null where nobody judged the step).
        separator: What stands between two steps.
        grades: Probability by label, for labels of another kind: `{-1: 0.0, 0: 0.5, 1: 1.0}`, or
            `{"+": 1.0, "-": 0.0}`.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table of one completion a row, with `steps` (the separator belongs to the step before it) and
        `step_labels`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> row = {"prompt": "2 * 3 + 4?", "completions": ["2 * 3 = 6", "6 + 4 = 11"], "labels": [True, False]}
        >>> table = from_steps([row])
        >>> table[0]["steps"], table[0]["step_labels"]
        ([['2 * 3 = 6\n', '6 + 4 = 11']], [[1.0, 0.0]])
    """

    def convert(row: Row) -> Row:
        texts, labels = row["completions"], row["labels"]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise BadRow("`completions` is not a list of the texts of at least one step")
        if not isinstance(labels, list):
            raise BadRow("`labels` is not a list of one label per step")
        steps = [text + separator for text in texts[:-1]] + texts[-1:]
        completion = "".join(steps)
        chat = isinstance(row["prompt"], list)
        return {
            "prompt": row["prompt"],
            "completions": [[{"role": "assistant", "content": completion}] if chat else completion],
            "steps": [steps],
            "step_labels": [[_label(label, grades) for label in labels]],
        }

    return read(rows, convert, needs=["prompt", "completions", "labels"], drop_bad_rows=drop_bad_rows, source=source)


def _label(label: Any, grades: Mapping[Any, float] | None) -> float | None:
    if label is None:
        return None
    if grades is not None and not (isinstance(label, str | int | float) and label in grades):
        raise BadRow(f"`labels` has a label that is none of {', '.join(map(str, grades))}")
    value = label if grades is None else grades[label]
    if not isinstance(value, int | float):
        raise BadRow("`labels` has a label that is not a number: say what it means with `grades`")
    return float(value)
