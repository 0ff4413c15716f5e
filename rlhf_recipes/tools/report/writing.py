"""Compose a report and write it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_recipes.tools.pages.html import clean, document
from rlhf_recipes.tools.report.charts import CHARTS
from rlhf_recipes.tools.report.reading import KINDS, Run, Stage, finite, read_runs
from rlhf_recipes.tools.report.samples import all_samples
from rlhf_recipes.tools.report.sections import (
    alarms,
    comparison,
    frontiers,
    lineage,
    missing,
    settings,
    title_of,
    training,
    verdict,
)

logger = logging.getLogger(__name__)


def write_report(folders: Sequence[str | Path], output_dir: str | Path | None = None) -> Path:
    """Make a report of runs from what is on disk: `report.html`, which needs nothing else, and PNGs of its plots.

    A folder that is empty, cut off, or from another version has a report too, which says what is missing. All texts
    from disk are escaped, and the page may load and run nothing.

    Args:
        folders: Folders of recipes (`outputs/quickstart`) or of single stages (`outputs/quickstart/ppo`). Several
            are compared.
        output_dir: Where the files go; by default `report` in the first folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: If no folder is given.
        OSError: If a folder is not there, or the report cannot be written.

    Example:
        >>> write_report(["outputs/quickstart"])  # doctest: +SKIP
        PosixPath('outputs/quickstart/report/report.html')
    """
    runs = read_runs(folders)
    output = Path(output_dir) if output_dir is not None else Path(folders[0]) / "report"
    output.mkdir(parents=True, exist_ok=True)
    path = output / "report.html"
    title = "Report: " + ", ".join(run.name for run in runs)
    path.write_text(document(title, STYLE, _body(runs, output)), encoding="utf-8", errors="replace")
    return path


def _body(runs: Sequence[Run], output: Path) -> str:
    stages = [stage for run in runs for stage in run.stages]
    of_kind = {kind: [stage for stage in stages if stage.kind == kind] for kind in KINDS}
    policies = of_kind["ppo"]
    for stage in stages:
        _note_numbers(stage)
    parts: list[tuple[str, str, Callable[[], str]]] = [("what", "What was run", lambda: lineage(runs))]
    for kind in KINDS:
        if of_kind[kind]:
            parts.append((kind, title_of(kind), _section(kind, of_kind[kind], output, stages)))
    if policies:
        parts.append(("frontier", "Over-optimisation frontier", lambda: frontiers(policies, output)))
        parts.append(("comparison", "Policy against reference", lambda: comparison(policies)))
        parts.append(("samples", "Samples", lambda: all_samples(policies)))
    if policies or any(stage.alarms is not None for stage in stages):
        watched = [stage for stage in stages if stage in policies or stage.alarms is not None]
        parts.append(("alarms", "Alarms", lambda: alarms(watched)))
    parts.append(("settings", "Settings", lambda: settings(stages)))
    # What is missing comes last: writing the other sections may find more of it.
    written = [(name, heading, _guarded(heading, write, runs)) for name, heading, write in parts]
    written.append(("missing", "What is missing", missing(runs)))
    links = "".join(f'<a href="#{name}">{clean(heading)}</a>' for name, heading, _ in written)
    html = "\n".join(f'<h2 id="{name}">{clean(heading)}</h2>{text}' for name, heading, text in written)
    return f"<nav>{links}</nav>{_in_short(runs, policies)}{html}"


def _section(kind: str, stages: Sequence[Stage], output: Path, everything: Sequence[Stage]) -> Callable[[], str]:
    return lambda: training(kind, stages, output, everything)


def _guarded(heading: str, write: Callable[[], str], runs: Sequence[Run]) -> str:
    """One section that fails on what nobody thought of must not cost the others."""
    try:
        return write()
    except Exception as error:
        logger.exception("The section %r could not be made.", heading)
        runs[0].missing.append(f"The section {heading!r} could not be made: {error!r}.")
        return '<p class="note">This section could not be made: see what is missing.</p>'


def _in_short(runs: Sequence[Run], policies: Sequence[Stage]) -> str:
    parts = []
    for stage in policies:
        level, sentence = verdict(stage)
        raised = len(stage.alarms or [])
        if stage.alarms is not None:
            sentence += f" Alarms and warnings: {raised}." if raised else " No alarm was raised."
        parts.append(f'<p class="verdict {level}"><strong>{clean(stage.name)}</strong>: {clean(sentence)}</p>')
    number = sum(len(run.missing) + sum(len(stage.missing) for stage in run.stages) for run in runs)
    if number:
        parts.append(f'<p class="note">{number} missing or damaged: <a href="#missing">see the end</a>.</p>')
    return "".join(parts)


def _note_numbers(stage: Stage) -> None:
    """Note which of the drawn metrics are no numbers in places."""
    drawn = {key for chart in CHARTS.get(stage.kind, ()) for key in chart.keys}
    for key in sorted(drawn | {"rewards/"}):
        steps = [
            entry["step"]
            for entry in stage.history
            for name, value in entry.items()
            if (name == key or (key == "rewards/" and name.startswith(key))) and not finite(value)
        ]
        if steps:
            stage.missing.append(f"{key} is no finite number in {len(steps)} log entries, first at step {steps[0]}.")


STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5c5c5c; --line: #dcdcdc; --box: #f5f5f5; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --soft: #a5a5a5; --line: #3b3b3b; --box: #222426; --page: #151617; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; } a { color: inherit; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; vertical-align: top; overflow-wrap: normal; }
td { border-top: 1px solid var(--line); }
.plots { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; max-width: 32rem; } figure h3 { margin-top: .4rem; }
figcaption, .note { color: var(--soft); font-size: .9rem; } svg { width: 100%; height: auto; }
.verdict { padding: .6rem 1rem; border-left: .4rem solid; background: var(--box); font-size: 1.05rem; }
.good { border-color: #2b9d4b; } .care { border-color: #d9822b; } .bad { border-color: #cf3a31; }
pre { white-space: pre-wrap; background: var(--box); padding: .5rem; margin: .2rem 0; font-size: .87rem; }
.sides { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.sample { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; } details { margin: .4rem 0; }
"""
