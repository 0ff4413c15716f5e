"""Reader of Label Studio's JSON exports of pairwise comparisons."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.preferences.reading import Rows, column_names, iterate, read
from rlhf_recipes.data.preferences.schema import PROVENANCE, TABLE_COLUMNS, quoted

_CANCELLED = "cancelled annotation"
_NONE = "task without annotations"
_SELECTED = {"left": 1.0, "right": 0.0, None: 0.5}


def from_label_studio(
    tasks: Rows,
    *,
    prompt: str = "prompt",
    left: str = "answer1",
    right: str = "answer2",
    merge_annotators: bool = False,
    drop_bad_rows: bool = False,
    source: str | None = None,
) -> Dataset:
    """Read a JSON export ("JSON", not "JSON-MIN") of a Label Studio project with the tag `Pairwise`.

    Who selects neither side says that there is a tie. Cancelled (skipped) annotations and tasks without annotations
    are left out and counted.

    Args:
        tasks: The tasks of the export, `{"id": ..., "data": {...}, "annotations": [...]}`.
        prompt: Key of the prompt in `data`.
        left: Key of the left completion in `data`.
        right: Key of the right completion in `data`.
        merge_annotators: Whether to make one row of all annotations of a task: `label` is their mean. Otherwise
            every annotation is a row.
        drop_bad_rows: Whether to leave out bad annotations, instead of refusing them all.
        source: Name of the source, for tasks without a `source` in `data`.

    Returns:
        A preference table: `label` is 1 for left, 0 for right, 0.5 for neither; `row` is the position of the task.
        Beside it `task` (the task's id), `annotator` (an id; several are joined by commas), `votes` (how many
        annotations) and the other texts in `data`.

    Raises:
        ValueError: If these are no such tasks, nothing was compared with `Pairwise`, annotations cannot be used, or
            none is left.

    Example:
        >>> data = {"prompt": "Hi", "answer1": "Hello!", "answer2": "No."}
        >>> vote = {"type": "pairwise", "value": {"selected": "left"}}
        >>> annotations = [{"completed_by": 1, "result": [vote]}, {"completed_by": 2, "result": []}]
        >>> tasks = [{"id": 7, "data": data, "annotations": annotations}]
        >>> from_label_studio(tasks)["label"][:], from_label_studio(tasks, merge_annotators=True)["label"][:]
        ([1.0, 0.5], [0.75])
    """
    names = column_names(tasks)
    if not {"data", "annotations"} <= set(names):
        raise ValueError(
            f"Expected the tasks of a Label Studio export, with `data` and `annotations`; found {quoted(names)}. "
            'Export as "JSON", which has both; "JSON-MIN" and "CSV" do not.'
        )
    keys = {"prompt": prompt, "left": left, "right": right}
    _check_tag([annotation for task in iterate(tasks) for annotation in _list(task, "annotations")])
    by_task = [_votes(index, task, keys) for index, task in enumerate(iterate(tasks))]
    if merge_annotators:
        by_task = [_merge(votes) for votes in by_task]

    def convert(vote: Row) -> Row:
        if vote["problem"] is not None:
            raise BadRow(vote["problem"])
        return {"prompt": vote["prompt"], "completions": [vote["left"], vote["right"]], "label": vote["label"]}

    return read(
        [vote for votes in by_task for vote in votes],
        convert,
        needs=["prompt", "left", "right", "label", "problem"],
        drop_bad_rows=drop_bad_rows,
        source=source,
        harmless={_CANCELLED, _NONE},
    )


def _votes(index: int, task: Row, keys: dict[str, str]) -> list[Row]:
    """Make a row of each annotation of a task; `problem` says why it cannot be used."""
    data = task["data"] if isinstance(task.get("data"), dict) else {}
    taken = {*keys, *keys.values(), *TABLE_COLUMNS, "problem", "task", "annotator", "votes", "annotations"} - {
        "source"
    }
    texts = {key: value for key, value in data.items() if isinstance(value, str) and key not in taken}
    origin = {name: task[name] for name in PROVENANCE if task.get(name) is not None}
    shared = {"row": index} | origin | texts | {name: data.get(key) for name, key in keys.items()}
    shared["task"] = None if task.get("id") is None else str(task["id"])
    missing = [key for key in keys.values() if data.get(key) is None]
    annotations = _list(task, "annotations")
    if missing or not annotations:
        problem = f"`data` has no `{missing[0]}`" if missing else _NONE
        return [shared | {"label": None, "annotator": None, "votes": 0, "problem": problem}]
    return [shared | {"votes": 1} | _judgement(annotation) for annotation in annotations]


def _judgement(annotation: Any) -> Row:
    if not isinstance(annotation, dict):
        return {"label": None, "annotator": None, "problem": "an annotation is not an object"}
    by = annotation.get("completed_by")
    by = by.get("id") if isinstance(by, dict) else by  # with the annotator's details: no e-mail addresses
    judgement = {"label": None, "annotator": None if by is None else str(by), "problem": None}
    if annotation.get("was_cancelled"):
        return judgement | {"problem": _CANCELLED}
    results = [result["value"] for result in _list(annotation, "result") if _is_pairwise(result)]
    if len(results) > 1:
        return judgement | {"problem": "an annotation compares the two completions more than once"}
    selected = results[0].get("selected") if results else None
    if not isinstance(selected, str | None) or selected not in _SELECTED:
        return judgement | {"problem": "an annotation selects neither `left` nor `right`, but something else"}
    return judgement | {"label": _SELECTED[selected]}


def _list(value: Row, key: str) -> list[Any]:
    return value[key] if isinstance(value.get(key), list) else []


def _is_pairwise(result: Any) -> bool:
    return isinstance(result, dict) and result.get("type") == "pairwise" and isinstance(result.get("value"), dict)


def _check_tag(annotations: list[Any]) -> None:
    """Refuse an export in which nobody ever chose a side with `Pairwise`: all of it would read as ties."""
    types = {
        str(result.get("type"))
        for annotation in annotations
        if isinstance(annotation, dict)
        for result in _list(annotation, "result")
        if isinstance(result, dict)
    }
    if types and "pairwise" not in types:
        raise ValueError(
            f"No annotation has a result of the type `pairwise`, only {quoted(sorted(types))}. Label the pairs with "
            "the tag `Pairwise`."
        )


def _merge(votes: list[Row]) -> list[Row]:
    """Make one row of the annotations of a task that can be used; the others stay rows, to be counted."""
    usable = [vote for vote in votes if vote["problem"] is None]
    if not usable:
        return votes
    merged = usable[0] | {
        "label": sum(vote["label"] for vote in usable) / len(usable),
        "annotator": ",".join(vote["annotator"] or "?" for vote in usable),
        "votes": len(usable),
    }
    return [merged, *(vote for vote in votes if vote["problem"] is not None)]
