"""The sections of a report. Everything that comes from disk may be anything: it is checked, and escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.statistics.frontier import frontier
from rlhf_recipes.tools.pages.certificate import sections, verdict_section
from rlhf_recipes.tools.pages.html import clean, table
from rlhf_recipes.tools.report.drawing import draw_charts, figure, plot_frontier
from rlhf_recipes.tools.report.reading import Run, Stage, finite

_TITLES = {"sft": "SFT", "reward": "Reward model", "ppo": "PPO"}
_MEASURES = ("gold_score", "reward_score", "kl", "length", "eos_rate")
_WORDS = {
    "loss": "held-out loss, nats per token",
    "perplexity": "held-out perplexity",
    "accuracy": "held-out pair accuracy",
    "margin": "mean of chosen minus rejected score",
    "chosen_score": "mean score, chosen",
    "rejected_score": "mean score, rejected",
    "n": "rows",
}


def wide(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Write a table that scrolls in its own box where the page is narrow."""
    return f'<div class="wide">{table(header, rows)}</div>'


def shown(value: Any, ends: Any = None) -> str:
    """Write a number, perhaps with the ends of its interval; a dash for what is no number.

    Example:
        >>> shown(0.79931, [0.7729, 0.8232]), shown(576), shown(float("nan")), shown("<b>"), shown(0.00003)
        ('0.799 [0.773, 0.823]', '576', '-', '-', '3e-05')
    """
    if not finite(value):
        return "-"
    text = str(value) if isinstance(value, int) else f"{value:.3f}" if 0.001 <= abs(value) < 1e6 else f"{value:.3g}"
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(map(finite, ends)):
        text += f" [{ends[0]:.3f}, {ends[1]:.3f}]"
    return text


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
        wide((*(["run"] if len(runs) > 1 else []), *header), rows)
        + f"<details open='open'><summary>Commands</summary>{''.join(commands) or 'None is known.'}</details>"
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
    return f"<details><summary>Versions</summary>{wide(('packages', 'in'), lines)}</details>" if lines else ""


def training(kind: str, stages: Sequence[Stage], folder: Path) -> str:
    """Held-out numbers and curves of one kind of stage; for reward models also the certificate."""
    trained = [stage for stage in stages if stage.trained]
    records = [stage.record("evaluation") for stage in trained]
    names = [name for name in _WORDS if any(finite(record.get(name)) for record in records)]
    parts = []
    if names and kind != "ppo":
        rows = [
            (_WORDS[name], *(shown(record.get(name), record.get(f"{name}_ci")) for record in records))
            for name in names
        ]
        parts.append(wide(("", *(stage.name for stage in trained)), rows))
    figures = draw_charts(kind, trained, folder)
    parts.append(_plots(figures) if figures else _note("No curves: nothing was logged."))
    for stage in stages:
        if stage.record("certificate"):
            parts.append(f"<h3>Certificate: {clean(stage.name)}</h3>{_certificate(stage)}")
    return "".join(parts)


def _certificate(stage: Stage) -> str:
    measures = stage.record("certificate")
    for write in (sections, lambda certificate: [verdict_section(certificate["verdict"])]):
        try:
            first, *rest = write(measures)
        except Exception as error:  # a file from another version may lack anything
            reason = f"certificate.json cannot be shown whole, it may be from another version: {error!r}."
            if reason not in stage.missing:
                stage.missing.append(reason)
        else:
            below = "".join(rest).replace("h2>", "h3>")  # it is part of a section here; texts have no bare `>`
            details = f"<details><summary>What it rests on</summary>{below}</details>" if rest else ""
            return f'<div class="wide">{first}{details}</div>'
    return _note("It cannot be shown: see what is missing.")


def verdict(stage: Stage) -> tuple[str, str]:
    """Summarise in one sentence a stage that trained on rewards.

    Returns:
        `good`, `care` or `bad`, and the sentence.
    """
    record = stage.record("evaluation")
    ends: Any = record.get("win_rate_ci")
    known = isinstance(ends, list) and len(ends) == 2 and all(map(finite, ends)) and finite(record.get("win_rate"))
    if not known:
        return "care", "No win rate against the reference is known."
    rate = f"Win rate against the reference {shown(record['win_rate'], ends)}, by {record.get('win_rate_by', '?')}"
    if _gain(record, "gold_score") < 0 < _gain(record, "reward_score"):
        return "bad", f"{rate}. The reward rose and the gold score fell: the policy fools its reward model."
    if ends[1] < 0.5:
        return "bad", f"{rate}: worse than the reference."
    if any(row.get("kind") == "over_optimization" for row in stage.alarms or []):
        fell = "But an alarm was raised: what its reward stands for fell in training, the reward did not."
        return "bad", f"{rate}. {fell}"
    if ends[0] <= 0.5:
        return "care", f"{rate}: cannot be told from the reference."
    if record.get("win_rate_by") == "reward_score":
        return "care", f"{rate}: better by the reward that it was trained on, which says little. Give a gold score."
    return "good", f"{rate}: better than the reference."


