"""The over-optimisation frontier in a report: scores against the distance to the reference, and what the law says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_recipes.statistics.frontier import frontier
from rlhf_recipes.tools.pages.colours import REFERENCE_LOOK
from rlhf_recipes.tools.pages.drawing import draw
from rlhf_recipes.tools.pages.html import Html, clean, figure, grid, note, table
from rlhf_recipes.tools.report.drawing import Looks, named, plot_frontier
from rlhf_recipes.tools.report.parts import shown
from rlhf_recipes.tools.report.reading import Stage, finite, gold_metric

_MOST_RESIDUAL = 0.15  # of the range of the scores
_LAW = Html(
    "<p>The curves are the law that Gao et al. (2022, arXiv 2210.10760) found for reinforcement learning against a "
    "reward model, fitted to the points by least squares:</p>"
    "<p>score(d) = start + d (alpha - beta ln d), where d = sqrt(KL) is the distance to the reference.</p>"
)
_NUMBERS = {
    "start": "the score at d = 0, where the policy is the reference: it should be near the reference's in the result.",
    "alpha": "what the first unit of distance earns: score(1) - start. Above 0, PPO found something to gain.",
    "beta": "how fast the gain wears off. At 0 the curve is a straight line, without over-optimisation. The "
    "larger beta is beside alpha, the earlier it comes.",
    "peak at d": "exp(alpha / beta - 1), where the curve is highest, and the score there. For gold: beyond it, more "
    "KL does harm, so stop there or raise the KL penalty. A dash: there is none within ten times the run's distance.",
    "furthest d": "the largest distance of the points.",
    "residual": "how far the points lie from the curve, root mean square, in units of the score.",
}
_ENDS = (
    "A point for each run, and the reference at 0: what a KL penalty, or another setting, buys. Where reward rises "
    "and gold falls, the policy is over-optimised. The runs must have the same reward model, judge and prompts."
)
_DISTRUST = (
    "Do not trust a fit that the last column marks. Nor one with few points, or whose points lie close together in d: "
    "many pairs of alpha and beta then fit as well, so compare peaks rather than these two. The points are steps of "
    "one training, not independent runs, and without intervals. Reward models, judges and prompts must be the same "
    "where two runs are compared. The reward's own curve says how well PPO maximises it, not how good the texts are."
)


def frontiers(stages: Sequence[Stage], folder: Path, looks: Looks) -> str:
    """Write reward and gold score against the distance to the reference, with the fitted law and its meaning.

    Args:
        stages: The stages that trained on rewards.
        folder: Where the plots go.
        looks: Of the runs.

    Returns:
        HTML.
    """
    figures: list[str] = []
    rows: list[tuple[object, ...]] = []
    for part, title in (("training", "Rollouts"), ("evaluation", "Held-out prompts")):
        curves = [(stage.name, curve) for stage in stages if (curve := _curve(stage, part)) is not None]
        if not any(curve["points"] for _, curve in curves):
            continue
        alt = (
            f"{title}: reward and gold score against the square root of the KL to the reference, with the fitted law."
        )
        plot = partial(plot_frontier, curves=curves, looks=looks)
        svg = draw(f"frontier-{part}", alt, plot, folder / f"frontier-{part}.png")
        caption = "Points are steps, curves the fitted law. A gold score that bends down: more KL does harm."
        figures.append(figure(title, svg, caption))
        rows += [
            (named(name, looks.get(name)), f"{title}: {score}", *_row(fit, score, curve["points"]))
            for name, curve in curves
            for score, fit in curve["fits"].items()
        ]
    if len(ends := _ends(stages)) > 2:
        alt = "Reward and gold score of the policies against the square root of their KL to the reference."
        plot = partial(plot_frontier, curves=ends, looks={**looks, "reference": REFERENCE_LOOK})
        svg = draw("frontier-ends", alt, plot, folder / "frontier-ends.png")
        figures.append(figure("The policies at their ends", svg, _ENDS))
    if not figures:
        return note("There is no frontier: no KL was logged beside a score.")
    return grid(figures) + (_explained(rows) if rows else "")


def _ends(stages: Sequence[Stage]) -> list[tuple[str, dict[str, Any]]]:
    """The policies of several runs on held-out prompts, a point for each, and their reference at the distance 0."""
    sides: list[tuple[str, Any]] = [(stage.name, stage.record("evaluation").get("policy")) for stage in stages]
    references = [stage.record("evaluation").get("reference") for stage in stages]
    sides = [("reference", {**side, "kl": 0.0}) for side in references[:1] if isinstance(side, dict)] + sides
    points = [(name, {**side, "step": 0}) for name, side in sides if isinstance(side, dict)]
    scores = {"reward": "reward_score", "gold": "gold_score"}
    curves = [(name, frontier([point], "kl", scores)) for name, point in points]
    return [(name, curve) for name, curve in curves if curve["points"]]


def _row(fit: Mapping[str, Any], score: str, points: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    own = [row for row in points if finite(row.get("distance")) and finite(row.get(score))]
    furthest = max((row["distance"] for row in own), default=None)
    values = [row[score] for row in own]
    numbers = (fit.get(key) for key in ("start", "alpha", "beta", "peak", "peak_score", "residual"))
    start, alpha, beta, peak, top, residual = map(shown, numbers)
    warnings = []
    if finite(fit.get("peak")) and furthest is not None and fit["peak"] > furthest:
        warnings.append("the peak is beyond the run: a guess")
    if finite(fit.get("residual")) and values and fit["residual"] > _MOST_RESIDUAL * (max(values) - min(values)):
        warnings.append("the curve misses the points")
    return start, alpha, beta, peak, top, shown(furthest), residual, "; ".join(warnings)


def _explained(rows: Sequence[Sequence[object]]) -> str:
    """The table of the fits, and what each number means."""
    header = ("", "of", "start", "alpha", "beta", "peak at d", "score there", "furthest d", "residual", "caution")
    meanings = "".join(f"<dt>{clean(name)}</dt><dd>{clean(meaning)}</dd>" for name, meaning in _NUMBERS.items())
    return f"<h3>The law of over-optimisation</h3>{_LAW}{table(header, rows)}<dl>{meanings}</dl>{note(_DISTRUST)}"


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
    gold = gold_metric(stage)
    return frontier(stage.history, "kl", {"reward": "reward"} | ({} if gold is None else {"gold": gold}))
