"""The section of a run in rounds: what was asked, whether labellers and reward models are right, and the gold score.

The numbers are those of `round.json`, which `recipes/online_rlhf/rounds.py` writes after each round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_recipes.tools.pages.colours import GOLD, INK, KL, REFERENCE, REWARD
from rlhf_recipes.tools.pages.drawing import Axes, draw, limits
from rlhf_recipes.tools.pages.html import figure, grid, note, table
from rlhf_recipes.tools.report.parts import shown
from rlhf_recipes.tools.report.reading import Run, finite

_COLUMNS = {
    "round": "round",
    "asked": "asked",
    "labels": "asked so far",
    "ties": "ties",
    "incomparable": "can't compare",
    "skipped": "skipped",
    "alpha": "alpha of labellers",
    "agreement_with_gold": "labels agree with gold",
    "held_out_accuracy": "held-out pairs",
    "new_labels_accuracy": "new labels, before training on them",
    "newest_policy_accuracy": "newest policy's samples, by gold",
    "reward_score": "reward",
    "gold_score": "gold score",
    "win_rate": "win rate",
    "kl": "KL, nats",
}
_WHAT = (
    "Accuracies are the ensemble's, on choices without ties: on pairs that a member did not train on (mean of the "
    "members), on the labels of a round before it learns from them, and on pairs of the policy that the round made, "
    "judged by the gold score. Questions that the ensemble disagreed about are harder than others."
)
_SHARES = {
    "newest_policy_accuracy": ("on the newest policy's samples", REWARD, "-", "o"),
    "new_labels_accuracy": ("on new labels", KL, "--", "s"),
    "agreement_with_gold": ("labels with gold", INK, ":", "^"),
}


def rounds(runs: Sequence[Run], folder: Path) -> str:
    """Write the rounds of each run that has any: a table, the gold score and the accuracies against the labels.

    Args:
        runs: The runs.
        folder: Where the plots go, as PNGs.

    Returns:
        HTML.
    """
    parts = []
    for number, run in enumerate(run for run in runs if run.rounds):
        columns = [name for name in _COLUMNS if any(record.get(name) is not None for record in run.rounds)]
        rows = [[shown(row.get(name), row.get(f"{name}_ci")) for name in columns] for row in run.rounds]
        heading = [run.name] if len(runs) > 1 else []
        parts += [note(name) for name in heading] + [table([_COLUMNS[name] for name in columns], rows)]
        parts.append(grid(_plots(run, f"rounds-{number}", folder)))
    return "".join(parts) + note(_WHAT)


def _plots(run: Run, name: str, folder: Path) -> list[str]:
    records = [record for record in run.rounds if finite(record.get("labels"))]
    figures = []
    if gold := [record for record in records if finite(record.get("gold_score"))]:
        words = f"Gold score of the policy after each round: {_told(gold, 'gold_score')}."
        svg = draw(f"{name}-gold", words, partial(_plot_gold, records=gold), folder / f"{name}-gold.png")
        figures.append(figure("Gold score", svg, "Of the policy after each round. Grey: of the first policy."))
    if shares := [key for key in _SHARES if any(finite(record.get(key)) for record in records)]:
        words = "; ".join(f"{_SHARES[key][0]}: {_told(records, key)}" for key in shares)
        plot = partial(_plot_shares, records=records, keys=shares)
        svg = draw(f"{name}-accuracy", words, plot, folder / f"{name}-accuracy.png")
        figures.append(figure("Are labels and reward models right?", svg, "Shares of pairs; bars are 95 % intervals."))
    return figures


def _told(records: Sequence[Mapping[str, Any]], key: str) -> str:
    own = [record for record in records if finite(record.get(key))]
    return ", ".join(f"{shown(record[key])} at {record['labels']} labels" for record in own)


def _plot_gold(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    values = [record["gold_score"] for record in records]
    axes.plot([record["labels"] for record in records], values, "o-", color=GOLD)
    reference = [value for record in records if finite(value := record.get("reference_gold_score"))]
    if reference:
        axes.axhline(reference[-1], color=REFERENCE, linestyle="--")
    axes.set_ylim(*limits([*values, *reference[-1:]], span=1.0))
    axes.set_xlim(left=0)
    axes.set_xlabel("questions asked so far")
    axes.set_ylabel("gold score")


def _plot_shares(axes: Axes, records: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    for key in keys:
        title, colour, line, marker = _SHARES[key]
        own = [record for record in records if finite(record.get(key))]
        steps, values = [record["labels"] for record in own], [record[key] for record in own]
        axes.plot(steps, values, linestyle=line, marker=marker, color=colour, label=title)
        for record in own:
            ends = record.get(f"{key}_ci")
            if isinstance(ends, list) and len(ends) == 2 and all(map(finite, ends)):
                axes.vlines(record["labels"], *ends, color=colour, alpha=0.5)
    axes.axhline(0.5, color=REFERENCE, linewidth=0.8)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlim(left=0)
    axes.set_xlabel("questions asked so far")
    axes.set_ylabel("share of pairs")
    axes.legend(loc="lower right")
