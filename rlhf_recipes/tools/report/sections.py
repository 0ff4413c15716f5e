"""The sections of a report. Everything that comes from disk may be anything: it is checked, and escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.tools.pages.html import clean, folded, grid, note, table
from rlhf_recipes.tools.report.checks import checks
from rlhf_recipes.tools.report.drawing import Looks, draw_charts, named
from rlhf_recipes.tools.report.parts import shown
from rlhf_recipes.tools.report.reading import Run, Stage, finite

_WORDS = {
    "loss": "held-out loss, nats per token",
    "perplexity": "held-out perplexity",
    "accuracy": "held-out pair accuracy",
    "margin": "mean of chosen minus rejected score",
    "chosen_score": "mean score, chosen",
    "rejected_score": "mean score, rejected",
    "n": "rows",
}


def lineage(runs: Sequence[Run]) -> str:
    """Write what was run: stages, commands, commits, versions."""
    rows, commands, versions = [], [], []
    for run in runs:
        for stage in run.stages:
            record, state = stage.record("run"), stage.record("trainer_state")
            parents = record.get("parents")
            paths = [parent.get("path") for parent in parents or [] if isinstance(parent, dict)]
            seconds = next((row["train_runtime"] for row in stage.history if finite(row.get("train_runtime"))), None)
            rows.append(
                (
                    *([run.name] if len(runs) > 1 else []),
                    stage.folder.name,
                    record.get("stage") or (f"{stage.kind} (a guess)" if stage.trained else "-"),
                    _short(record.get("git_commit")),
                    ", ".join(map(str, paths)) or "-",
                    shown(state.get("global_step")),
                    "-" if seconds is None else f"{seconds:.0f}",
                    record.get("wandb_run_id") or "-",
                )
            )
            if record.get("command"):
                commands.append(f"<h3>{clean(stage.folder)}</h3><pre>{clean(record['command'])}</pre>")
            versions.append((str(stage.folder), record.get("versions")))
    header = ("folder", "stage", "commit", "starts from", "steps", "seconds", "W&B run")
    return (
        table((*(["run"] if len(runs) > 1 else []), *header), rows)
        + (folded("Commands", "".join(commands)) or note("No command is known."))
        + _versions(versions)
    )


def _short(commit: Any) -> str:
    """The first 12 digits, and whether files were changed since."""
    return "-" if not commit else str(commit)[:12] + ("-dirty" if str(commit).endswith("-dirty") else "")


def _versions(stages: Sequence[tuple[str, Any]]) -> str:
    groups: dict[str, list[str]] = {}
    for folder, versions in stages:
        if isinstance(versions, Mapping):
            groups.setdefault(", ".join(f"{name} {value}" for name, value in versions.items()), []).append(folder)
    lines = [(text, "all stages" if len(groups) == 1 else ", ".join(folders)) for text, folders in groups.items()]
    return folded("Versions", table(("packages", "in"), lines)) if lines else ""


def training(kind: str, stages: Sequence[Stage], folder: Path, everything: Sequence[Stage], looks: Looks) -> str:
    """Held-out numbers of one kind of stage, the checks of a reward (verifier and certificate), and the curves.

    Args:
        kind: `sft`, `reward` or `ppo`.
        stages: The stages of this kind.
        folder: Where the plots go.
        everything: The stages of all kinds: a check of one kind links to the other one, wherever that is.
        looks: Of the runs.

    Returns:
        HTML.
    """
    trained = [stage for stage in stages if stage.trained]
    parts = [_held_out(trained, looks) if kind != "ppo" else "", checks(kind, stages, everything)]
    figures, more = draw_charts(kind, trained, folder, looks)
    if figures or more:
        parts += [grid(figures), folded(f"{len(more)} more curves", grid(more))]
    elif not all(stage.only_checks for stage in stages):
        parts.append(note("No curves: nothing was logged."))
    return "".join(parts)


def _held_out(stages: Sequence[Stage], looks: Looks) -> str:
    """A row per stage with the numbers that its evaluation wrote."""
    records = [stage.record("evaluation") for stage in stages]
    names = [name for name in _WORDS if any(finite(record.get(name)) for record in records)]
    rows = [
        (named(stage.name, looks.get(stage.name)), *(shown(record.get(n), record.get(f"{n}_ci")) for n in names))
        for stage, record in zip(stages, records, strict=True)
    ]
    return table(("", *(_WORDS[name] for name in names)), rows) if names else ""


def alarms(stages: Sequence[Stage], looks: Looks) -> str:
    """Alarms that went off, why, and what was done."""
    rows = [
        (
            named(stage.name, looks.get(stage.name)),
            row.get("step", "-"),
            row.get("kind", "-"),
            row.get("message", "-"),
            row.get("action", "warned"),
        )
        for stage in stages
        for row in stage.alarms or []
    ]
    watched = [stage.name for stage in stages if stage.alarms == []]
    parts = [table(("", "step", "alarm", "reason", "what was done"), rows)] if rows else []
    if watched:
        parts.append(note(f"Watched, and nothing was found: {', '.join(watched)}."))
    if not parts:
        parts.append(note("No alarm watched these runs."))
    return "".join(parts)


def missing(runs: Sequence[Run]) -> str:
    """Everything that the report could not show."""
    rows = [(str(run.folder), text) for run in runs for text in run.missing]
    rows += [(str(stage.folder), text) for run in runs for stage in run.stages for text in stage.missing]
    return table(("folder", "what is missing"), rows) if rows else note("Nothing.")
