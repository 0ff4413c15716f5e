"""Compose a report and write it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_recipes.tools.pages.html import clean, document, note
from rlhf_recipes.tools.report.charts import CHARTS
from rlhf_recipes.tools.report.drawing import Looks, run_looks
from rlhf_recipes.tools.report.frontiers import frontiers
from rlhf_recipes.tools.report.outcome import result
from rlhf_recipes.tools.report.parts import TITLES
from rlhf_recipes.tools.report.reading import Run, Stage, finite, read_runs
from rlhf_recipes.tools.report.rounds import rounds
from rlhf_recipes.tools.report.samples import all_samples
from rlhf_recipes.tools.report.sections import alarms, lineage, missing, training
from rlhf_recipes.tools.report.settings import settings

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
    path.write_text(document(title, _body(runs, output)), encoding="utf-8", errors="replace")
    return path


@dataclass(frozen=True)
class _Section:
    """A heading, the word that links lead to, and what writes the text below it."""

    name: str
    heading: str
    write: Callable[[], str]


def _sections(runs: Sequence[Run], output: Path) -> list[_Section]:
    """The sections in the order of the page: what came out, how it went, and then all that stands behind it."""
    stages = [stage for run in runs for stage in run.stages]
    looks = run_looks(stages)
    policies = [stage for stage in stages if stage.kind == "ppo"]
    watched = [stage for stage in stages if stage in policies or stage.alarms is not None]
    sections = []
    if any(run.rounds for run in runs):
        sections.append(_Section("rounds", "Rounds", lambda: rounds(runs, output)))
    if policies:
        sections += [
            _Section("result", "Result", lambda: result(policies, output, looks)),
            _Section("samples", "Samples", lambda: all_samples(policies, looks)),
            _training("ppo", stages, output, looks),
            _Section("frontier", "Over-optimisation frontier", lambda: frontiers(policies, output, looks)),
        ]
    if watched:
        sections.append(_Section("alarms", "Alarms", lambda: alarms(watched, looks)))
    for kind in ("reward", "sft"):
        if any(stage.kind == kind for stage in stages):
            sections.append(_training(kind, stages, output, looks))
    sections.append(_Section("settings", "Settings", lambda: settings(stages, looks)))
    sections.append(_Section("what", "What was run", lambda: lineage(runs)))
    # This one comes last: writing the others may find more of it.
    return [*sections, _Section("missing", "What is missing", lambda: missing(runs))]


def _training(kind: str, stages: Sequence[Stage], output: Path, looks: Looks) -> _Section:
    own = [stage for stage in stages if stage.kind == kind]
    return _Section(kind, TITLES[kind], lambda: training(kind, own, output, stages, looks))


def _body(runs: Sequence[Run], output: Path) -> str:
    for run in runs:
        for stage in run.stages:
            _note_numbers(stage)
    sections = _sections(runs, output)
    texts = [_guarded(section, runs) for section in sections]
    links = "".join(f'<a href="#{section.name}">{clean(section.heading)}</a>' for section in sections)
    number = sum(len(run.missing) + sum(len(stage.missing) for stage in run.stages) for run in runs)
    gaps = f'<p class="note">{number} missing or damaged: <a href="#missing">see the end</a>.</p>' if number else ""
    html = "\n".join(
        f'<h2 id="{section.name}">{clean(section.heading)}</h2>{text}'
        for section, text in zip(sections, texts, strict=True)
    )
    return f"<nav>{links}</nav>{gaps}{html}"


def _guarded(section: _Section, runs: Sequence[Run]) -> str:
    """One section that fails on what nobody thought of must not cost the others."""
    try:
        return section.write()
    except Exception as error:
        logger.exception("The section %r could not be made.", section.heading)
        runs[0].missing.append(f"The section {section.heading!r} could not be made: {error!r}.")
        return note("This section could not be made: see what is missing.")


def _note_numbers(stage: Stage) -> None:
    """Note which of the drawn metrics are no numbers in places."""
    lines = [line for chart in CHARTS.get(stage.kind, ()) for line in chart.lines]
    drawn = {key for line in lines for key in (line.key, *(line.ends or ()))}
    for key in sorted(drawn | {"rewards/"}):
        steps = [
            entry["step"]
            for entry in stage.history
            for name, value in entry.items()
            if (name == key or (key == "rewards/" and name.startswith(key))) and not finite(value)
        ]
        if steps:
            stage.missing.append(f"{key} is no finite number in {len(steps)} log entries, first at step {steps[0]}.")
