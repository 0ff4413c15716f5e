"""Draw the curves of a report: each plot as SVG for the page and as a PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_recipes.tools.pages.drawing import Axes, draw
from rlhf_recipes.tools.pages.html import clean, printable
from rlhf_recipes.tools.report.charts import CHARTS, Chart
from rlhf_recipes.tools.report.reading import Stage, finite, series

_COLOURS = ("#2f7ed8", "#e07b28", "#3aa35a", "#c9495b", "#8e6bd1", "#8a8a8a", "#b58900", "#2aa1a1")
_LINES = ("-", "--", ":", "-.")
_MOST_POINTS = 800
_LONGEST_NAME = 28


def draw_charts(kind: str, stages: Sequence[Stage], folder: Path) -> list[str]:
    """Draw the charts of one kind of stage that have something to show.

    Args:
        kind: `sft`, `reward` or `ppo`.
        stages: The stages of this kind; their curves go into the same plots.
        folder: Where the PNGs go, as `<kind>-<name>.png`.

    Returns:
        HTML figures.
    """
    figures = []
    for chart in CHARTS[kind]:
        lines = [
            (stage_number, key_number, label, *points)
            for stage_number, stage in enumerate(stages)
            for key_number, (key, label) in enumerate(_present(chart, stage))
            if any(map(finite, (points := series(stage.history, key))[1]))
        ]
        if lines:
            names = [stage.name for stage in stages]
            plot = partial(_plot_lines, title=chart.title, lines=lines, names=names)
            figures.append(figure(f"{kind}-{chart.name}", chart.title, chart.caption, plot, folder))
    return figures


def figure(name: str, title: str, caption: str, plot: Any, folder: Path) -> str:
    """Draw one plot into an HTML figure and a PNG.

    Args:
        name: Name of the PNG, without its end, and start of the ids in the SVG.
        title: Heading.
        caption: How to read it.
        plot: Draws into the axes.
        folder: Where the PNG goes.

    Returns:
        The figure.
    """
    svg = draw(name, plot, folder / f"{name}.png")
    return f"<figure><h3>{clean(title)}</h3>{svg}<figcaption>{clean(caption)}</figcaption></figure>"


def plot_frontier(axes: Axes, curves: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Draw scores against the distance to the reference, with the fitted laws where there are some.

    Args:
        axes: Where to draw.
        curves: For each stage its name, and `points` and `fits` as `rlhf_recipes.statistics.frontier` makes them.
    """
    for number, (name, curve) in enumerate(curves):
        for place, score in enumerate(("gold", "reward")):
            rows = [row for row in curve["points"] if finite(row.get("distance")) and finite(row.get(score))]
            if not rows:
                continue
            colour = _COLOURS[(number if len(curves) > 1 else place) % len(_COLOURS)]
            label = _label(name, score, len(curves))
            x, y = [row["distance"] for row in rows], [row[score] for row in rows]
            marker = "o" if score == "gold" else "x"
            axes.plot(x, y, linestyle="", marker=marker, markersize=4, color=colour, alpha=0.8, label=label)
            law = _law(curve["fits"].get(score), max(x))
            if law is not None:
                axes.plot(*law, linewidth=1.3, linestyle=_LINES[place], color=colour)
    axes.set(xlabel="distance to the reference, sqrt(KL)", ylabel="score")
    _legend(axes)


def _law(fit: Any, furthest: float) -> tuple[list[float], list[float]] | None:
    if not isinstance(fit, Mapping) or not all(finite(fit.get(name)) for name in ("start", "alpha", "beta")):
        return None
    places = [max(furthest, 1e-6) * part / 60 for part in range(1, 61)]
    return places, [fit["start"] + d * (fit["alpha"] - fit["beta"] * math.log(d)) for d in places]


def _present(chart: Chart, stage: Stage) -> list[tuple[str, str]]:
    """The chart's metrics that were logged, with their labels."""
    keys = sorted({key for entry in stage.history for key in entry if isinstance(key, str)})
    metrics: list[tuple[str, str]] = []
    for key, label in chart.keys.items():
        if key == "rewards/*":
            scores = {key: match[1] for key in keys if (match := re.fullmatch(r"rewards/(.+)/mean", key))}
            # With one reward function its mean is the reward itself
            metrics += [] if len(scores) == 1 else [(key, name) for key, name in scores.items() if name != "reward"]
        elif key in keys:
            metrics.append((key, label))
    return metrics


def _plot_lines(
    axes: Axes, title: str, lines: Sequence[tuple[int, int, str, list[int], list[float]]], names: Sequence[str]
) -> None:
    several = len({key for _, key, *_ in lines}) > 1
    for stage, key, label, steps, values in lines:
        colour, style = (stage, key) if len(names) > 1 else (key, 0)
        every = len(steps) // _MOST_POINTS + 1
        axes.plot(
            steps[::every],
            values[::every],
            color=_COLOURS[colour % len(_COLOURS)],
            linestyle=_LINES[style % len(_LINES)],
            linewidth=1.3,
            marker="o" if len(steps) < 3 else "",
            markersize=3,
            label=_label(names[stage], label if several else "", len(names)),
        )
    axes.set(xlabel="optimizer step", ylabel=title)
    _legend(axes)


def _label(name: str, label: str, number: int) -> str:
    name = printable(name)
    name = name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME:]
    parts = [name, label] if number > 1 else [label]
    text = " ".join(printable(": ".join(filter(None, parts))).split())[: 2 * _LONGEST_NAME]
    return f" {text}" if text.startswith("_") else text  # matplotlib hides what begins with "_"


def _legend(axes: Axes) -> None:
    """A legend below the axes. Names are data: a `$` in them is no mathematics."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < 2:
        return
    legend = axes.figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
