"""Judgements as files: rows for the reward stage, votes for rankings, tasks of Label Studio."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rlhf_recipes.checkpoints import write_whole
from rlhf_recipes.data.dialogues import Row
from rlhf_recipes.data.preferences import LLAMA2_SMALL_MARGINS
from rlhf_recipes.tools.labeling.label_studio import to_tasks
from rlhf_recipes.tools.labeling.records import STRENGTHS, Item, Judgement
from rlhf_recipes.tools.labeling.results import votes_of
from rlhf_recipes.tools.labeling.store import Store

MARGINS: Mapping[str, float] = {
    strength: LLAMA2_SMALL_MARGINS[grade]
    for strength, grade in zip(STRENGTHS, ("slightly better", "better", "significantly better"), strict=True)
}
"""Margins by strength: those of Llama 2's grades of the same rank (https://huggingface.co/papers/2307.09288)."""


def write_export(store: Store, path: Path, kind: Literal["preferences", "votes", "label_studio"]) -> str:
    """Write what was judged to a file, and what does not go into training to a second one beside it.

    Args:
        store: The database.
        path: The file.
        kind: "preferences" for `preference_rows`, "votes" for `vote_rows`, "label_studio" for `to_tasks`.

    Returns:
        What was written, as text.

    Raises:
        FileExistsError: If a file is there already.
        ValueError: If there is nothing to write.
    """
    items, judgements = store.items(), store.judgements()
    if kind == "label_studio":
        tasks = to_tasks(items, judgements)
        _write([path], [json.dumps(tasks, ensure_ascii=False, indent=1)])
        return f"{path}: {len(tasks)} tasks with {len(judgements)} annotations"
    if kind == "votes":
        rows = vote_rows(items, judgements)
        _write([path], [_lines(rows)])
        return f"{path}: {len(rows)} votes"
    kept, left_out = preference_rows(items, judgements)
    beside = path.with_suffix(f".left_out{path.suffix}")
    if not left_out:
        _write([path], [_lines(kept)])
        return f"{path}: {len(kept)} rows"
    _write([path, beside], [_lines(kept), _lines(left_out)])
    return f"{path}: {len(kept)} rows\n{beside}: {len(left_out)} judgements that are not for training"


def preference_rows(items: Mapping[int, Item], judgements: Sequence[Judgement]) -> tuple[list[Row], list[Row]]:
    """Make rows of a preference table, one for each judgement.

    Args:
        items: The items by number.
        judgements: All judgements.

    Returns:
        The rows to train on, with `label` (1, 0, or 0.5 for a tie) or `ranks`, and `margin` where all of them have a
        strength; and the others, with `left_out`: what was taken back, skipped or could not be compared, and what
        checks the labellers. Both say where they come from: `group` (the item's number), `annotator`, `grade` (the
        strength in a word), `note`, `shown`, `shown_at`, `judged_at`, `milliseconds`, `judgement` and `models`.

    Raises:
        ValueError: If there is no row to train on.

    Example:
        >>> from rlhf_recipes.tools.labeling.records import Answer
        >>> item = Item({"prompt": "Hi", "completions": ["Hello!", "No."], "row": 0})
        >>> answers = Answer("ranked", [1, 2], "much"), Answer("skipped")
        >>> says = [Judgement(n, 0, "Ann", answer, [1, 0], None, None, 900, None) for n, answer in enumerate(answers)]
        >>> kept, left_out = preference_rows({0: item}, says)
        >>> kept[0]["label"], kept[0]["margin"], left_out[0]["left_out"]
        (1.0, 1.0, 'skipped')
    """
    kept: list[Row] = []
    left_out: list[Row] = []
    for judgement in judgements:
        item = items[judgement.item]
        row = item.row | _judged(judgement) | _provenance(item, judgement)
        if reason := _left_out(item, judgement):
            more = {"verdict": judgement.answer.verdict, "undone_at": judgement.undone_at, "gold": item.gold}
            left_out.append(row | more | {"left_out": reason})
        else:
            kept.append(row)
    if not kept:
        raise ValueError(f"Nothing to train on yet: none of {len(judgements)} judgements compares answers, and holds.")
    margins = [_margin(row) for row in kept]
    # A loss with margins takes them of all rows or of none: a missing one would count as 0.
    if None not in margins:
        kept = [row | {"margin": margin} for row, margin in zip(kept, margins, strict=True)]
    return kept, left_out


def vote_rows(items: Mapping[int, Item], judgements: Sequence[Judgement]) -> list[Row]:
    """Make votes between models, as `rlhf-recipes rank` reads them.

    Args:
        items: The items by number.
        judgements: All judgements.

    Returns:
        Rows with `winner`, `loser`, `tie`, `group` (the item's number), `annotator` and `judged_at`.

    Raises:
        ValueError: If no judgement compares answers of two models.
    """
    rows = [
        vote._asdict() | {"annotator": judgement.labeller, "judged_at": judgement.judged_at}
        for judgement in judgements
        if not _left_out(items[judgement.item], judgement)
        for vote in votes_of(items[judgement.item], judgement)
    ]
    if not rows:
        raise ValueError(
            "No judgement compares two models. Name who wrote the answers in `model_a` and `model_b` (or `models`) of "
            "the data."
        )
    return rows


def _left_out(item: Item, judgement: Judgement) -> str:
    if judgement.undone_at is not None:
        return "taken back"
    if judgement.answer.ranks is None:
        return judgement.answer.verdict
    return "known answer" if item.gold is not None else ""


def _judged(judgement: Judgement) -> Row:
    ranks = judgement.answer.ranks
    if ranks is None:
        return {}
    return {"label": (1 + ranks[1] - ranks[0]) / 2} if len(ranks) == 2 else {"ranks": ranks}


def _margin(row: Row) -> float | None:
    if row.get("label") == 0.5:
        return 0.0
    return MARGINS.get(row["grade"] or "")


def _provenance(item: Item, judgement: Judgement) -> Row:
    return {
        "group": judgement.item,
        "annotator": judgement.labeller,
        "grade": judgement.answer.strength,
        "note": judgement.answer.note,
        "shown": judgement.shown,
        "shown_at": judgement.shown_at,
        "judged_at": judgement.judged_at,
        "milliseconds": judgement.milliseconds,
        "judgement": judgement.number,
        "models": item.models,
    }


def _lines(rows: Iterable[Row]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in rows)


def _write(paths: Sequence[Path], texts: Sequence[str]) -> None:
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} is there already. Name another file, or remove it.")
    for path, text in zip(paths, texts, strict=True):
        write_whole(path, text)
