"""Draw the plots of a report: each as SVG for the page and as a PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rlhf_recipes.tools.pages.colours import GOLD, INK, REFERENCE, REWARD, Look, run_look
from rlhf_recipes.tools.pages.drawing import Axes, Line2D, draw, limits
from rlhf_recipes.tools.pages.html import Html, clean, figure, printable
from rlhf_recipes.tools.report.charts import CHARTS, Chart, Line
from rlhf_recipes.tools.report.reading import KINDS, Stage, finite, gold_metric, series

Looks = Mapping[str, Look]

_OTHER_STYLES = ("-.", ":")  # of reward functions that are neither the reward nor gold
_MOST_POINTS = 800
_FEW = 3  # points that need no line between them to be seen
_MARKS = 6  # about as many on the curve of each run
_MOST_TOLD = 12  # curves that a plot's text in words has
_LONGEST_NAME = 28


def run_looks(stages: Sequence[Stage]) -> dict[str, Look]:
    """Give each run a colour and a marker, the same in all plots and texts of a page.

    Args:
        stages: All stages of a report.

    Returns:
        Looks by the stages' names, of those that share their plots with others. Where a kind of stage is there only
        once, colours tell apart what is drawn, and there are no looks.
    """
    trained = [stage for stage in stages if stage.trained and stage.kind in KINDS]
    shared = [stage.name for stage in trained if sum(other.kind == stage.kind for other in trained) > 1]
    return {name: run_look(number) for number, name in enumerate(dict.fromkeys(shared))}


def named(name: str, look: Look | None) -> Html:
    """Write a name after the marker of its run, if it has one."""
    if look is None:
        return Html(clean(name))
    mark = f'<span class="sign" aria-hidden="true" style="color:{look.colour}">{look.sign}</span>'
    return Html(mark + clean(name))


@dataclass(frozen=True)
class _Curve:
    """One line of one stage, with the ends of its interval at the same steps."""

    stage: str
    line: Line
    steps: list[int]
    values: list[float]
    ends: tuple[list[float], list[float]] | None


def draw_charts(kind: str, stages: Sequence[Stage], folder: Path, looks: Looks) -> tuple[list[str], list[str]]:
    """Draw the charts of one kind of stage that have something to show.

    Args:
        kind: `sft`, `reward` or `ppo`.
        stages: The stages of this kind; their curves go into the same plots.
        folder: Where the PNGs go, as `<kind>-<name>.png`.
        looks: Of the runs, as `run_looks` gives them.

    Returns:
        HTML figures: those to show, and those to fold.
    """
    shown: list[str] = []
    hidden: list[str] = []
    for chart in CHARTS[kind]:
        curves = [curve for stage in stages for curve in _curves(chart, stage)]
        if not curves:
            continue
        spreads = [value for stage in stages for value in series(stage.history, chart.spread)[1] if finite(value)]
        drawn = [value for curve in curves for values in (curve.values, *(curve.ends or ())) for value in values]
        levels = (*chart.shows, *chart.levels)
        ends = limits(filter(finite, drawn), levels, max([chart.span, *([median(spreads)] if spreads else [])]))
        plot = partial(_plot_curves, chart=chart, curves=curves, ends=ends, looks=looks)
        name = f"{kind}-{chart.name}"
        svg = draw(name, _in_words(chart, curves), plot, folder / f"{name}.png")
        (hidden if chart.folded else shown).append(figure(chart.title, svg, chart.caption))
    return shown, hidden


def _curves(chart: Chart, stage: Stage) -> list[_Curve]:
    """The chart's metrics that were logged."""
    curves = []
    for line in (*chart.lines, *(_functions(stage) if chart.functions else ())):
        curve = _measured(stage, line) if line.measured else _logged(stage, line)
        if any(map(finite, curve.values)):
            curves.append(curve)
    return curves


def _logged(stage: Stage, line: Line) -> _Curve:
    steps, values = series(stage.history, line.key)
    if line.ends is None:
        return _Curve(stage.name, line, steps, values, None)
    rows = [entry for entry in stage.history if line.key in entry]
    low, high = (series(rows, end)[1] for end in line.ends)
    return _Curve(stage.name, line, steps, values, (low, high))


