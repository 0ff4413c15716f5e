"""Samples in a report: side by side with the reference, and what training rewarded most and least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.messages import as_text
from rlhf_recipes.tools.pages.colours import POLICY_LOOK, REFERENCE_LOOK
from rlhf_recipes.tools.pages.html import clean, folded, note
from rlhf_recipes.tools.report.drawing import Looks, named
from rlhf_recipes.tools.report.parts import shown
from rlhf_recipes.tools.report.reading import Record, Stage, finite

_LONGEST = 1200
_SIDE_BY_SIDE, _OPEN, _EXTREMES = 20, 4, 4


def all_samples(stages: Sequence[Stage], looks: Looks) -> str:
    """Write the samples of all policies: those of the same prompts beside each other.

    Args:
        stages: The stages that trained on rewards.
        looks: Of the runs.

    Returns:
        HTML.
    """
    groups: dict[tuple[str, ...], list[tuple[Stage, list[Record], str]]] = {}
    for stage in stages:
        rows, source = _rows(stage)
        groups.setdefault(tuple(_text(row.get("prompt")) for row in rows), []).append((stage, rows, source))
    parts = []
    for prompts, members in groups.items():
        if len(groups) > 1:
            parts.append(f"<h3>{', '.join(clean(stage.name) for stage, _, _ in members)}</h3>")
        parts.append(_group(members, looks) if prompts else note("No samples of policy and reference were kept."))
    return "".join([*parts, *map(extremes, stages)])


def _group(members: Sequence[tuple[Stage, list[Record], str]], looks: Looks) -> str:
    """Cards of the same prompts, each with the completions of the reference and of every policy."""
    sources = list(dict.fromkeys(source for _, _, source in members))
    lead = " ".join(sources) if len(sources) == 1 else " ".join(f"{s.name}: {source}" for s, _, source in members)
    cards = []
    for same in list(zip(*(rows for _, rows, _ in members), strict=True))[:_SIDE_BY_SIDE]:
        sides: dict[str, None] = {}  # the reference is often the same for all policies
        for (stage, *_), row in zip(members, same, strict=True):
            sides[_side(row, "reference", named("reference", REFERENCE_LOOK))] = None
            sides[_side(row, "policy", named(stage.name, looks.get(stage.name, POLICY_LOOK)))] = None
        cards.append(f'<div class="sample">{_prompt(same[0])}<div class="sides">{"".join(sides)}</div></div>')
    more = folded(f"{len(cards) - _OPEN} more", "".join(cards[_OPEN:]))
    return note(f"The first prompts, not chosen ones. {lead}") + "".join(cards[:_OPEN]) + more


def extremes(stage: Stage) -> str:
    """The completions of the last rollouts that were rewarded most and least."""
    rows = [row for row in stage.completions if isinstance(row, dict) and finite(row.get("reward"))]
    rows.sort(key=lambda row: -row["reward"])
    if not rows:
        return ""
    parts = []
    for title, chosen in (("Highest reward", rows[:_EXTREMES]), ("Lowest reward", rows[_EXTREMES:][-_EXTREMES:])):
        parts.append(folded(title, "".join(map(_completion, chosen))))
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


def _side(row: Mapping[str, Any], side: str, name: str) -> str:
    if side not in row:
        return ""
    scores = _scores({score: row.get(f"{side}_{score}") for score in ("reward", "gold")})
    outcome = row.get("outcome") if side == "policy" else None
    judged = f" <strong>{outcome}</strong>" if outcome in ("win", "loss", "tie") else ""
    return f"<div>{name}{scores}{judged}<pre>{_text(row[side])}</pre></div>"


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