def _gain(record: Mapping[str, Any], name: str) -> float:
    ours, theirs = (_side(record, side).get(name) for side in ("policy", "reference"))
    return ours - theirs if finite(ours) and finite(theirs) else 0.0


def _side(record: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    value = record.get(side)
    return value if isinstance(value, dict) else {}


def comparison(stages: Sequence[Stage]) -> str:
    """Policy against reference: one column of numbers per run and side."""
    records = [stage.record("evaluation") for stage in stages]
    header: list[str] = [""]
    columns: list[Mapping[str, Any]] = []
    for stage, record in zip(stages, records, strict=True):
        for side in ("policy", "reference"):
            header.append(side if len(stages) == 1 else f"{stage.name}: {side}")
            columns.append(_side(record, side))
    rows = [(name, *(shown(column.get(name)) for column in columns)) for name in _MEASURES]
    rates = []
    for stage, record in zip(stages, records, strict=True):
        rate, judge = shown(record.get("win_rate"), record.get("win_rate_ci")), record.get("win_rate_by", "-")
        rates.append((stage.name, rate, judge, shown(record.get("rows")), shown(record.get("prompts"))))
    return wide(("", "win rate [95 % interval]", "judged by", "completions", "prompts"), rates) + wide(header, rows)


def frontiers(stages: Sequence[Stage], folder: Path) -> str:
    """Reward and gold score against the distance to the reference, with the fitted law."""
    parts, rows = [], []
    for part, title in (("training", "Rollouts"), ("evaluation", "Held-out prompts")):
        curves = [(stage.name, curve) for stage in stages if (curve := _curve(stage, part)) is not None]
        if not any(curve["points"] for _, curve in curves):
            continue
        caption = "Points are steps, lines the fitted law. A gold score that bends down: more KL does harm."

        def plot(axes: Any, curves: Sequence[tuple[str, Mapping[str, Any]]] = tuple(curves)) -> None:
            plot_frontier(axes, curves)

        parts.append(figure(f"frontier-{part}", title, caption, plot, folder))
        for name, curve in curves:
            for score, fit in curve["fits"].items():
                numbers = [shown(fit.get(key)) for key in ("alpha", "beta", "peak", "peak_score", "residual")]
                rows.append((name, title, score, *numbers))
    if not parts:
        return _note("There is no frontier: no KL was logged beside a score.")
    header = ("", "of", "score", "alpha", "beta", "peak at sqrt(KL)", "score there", "residual")
    return _plots(parts) + (wide(header, rows) if rows else "")


def _curve(stage: Stage, part: str) -> dict[str, Any] | None:
    """A curve of `frontier.json`, or the same from the log."""
    curve = stage.record("frontier").get(part)
    if isinstance(curve, dict) and isinstance(curve.get("points"), list):
        fits = curve["fits"] if isinstance(curve.get("fits"), dict) else {}
        points = [row for row in curve["points"] if isinstance(row, dict)]
        return {"points": points, "fits": {name: fit for name, fit in fits.items() if isinstance(fit, dict)}}
    if part == "evaluation":
        return frontier(
            stage.history, "eval_policy/kl", {"reward": "eval_policy/reward_score", "gold": "eval_policy/gold_score"}
        )
    if not any("kl_per_token" in entry for entry in stage.history):
        return None  # the `kl` of TRL's other trainers is a mean over tokens, another axis
    scores = {key for entry in stage.history for key in entry if key.startswith("rewards/") and key.endswith("/mean")}
    gold = sorted(scores - {"rewards/reward/mean"})
    names = {"reward": "reward"} | ({"gold": gold[0]} if len(gold) == 1 and len(scores) > 1 else {})
    return frontier(stage.history, "kl", names)


def alarms(stages: Sequence[Stage]) -> str:
    """Alarms that went off, why, and what was done."""
    rows = [
        (stage.name, row.get("step", "-"), row.get("kind", "-"), row.get("message", "-"), row.get("action", "warned"))
        for stage in stages
        for row in stage.alarms or []
    ]
    watched = [stage.name for stage in stages if stage.alarms == []]
    parts = [wide(("", "step", "alarm", "reason", "what was done"), rows)] if rows else []
    if watched:
        parts.append(_note(f"Watched, and nothing was found: {', '.join(watched)}."))
    if not parts:
        parts.append(_note("No alarm watched these runs."))
    return "".join(parts)


def missing(runs: Sequence[Run]) -> str:
    """Everything that the report could not show."""
    rows = [(str(run.folder), text) for run in runs for text in run.missing]
    rows += [(str(stage.folder), text) for run in runs for stage in run.stages for text in stage.missing]
    return wide(("folder", "what is missing"), rows) if rows else _note("Nothing.")


def title_of(kind: str) -> str:
    """Heading of a kind of stage."""
    return _TITLES[kind]


def _plots(figures: Iterable[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{clean(text)}</p>'