def _measured(stage: Stage, line: Line) -> _Curve:
    """What was logged, and in the place of its end what was measured there, with its interval."""
    curve, record = _logged(stage, line), stage.record("evaluation")
    value, ends = record.get(line.measured), record.get(f"{line.measured}_ci")
    if not (finite(value) and isinstance(ends, list) and len(ends) == 2 and all(map(finite, ends)) and stage.history):
        return curve
    last = stage.history[-1]["step"]
    before = [(step, old) for step, old in zip(curve.steps, curve.values, strict=True) if step < last]
    gaps = [math.nan] * len(before)
    steps, values = [step for step, _ in before], [old for _, old in before]
    return _Curve(stage.name, line, [*steps, last], [*values, value], ([*gaps, ends[0]], [*gaps, ends[1]]))


def _functions(stage: Stage) -> list[Line]:
    """A line per reward function, but for one whose mean is the reward itself."""
    keys = sorted({key for entry in stage.history for key in entry if re.fullmatch(r"rewards/.+/mean", key)})
    gold = gold_metric(stage)
    others = [key for key in keys if key != gold and not _is_reward(stage, key)]
    lines = [Line(key, _function(key), INK, _OTHER_STYLES[n % len(_OTHER_STYLES)]) for n, key in enumerate(others)]
    return lines if gold is None else [Line(gold, _function(gold), GOLD, "--"), *lines]


def _is_reward(stage: Stage, key: str) -> bool:
    """The logged sum of the rewards differs by how it was rounded from the mean of a function that is alone in it."""
    (steps, own), (all_steps, whole) = series(stage.history, key), series(stage.history, "reward")
    return steps == all_steps and all(
        math.isclose(*pair, rel_tol=1e-4, abs_tol=1e-6) for pair in zip(own, whole, strict=True)
    )


def _function(key: str) -> str:
    return key.removeprefix("rewards/").removesuffix("/mean")


def _plot_curves(axes: Axes, chart: Chart, curves: Sequence[_Curve], ends: tuple[float, float], looks: Looks) -> None:
    for level in chart.levels:
        axes.axhline(level, color=REFERENCE, linewidth=1.1, linestyle=(0, (1, 2)))
    for curve in curves:
        look, few = looks.get(curve.stage), len(curve.steps) < _FEW
        every = slice(None, None, len(curve.steps) // _MOST_POINTS + 1)
        steps, values = curve.steps[every], curve.values[every]
        low, high = (ends[every] for ends in curve.ends or ((), ()))
        colour = look.colour if look else curve.line.colour
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=curve.line.style,
            linewidth=1.5,
            marker=look.marker if look else "o" if few else "",
            markersize=4,
            markevery=len(steps) // _MARKS + 1,
        )
        if curve.ends and sum(map(finite, low)) < _FEW:
            axes.vlines(steps, low, high, color=colour, alpha=0.6)
        elif curve.ends:
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_ylim(ends)
    axes.set_xlim(left=min(0, *(step for curve in curves for step in curve.steps)))
    axes.set(xlabel="optimizer step", ylabel=chart.unit)
    _legend(axes, _handles(chart, curves, looks))


def _handles(chart: Chart, curves: Sequence[_Curve], looks: Looks) -> list[Line2D]:
    """What the legend explains: runs by their colours and metrics by their line styles, or metrics by both."""
    lines = list(dict.fromkeys(curve.line for curve in curves))
    runs = [name for name in dict.fromkeys(curve.stage for curve in curves) if name in looks]
    handles = [_handle(_shortened(name), looks[name].colour, "-", looks[name].marker) for name in runs]
    metrics = []
    for line in lines:
        few = all(len(curve.steps) < _FEW for curve in curves if curve.line == line)
        metrics.append(_handle(line.label, INK if runs else line.colour, line.style, "o" if few else ""))
    if len(lines) > 1:
        handles += metrics
    levels = [_handle(f"{text} ({value:.3g})", REFERENCE, (0, (1, 2))) for value, text in chart.levels.items()]
    return (handles or (metrics if levels else [])) + levels


