"""Plots of a certificate, as SVG that stands inside a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from rlhf_recipes.tools.pages.drawing import Axes, draw

_BLUE, _ORANGE, _GREY = "#2563a8", "#c2620f", "#777777"
_MOST_POINTS = 1500


def draw_plots(measures: Mapping[str, Any]) -> dict[str, str]:
    """Draw the plots that the measures allow.

    Args:
        measures: What `certify` measured.

    Returns:
        SVG elements by name, without links, scripts or texts of the data. The plots of single scores are left out
        where those are not there, as in `certificate.json`.
    """
    plots: dict[str, Callable[..., None]] = {}
    if "values" in measures["scores"]:
        plots = {"scores": _scores, "length": _length}
    plots |= {"reliability": _reliability, "differences": _differences}
    if measures.get("best_of_n"):
        plots["best_of_n"] = _best_of_n
    return {name: draw(name, partial(plot, measures=measures)) for name, plot in plots.items()}


def _scores(axes: Axes, measures: Mapping[str, Any]) -> None:
    values = measures["scores"]["values"]
    samples = (measures.get("samples") or {}).get("values", [])
    all_scores = np.concatenate([values["chosen"], values["rejected"], samples])
    bins: Any = np.linspace(all_scores.min(), all_scores.max(), 31)
    parts = [("chosen", values["chosen"], _BLUE), ("rejected", values["rejected"], _ORANGE)]
    for name, part, colour in [*parts, *([("policy samples", samples, _GREY)] if samples else [])]:
        axes.hist(part, bins=bins, density=True, histtype="step", color=colour, label=name, linewidth=1.4)
    axes.set(xlabel="score", ylabel="density")
    axes.legend(frameon=False)


def _reliability(axes: Axes, measures: Mapping[str, Any]) -> None:
    rows = measures["calibration"]["reliability"]
    total = sum(row["n"] for row in rows)
    axes.plot([0.5, 1.0], [0.5, 1.0], color=_GREY, linewidth=1, linestyle="--", label="calibrated")
    confidence, agreement = [row["confidence"] for row in rows], [row["agreement"] for row in rows]
    axes.plot(confidence, agreement, color=_BLUE, linewidth=1)
    axes.scatter(confidence, agreement, s=[12 + 180 * row["n"] / total for row in rows], color=_BLUE, label="pairs")
    axes.set(xlabel="probability that the model gives", ylabel="share of pairs where it is right")
    axes.legend(frameon=False)


def _differences(axes: Axes, measures: Mapping[str, Any]) -> None:
    rows = measures["by_difference"]
    _with_bars(axes, [row["mean"] for row in rows], rows, "accuracy", _BLUE)
    axes.axhline(0.5, color=_GREY, linewidth=1, linestyle="--")
    axes.set(xlabel="distance of the two scores", ylabel="accuracy")


def _length(axes: Axes, measures: Mapping[str, Any]) -> None:
    values, lengths = measures["scores"]["values"], measures["length"]["values"]
    scores = [*values["chosen"], *values["rejected"]]
    step = len(scores) // _MOST_POINTS + 1
    axes.scatter(lengths[::step], scores[::step], s=5, alpha=0.4, color=_BLUE, linewidths=0)
    axes.set(xlabel="tokens of the completion", ylabel="score")


def _best_of_n(axes: Axes, measures: Mapping[str, Any]) -> None:
    rows = measures["best_of_n"]["curve"]
    counts = [row["n"] for row in rows]
    names = {
        "proxy": ("reward model", _GREY),
        "gold": ("gold score", _BLUE),
        "oracle": ("gold, chosen by it", _ORANGE),
    }
    for name, (label, colour) in names.items():
        if name in rows[0]:
            _with_bars(axes, counts, [row[name] for row in rows], label, colour)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="n", ylabel="mean score of the best of n")
    axes.legend(frameon=False)


def _with_bars(axes: Axes, places: list[float], rows: list[dict[str, Any]], label: str, colour: str) -> None:
    values = np.array([row["value"] for row in rows])
    axes.plot(places, values, color=colour, marker="o", markersize=4, linewidth=1.2, label=label)
    bars = [(place, *row["interval"]) for place, row in zip(places, rows, strict=True) if row["interval"] is not None]
    at, low, high = ([bar[part] for bar in bars] for part in range(3))
    axes.vlines(at, low, high, color=colour, alpha=0.5)
