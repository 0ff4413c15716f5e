"""Plots of a certificate, as SVG that stands inside a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from rlhf_recipes.tools.pages.colours import GOLD, INK, POLICY, REFERENCE, REWARD
from rlhf_recipes.tools.pages.drawing import Axes, draw, limits

_MOST_POINTS = 1500
_SHARES = limits((), shows=(0.0, 1.0))


def draw_plots(measures: Mapping[str, Any]) -> dict[str, str]:
    """Draw the plots that the measures allow.

    Args:
        measures: What `certify` measured.

    Returns:
        SVG elements by name, without links, scripts or texts of the data. The plots of single scores are left out
        where those are not there, as in `certificate.json`.
    """
    plots: dict[str, tuple[Callable[..., None], str]] = {}
    if "values" in measures["scores"]:
        plots = {
            "scores": (_scores, "Densities of the scores of chosen and rejected completions."),
            "length": (_length, "Scores of the completions against their lengths in tokens."),
        }
    plots["reliability"] = (_reliability, _in_words("Share right at a probability of", _agreement(measures)))
    plots["differences"] = (_differences, _in_words("Accuracy at a distance of", _accuracy(measures)))
    if measures.get("best_of_n"):
        proxy = [(row["n"], row["proxy"]["value"]) for row in measures["best_of_n"]["curve"]]
        plots["best_of_n"] = (_best_of_n, _in_words("The reward model's score of the best of", proxy))
    return {name: draw(name, alt, partial(plot, measures=measures)) for name, (plot, alt) in plots.items()}


def _in_words(lead: str, points: Sequence[tuple[float, float]]) -> str:
    return f"{lead} {', '.join(f'{x:.3g}: {y:.3g}' for x, y in points)}."


def _agreement(measures: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(row["confidence"], row["agreement"]) for row in measures["calibration"]["reliability"]]


def _accuracy(measures: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(row["mean"], row["value"]) for row in measures["by_difference"]]


def _scores(axes: Axes, measures: Mapping[str, Any]) -> None:
    values = measures["scores"]["values"]
    samples = (measures.get("samples") or {}).get("values", [])
    all_scores = np.concatenate([values["chosen"], values["rejected"], samples])
    bins: Any = np.linspace(all_scores.min(), all_scores.max(), 31)
    parts = [("chosen", values["chosen"], REWARD, "-"), ("rejected", values["rejected"], INK, "--")]
    for name, part, colour, style in [*parts, *([("policy samples", samples, POLICY, ":")] if samples else [])]:
        look: Any = {"color": colour, "linestyle": style, "linewidth": 1.5}
        axes.hist(part, bins=bins, density=True, histtype="step", label=name, **look)
    axes.set(xlabel="score", ylabel="density")
    axes.legend(frameon=False)


def _reliability(axes: Axes, measures: Mapping[str, Any]) -> None:
    rows, points = measures["calibration"]["reliability"], _agreement(measures)
    total = sum(row["n"] for row in rows)
    axes.plot([0.5, 1.0], [0.5, 1.0], color=REFERENCE, linewidth=1.1, linestyle=(0, (1, 2)), label="calibrated")
    confidence, agreement = [x for x, _ in points], [y for _, y in points]
    axes.plot(confidence, agreement, color=REWARD, linewidth=1)
    axes.scatter(confidence, agreement, s=[12 + 180 * row["n"] / total for row in rows], color=REWARD, label="pairs")
    axes.set(xlabel="probability that the model gives", ylabel="share of pairs where it is right", ylim=_SHARES)
    axes.set_xlim(limits((), shows=(0.5, 1.0)))
    axes.legend(frameon=False, loc="lower right")


def _differences(axes: Axes, measures: Mapping[str, Any]) -> None:
    rows = measures["by_difference"]
    axes.axhline(0.5, color=REFERENCE, linewidth=1.1, linestyle=(0, (1, 2)), label="a coin (0.5)")
    _with_bars(axes, [row["mean"] for row in rows], rows, "accuracy [95 %]", REWARD)
    axes.set(xlabel="distance of the two scores", ylabel="accuracy", ylim=_SHARES)
    axes.set_xlim(left=0.0)
    axes.legend(frameon=False, loc="lower right")


def _length(axes: Axes, measures: Mapping[str, Any]) -> None:
    values, lengths = measures["scores"]["values"], measures["length"]["values"]
    scores = [*values["chosen"], *values["rejected"]]
    step = len(scores) // _MOST_POINTS + 1
    axes.scatter(lengths[::step], scores[::step], s=5, alpha=0.5, color=REWARD, linewidths=0)
    axes.set(xlabel="tokens of the completion", ylabel="score", ylim=limits(scores[::step], span=1.0))
    axes.set_xlim(left=0.0)


def _best_of_n(axes: Axes, measures: Mapping[str, Any]) -> None:
    rows = measures["best_of_n"]["curve"]
    counts = [row["n"] for row in rows]
    looks = {
        "proxy": ("reward model", REWARD, "-"),
        "gold": ("gold score", GOLD, "--"),
        "oracle": ("gold, chosen by it", INK, ":"),
    }
    drawn = []
    for name, (label, colour, style) in looks.items():
        if name in rows[0]:
            own = [row[name] for row in rows]
            _with_bars(axes, counts, own, label, colour, style)
            drawn += [end for row in own for end in (row["value"], *(row["interval"] or ()))]
    axes.set_xscale("log", base=2)
    axes.set(xlabel="n", ylabel="mean score of the best of n", ylim=limits(drawn, span=1.0))
    axes.legend(frameon=False)


def _with_bars(
    axes: Axes, places: list[float], rows: list[dict[str, Any]], label: str, colour: str, style: str = "-"
) -> None:
    look: Any = {"color": colour, "linestyle": style, "marker": "o", "markersize": 4, "linewidth": 1.4}
    axes.plot(places, [row["value"] for row in rows], label=label, **look)
    bars = [(place, *row["interval"]) for place, row in zip(places, rows, strict=True) if row["interval"] is not None]
    at, low, high = ([bar[part] for bar in bars] for part in range(3))
    axes.vlines(at, low, high, color=colour, alpha=0.6)