def _in_words(chart: Chart, curves: Sequence[_Curve]) -> str:
    """What a plot shows, for those who do not see it: where its curves begin and end."""
    parts = [f"{chart.title}, {chart.unit}, over the optimizer steps."]
    several = len({curve.stage for curve in curves}) > 1
    for curve in curves[:_MOST_TOLD]:
        points = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if finite(value)]
        (first, begin), (last, end) = points[0], points[-1]
        name = f"{_shortened(curve.stage)}, {curve.line.label}" if several else curve.line.label
        parts.append(f"{name}: {begin:.3g} at step {first}, {end:.3g} at step {last}.")
    if len(curves) > _MOST_TOLD:
        parts.append(f"And {len(curves) - _MOST_TOLD} more curves.")
    return " ".join(parts)


def plot_frontier(axes: Axes, curves: Sequence[tuple[str, Mapping[str, Any]]], looks: Looks) -> None:
    """Draw scores against the distance to the reference, with the fitted laws where there are some.

    Args:
        axes: Where to draw.
        curves: For each stage its name, and `points` and `fits` as `rlhf_recipes.statistics.frontier` makes them.
        looks: Of the runs, as `run_looks` gives them.
    """
    runs: dict[str, Line2D] = {}
    scores: dict[str, Line2D] = {}
    drawn: list[float] = []
    for name, curve in curves:
        look = looks.get(name)
        for score, own, style in (("reward", REWARD, "-"), ("gold", GOLD, "--")):
            rows = [row for row in curve["points"] if finite(row.get("distance")) and finite(row.get(score))]
            if not rows:
                continue
            colour, marker = (look.colour, look.marker) if look else (own, "o")
            fill = colour if score == "gold" else "none"
            x, y = [row["distance"] for row in rows], [row[score] for row in rows]
            axes.plot(
                x, y, linestyle="", marker=marker, markersize=4.5, color=colour, markerfacecolor=fill, alpha=0.85
            )
            law = _law(curve["fits"].get(score), max(x))
            axes.plot(*law, linewidth=1.3, linestyle=style, color=colour)
            drawn += [*y, *filter(finite, law[1])]
            scores[score] = _handle(score, INK if look else own, style, "o")
            scores[score].set_markerfacecolor("none" if fill == "none" else scores[score].get_color())
            if look:
                runs[name] = _handle(_shortened(name), look.colour, "", look.marker)
    axes.set_ylim(limits(drawn, span=1.0))
    axes.set_xlim(left=0.0)
    axes.set(xlabel="distance to the reference, sqrt(KL in nats)", ylabel="score")
    _legend(axes, [*runs.values(), *scores.values()])


def plot_win_rates(axes: Axes, rows: Sequence[tuple[str, float, tuple[float, float], Look]]) -> None:
    """Draw win rates with their intervals below each other, from the top.

    Args:
        axes: Where to draw.
        rows: Name, win rate, the ends of its interval, and look of each.
    """
    axes.axvline(0.5, color=REFERENCE, linewidth=1.1, linestyle=(0, (1, 2)))
    for number, (name, rate, ends, look) in enumerate(rows):
        axes.plot(ends, (-number, -number), color=look.colour, linewidth=2)
        axes.plot(rate, -number, marker=look.marker, markersize=7, color=look.colour)
        text = axes.text(0.01, -number + 0.2, _shortened(name), va="bottom")
        text.set_parse_math(False)
    axes.set(xlim=(0.0, 1.0), ylim=(0.5 - len(rows), 0.75), yticks=[])
    axes.set(xlabel="win rate over the reference; 0.5 is no better")
    axes.spines["left"].set_visible(False)


def _law(fit: Any, furthest: float) -> tuple[list[float], list[float]]:
    if not isinstance(fit, Mapping) or not all(finite(fit.get(name)) for name in ("start", "alpha", "beta")):
        return [], []
    places = [max(furthest, 1e-6) * part / 60 for part in range(1, 61)]
    return places, [fit["start"] + d * (fit["alpha"] - fit["beta"] * math.log(d)) for d in places]


def _handle(label: str, colour: str, style: Any, marker: str = "") -> Line2D:
    text = " ".join(printable(label).split())[: 2 * _LONGEST_NAME]
    label = f" {text}" if text.startswith("_") else text  # matplotlib hides what begins with "_"
    return Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=5, label=label)


def _shortened(name: str) -> str:
    name = " ".join(printable(name).split())
    return name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME:]


def _legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    """A legend below the axes. Names are data: a `$` in them is no mathematics."""
    if len(handles) < 2:
        return
    legend = axes.figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
