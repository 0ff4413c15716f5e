"""Items and judgements as tasks of Label Studio, and back without loss.

What Label Studio has no place for (the order shown, times, what was taken back) stands in the `meta` of a result,
which it keeps. The labelling interface of such a project is in docs/feedback.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rlhf_recipes.data.dialogues import Row
from rlhf_recipes.data.loading import load_records
from rlhf_recipes.data.preferences.schema import PROVENANCE
from rlhf_recipes.tools.labeling.items import check_items
from rlhf_recipes.tools.labeling.records import STRENGTHS, Answer, Item, Judgement

_SIDES = ("answer1", "answer2")
_LIST = "answers"
_META = "rlhf_recipes"
_PROVENANCE = ("shown", "shown_at", "judged_at", "milliseconds", "undone_at")
_RANKS_OF = {"left": [1, 2], "right": [2, 1], None: [1, 1]}


def to_tasks(items: Mapping[int, Item], judgements: Sequence[Judgement]) -> list[Row]:
    """Make tasks with annotations, as in Label Studio's export "JSON".

    Args:
        items: The items by number.
        judgements: All judgements.

    Returns:
        A task for each item, with an annotation for each of its judgements. Those that `from_label_studio` must not
        read (skipped, not to be compared, taken back) are cancelled.

    Raises:
        ValueError: If a row has a column that a task needs itself.

    Example:
        >>> item = Item({"prompt": "Hi", "completions": ["Hello!", "No."]})
        >>> said = Judgement(1, 0, "Ann", Answer("ranked", [2, 1], "much"), [1, 0], None, None, 900, None)
        >>> [task] = to_tasks({0: item}, [said])
        >>> task["annotations"][0]["result"][0]["value"]
        {'selected': 'right'}
    """
    by_item: dict[int, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_item[judgement.item].append(judgement)
    numbers = {name: number for number, name in enumerate(sorted({judgement.labeller for judgement in judgements}), 1)}
    return [
        {
            "id": number + 1,
            "data": _data(item),
            "annotations": [_annotation(judgement, numbers[judgement.labeller]) for judgement in by_item[number]],
        }
        for number, item in sorted(items.items())
    ]


def read_items_and_judgements(name: str) -> tuple[list[Item], list[Judgement]]:
    """Read what is to be labelled, with the judgements of it where it is an export of Label Studio.

    Args:
        name: As in `read_items`, or a file with tasks of Label Studio: `answer1` and `answer2`, or `answers`, in
            `data`.

    Returns:
        The items, and judgements that name them by their place.

    Raises:
        FileNotFoundError: As in `read_items`.
        ValueError: As in `read_items`, or if an annotation cannot be read.
    """
    records = load_records(name)
    if not all(isinstance(record.get("data"), dict) for record in records):
        return check_items(records), []
    return from_tasks(records)


def from_tasks(tasks: Sequence[Row]) -> tuple[list[Item], list[Judgement]]:
    """Read tasks of Label Studio; see `read_items_and_judgements`.

    Args:
        tasks: The tasks.

    Returns:
        An item for each task, and the judgements in the order in which they came.

    Raises:
        ValueError: If answers are missing, or an annotation cannot be read; with the task's number.

    Example:
        >>> data = {"prompt": "Hi", "answer1": "Hello!", "answer2": "No."}
        >>> vote = {"type": "pairwise", "value": {"selected": "left"}}
        >>> annotations = [{"completed_by": 3, "result": [vote]}]
        >>> [item], [said] = from_tasks([{"id": 7, "data": data, "annotations": annotations}])
        >>> said.labeller, said.answer.ranks
        ('labeller 3', [1, 2])
    """
    items = check_items([_row(number, task) for number, task in enumerate(tasks)])
    if len(items) < len(tasks):
        raise ValueError("Some tasks compare nothing, so that judgements would lose their items. Leave them out.")
    found = [
        (_number(annotation), _judgement(number, task, annotation))
        for number, task in enumerate(tasks)
        for annotation in task.get("annotations") or ()
    ]
    if all(isinstance(given, int) for given, _ in found):  # Label Studio counts annotations as they come
        found.sort(key=lambda pair: pair[0])
    return items, [judgement._replace(number=place) for place, (_, judgement) in enumerate(found, 1)]


def _data(item: Item) -> Row:
    others = {name: value for name, value in item.row.items() if name != "completions"}
    if taken := [name for name in (*_SIDES, _LIST) if name in others]:
        raise ValueError(f"The column `{taken[0]}` of the data is that of an answer in a task. Rename it.")
    completions = item.row["completions"]
    answers: Row = dict(zip(_SIDES, completions, strict=True)) if len(completions) == 2 else {}
    if not answers:
        answers = {_LIST: [{"id": str(place), "body": text} for place, text in enumerate(completions)]}
    asides = {"models": item.models, "gold": item.gold}
    return others | answers | {name: value for name, value in asides.items() if value is not None}


def _row(number: int, task: Row) -> Row:
    data = dict(task["data"])
    listed, sides = data.pop(_LIST, None), [data.pop(side, None) for side in _SIDES]
    if isinstance(listed, list) and all(isinstance(answer, dict) and "body" in answer for answer in listed):
        data["completions"] = [answer["body"] for answer in listed]
    elif None not in sides:
        data["completions"] = sides
    else:
        raise ValueError(f"`data` of task {number} has neither `answer1` and `answer2` nor `answers` with a `body`.")
    return {name: task[name] for name in PROVENANCE if name in task} | data


def _annotation(judgement: Judgement, labeller: int) -> Row:
    answer, number = judgement.answer, judgement.number
    results = [*_compared(answer), *_remarks(answer)]
    results[0]["meta"] = {_META: {"ranks": answer.ranks} | {name: getattr(judgement, name) for name in _PROVENANCE}}
    for place, result in enumerate(results):
        result["id"] = f"{number}-{place}"
    return {
        "id": number,
        "completed_by": {"id": labeller, "first_name": judgement.labeller},
        "was_cancelled": answer.ranks is None or judgement.undone_at is not None,
        "result": results,
        "created_at": judgement.judged_at,
        "lead_time": None if judgement.milliseconds is None else judgement.milliseconds / 1000,
    }


def _compared(answer: Answer) -> list[Row]:
    if answer.ranks is None:
        return [_choice("verdict", answer.verdict)]
    if len(answer.ranks) == 2:
        selected = {"selected": next((side for side, ranks in _RANKS_OF.items() if ranks == answer.ranks), None)}
        return [{"type": "pairwise", "from_name": "pairwise", "to_name": "answer1,answer2", "value": selected}]
    best_first = sorted(range(len(answer.ranks)), key=answer.ranks.__getitem__)
    value = {"ranker": {"rank": [str(place) for place in best_first]}}
    return [{"type": "ranker", "from_name": "ranker", "to_name": _LIST, "value": value}]


def _remarks(answer: Answer) -> list[Row]:
    strength = [] if answer.strength is None else [_choice("strength", answer.strength)]
    note = {"type": "textarea", "from_name": "note", "to_name": "prompt", "value": {"text": [answer.note]}}
    return strength + ([note] if answer.note else [])


def _choice(name: str, word: str) -> Row:
    return {"type": "choices", "from_name": name, "to_name": "prompt", "value": {"choices": [word]}}


def _judgement(number: int, task: Row, annotation: Any) -> Judgement:
    if not isinstance(annotation, dict) or not isinstance(annotation.get("result", []), list):
        raise ValueError(f"An annotation of task {number} is no object with a list `result`.")
    results = [result for result in annotation.get("result", []) if isinstance(result, dict)]
    meta: Row = next((result["meta"][_META] for result in results if _META in (result.get("meta") or {})), {})
    lead = annotation.get("lead_time")
    known = {"judged_at": annotation.get("created_at"), "milliseconds": None if lead is None else round(lead * 1000)}
    known |= {name: meta[name] for name in _PROVENANCE if name in meta}
    return Judgement(
        number=0,
        item=number,
        labeller=_labeller(annotation.get("completed_by")),
        answer=_answer(number, task, results, bool(annotation.get("was_cancelled")), meta),
        **{name: known.get(name) for name in _PROVENANCE},
    )


def _answer(number: int, task: Row, results: Sequence[Row], cancelled: bool, meta: Row) -> Answer:
    note = _first(results, "note", "text") or ""
    verdict = _first(results, "verdict", "choices")
    if verdict in ("incomparable", "skipped") or (cancelled and not meta):
        return Answer(verdict or "skipped", note=note)
    rankers = [result["value"] for result in results if result.get("type") == "ranker"]
    if rankers:
        return Answer("ranked", _ranks(number, task, rankers[0], meta.get("ranks")), note=note)
    selected = [result["value"].get("selected") for result in results if result.get("type") == "pairwise"]
    if len(selected) > 1 or (selected and selected[0] not in _RANKS_OF):
        raise ValueError(f"An annotation of task {number} selects neither `left` nor `right`, or more than once.")
    strength = _first(results, "strength", "choices")
    strength = strength if strength in STRENGTHS else None
    return Answer("ranked", list(_RANKS_OF[selected[0] if selected else None]), strength, note)


def _ranks(number: int, task: Row, value: Row, written: list[int] | None) -> list[int]:
    """Read an order of answers; where it is still the one that was written, ties are those that were written."""
    names = [str(answer.get("id", place)) for place, answer in enumerate(task["data"].get(_LIST) or ())]
    order = [str(name) for name in next(iter(value["ranker"].values()), ())]
    if not names or sorted(order) != sorted(names):
        raise ValueError(f"An annotation of task {number} does not rank all of its `{_LIST}`, each once.")
    places = [names.index(name) for name in order]
    if written is not None and all(written[one] <= written[other] for one, other in pairwise(places)):
        return written
    return [places.index(place) + 1 for place in range(len(names))]


def _first(results: Sequence[Row], name: str, key: str) -> str | None:
    """Return the first text that the control of this name holds."""
    values = [result["value"].get(key) for result in results if result.get("from_name") == name]
    return str(values[0][0]) if values and isinstance(values[0], list) and values[0] else None


def _number(annotation: Any) -> Any:
    return annotation.get("id") if isinstance(annotation, dict) else None


def _labeller(completed_by: Any) -> str:
    if isinstance(completed_by, dict):  # with the annotator's details: no e-mail addresses
        return str(completed_by.get("first_name") or f"labeller {completed_by.get('id')}")
    return f"labeller {completed_by}"
