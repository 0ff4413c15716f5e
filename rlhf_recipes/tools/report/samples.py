"""Samples in a report: side by side with the reference, and what training rewarded most and least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.data.dialogues import as_text
from rlhf_recipes.tools.pages.html import clean
from rlhf_recipes.tools.report.reading import Record, Stage, finite
from rlhf_recipes.tools.report.sections import shown

_LONGEST = 1200
_SIDE_BY_SIDE, _OPEN, _EXTREMES = 20, 6, 4


def side_by_side(stage: Stage) -> str:
    """Completions of policy and reference for the same prompts, with their scores where those were kept."""
    rows, source = _rows(stage)
    if not rows:
        return '<p class="note">No samples of policy and reference were kept.</p>'
    cards = [_card(row) for row in rows[:_SIDE_BY_SIDE]]
    more = "".join(cards[_OPEN:])
    return (
        f'<p class="note">{clean(source)}</p>'
        + "".join(cards[:_OPEN])
        + (f"<details><summary>{len(cards) - _OPEN} more</summary>{more}</details>" if more else "")
    )


def extremes(stage: Stage) -> str:
    """The completions of the last rollouts that were rewarded most and least."""
    rows = [row for row in stage.completions if isinstance(row, dict) and finite(row.get("reward"))]
    rows.sort(key=lambda row: -row["reward"])
    if not rows:
        return ""
    parts = []
    for title, chosen in (("Highest reward", rows[:_EXTREMES]), ("Lowest reward", rows[_EXTREMES:][-_EXTREMES:])):
        if chosen:
            parts.append(f"<details><summary>{title}</summary>{''.join(map(_completion, chosen))}</details>")
    step = shown(rows[0].get("step"))
    return f"<h3>{clean(stage.name)}: rollouts of step {step}, {len(rows)} of them</h3>" + "".join(parts)


def _rows(stage: Stage) -> tuple[list[Record], str]:
    """The newest samples: those of the evaluation during training have scores, those at its end may have none."""
    final = _mappings(stage.record("evaluation").get("samples"))
    if any(f"policy_{score}" in row for row in final for score in ("reward", "gold")):
        return final, "From the evaluation at the end."
    for record in reversed(stage.evaluations):
        rows = _mappings(record.get("samples"))
        if rows:
            return rows, f"From the evaluation at step {record['step']}."
    return final, "From the evaluation at the end, which kept no scores of single samples."


def _mappings(value: Any) -> list[Record]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _card(row: Mapping[str, Any]) -> str:
    sides = []
    for side in ("policy", "reference"):
        if side in row:
            scores = _scores({name: row.get(f"{side}_{name}") for name in ("reward", "gold")})
            sides.append(f"<div>{side}{scores}<pre>{_text(row[side])}</pre></div>")
    return f'<div class="sample">{_prompt(row)}<div class="sides">{"".join(sides)}</div></div>'


def _completion(row: Mapping[str, Any]) -> str:
    scores = {name: value for name, value in row.items() if name != "step" and finite(value)}
    text = _text(row.get("completion"))
    return f'<div class="sample">{_prompt(row)}<div>completion{_scores(scores)}<pre>{text}</pre></div></div>'


def _prompt(row: Mapping[str, Any]) -> str:
    return f"<div>prompt<pre>{_text(row.get('prompt'), from_end=True)}</pre></div>"


def _scores(scores: Mapping[str, Any]) -> str:
    known = [f"{name} {shown(value)}" for name, value in scores.items() if finite(value)]
    return f' <span class="note">{clean(", ".join(known))}</span>' if known else ""


def _text(value: Any, from_end: bool = False) -> str:
    text = as_text(value)
    if len(text) > _LONGEST:
        text = "… " + text[-_LONGEST:] if from_end else text[:_LONGEST] + " …"
    return clean(text)


def all_samples(stages: Sequence[Stage]) -> str:
    """Samples of all runs."""
    parts = [f"<h3>{clean(stage.name)}</h3>{side_by_side(stage)}" for stage in stages]
    return "".join([*parts, *map(extremes, stages)])
