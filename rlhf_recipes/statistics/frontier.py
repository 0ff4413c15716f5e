"""The frontier of a training: the score against the distance to the reference, and where more distance does harm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from rlhf_recipes.statistics.numbers import is_number

Form = Literal["rl", "best_of_n"]


@dataclass(frozen=True)
class FrontierFit:
    """A fit of the over-optimization law to a frontier.

    Attributes:
        form: `rl`: `R(d) = start + d (alpha - beta log d)`; `best_of_n`: `R(d) = start + d (alpha - beta d)`.
        start: Score at the distance 0.
        alpha: Gain per distance at the start (`rl`: at d = 1), not negative.
        beta: How fast the gain falls off, not negative; 0 if the score does not bend.
        peak: Distance at which the score is highest, `exp(alpha / beta - 1)` or `alpha / (2 beta)`; `None` if there
            is none within ten times the largest distance, about which the data says nothing.
        peak_score: The score there.
        residual: Root mean square of what the fit leaves, in units of the score.
    """

    form: Form
    start: float
    alpha: float
    beta: float
    peak: float | None
    peak_score: float | None
    residual: float


def fit_frontier(distances: ArrayLike, scores: ArrayLike, form: Form = "rl") -> FrontierFit:
    """Fit the law of over-optimization: the score as a function of the distance `d = sqrt(KL)` to the reference.

    The law is linear in its numbers, so that least squares have one solution; `alpha` and `beta` are kept from being
    negative. `start` is a free number here, because scores are not centred at the reference.

    Source: https://huggingface.co/papers/2210.10760, section 1 (the two laws) and section 3.1.

    Args:
        distances: `sqrt(KL)` in square roots of nats, shape `(N,)`, not negative.
        scores: The gold score there, shape `(N,)`.
        form: The law: for RL, or for best-of-n.

    Returns:
        The fit.

    Raises:
        ValueError: If the shapes differ, there are fewer than 4 points, a number is not finite or a distance negative,
            or the form is unknown.

    Example:
        >>> d = np.linspace(0.1, 6.0, 20)
        >>> fit = fit_frontier(d, 0.5 + d * (1.0 - 0.5 * np.log(d)))
        >>> round(fit.alpha, 6), round(fit.beta, 6), round(fit.peak, 4)  # exp(1 / 0.5 - 1)
        (1.0, 0.5, 2.7183)
    """
    if form not in get_args(Form):
        raise ValueError(f"`form` must be 'rl' or 'best_of_n', got {form!r}.")
    d, values = np.asarray(distances, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if d.shape != values.shape or d.ndim != 1 or len(d) < 4:
        raise ValueError(f"Give at least 4 distances and a score for each; got shapes {d.shape} and {values.shape}.")
    if not (np.isfinite(d).all() and np.isfinite(values).all() and (d >= 0).all()):
        raise ValueError("Distances and scores must be finite, and distances not negative. Leave out the others.")
    bend = _bend(d, form)
    # The free start may be negative, so it goes in with both signs
    features = np.stack([np.ones_like(d), -np.ones_like(d), d, -bend], axis=1)
    (up, down, alpha, beta), rest = nnls(features, values)
    peak = None
    if beta > 0:
        highest = float(np.exp(min(alpha / beta, 700.0) - 1)) if form == "rl" else float(alpha / (2 * beta))
        peak = highest if highest <= 10 * d.max() else None
    start = float(up - down)
    top = None if peak is None else float(start + alpha * peak - beta * _bend(np.array([peak]), form)[0])
    return FrontierFit(form, start, float(alpha), float(beta), peak, top, float(rest / np.sqrt(len(d))))


def _bend(d: NDArray[np.float64], form: Form) -> NDArray[np.float64]:
    bend: NDArray[np.float64] = d * np.log(np.maximum(d, 1e-300)) if form == "rl" else d**2
    return bend


def frontier(history: Iterable[Mapping[str, Any]], kl: str, scores: Mapping[str, str]) -> dict[str, Any]:
    """Read the frontier of a run from its log history.

    Args:
        history: Entries of `trainer_state.json`'s `log_history`.
        kl: Key of the KL in nats per completion. A negative estimate, at the start, counts as 0.
        scores: Keys of what is plotted against it, by name, such as `{"reward": "reward"}`.

    Returns:
        `points`: for each entry that has the KL and a score `step`, `kl`, `distance` (its root) and the scores by
        name. `fits`: for each score with at least 8 points a `FrontierFit` as a mapping.

    Example:
        >>> history = [{"step": 10, "kl": 4.0, "reward": 1.5}, {"step": 20, "loss": 0.1}]
        >>> frontier(history, "kl", {"reward": "reward"})
        {'points': [{'step': 10, 'kl': 4.0, 'distance': 2.0, 'reward': 1.5}], 'fits': {}}
    """
    points: list[dict[str, float]] = []
    for entry in history:
        values = {name: entry[key] for name, key in scores.items() if is_number(entry.get(key))}
        if values and is_number(entry.get(kl)):
            distance = float(max(entry[kl], 0.0)) ** 0.5
            points.append({"step": entry["step"], "kl": entry[kl], "distance": distance, **values})
    fits = {}
    for name in scores:
        own = [point for point in points if name in point]
        if len(own) >= 8:
            fits[name] = asdict(fit_frontier([point["distance"] for point in own], [point[name] for point in own]))
    return {"points": points, "fits": fits}
