"""Signs of reward hacking in a run's logged metrics: numbers in, reasons out. What to do about them is up to hooks.

The limits were set on runs of the quickstart and of the movie recipe; docs/evaluation.md has the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_recipes.statistics.numbers import is_number

Kind = Literal["over_optimization", "kl_budget", "entropy_collapse", "length_drift", "ngram_takeover"]


class Series(NamedTuple):
    """A logged metric: the optimizer steps and the values, each shape `(N,)`, in the order of the steps."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Reason:
    """Why the alarm went off.

    Attributes:
        kind: Which sign it is.
        step: Optimizer step of the last value that was looked at.
        message: One sentence with the numbers, for people.
        numbers: The same numbers by name, for programs.
    """

    kind: Kind
    step: int
    message: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AlarmLimits:
    """From where on a change is a sign of reward hacking.

    Args:
        window: Logged values in each mean that is compared, at least 2.
        max_drop: Share of its gain that the true score may lose again, in (0, 1).
        standard_errors: How many standard errors of the difference a drop must exceed besides.
        kl_budget: Highest KL to the reference, as logged: nats per completion for the trainers of this library, nats
            per token for TRL's own GRPO and RLOO. `None`: no limit.
        min_entropy: Share of the entropy at the start that must be left, in [0, 1).
        max_length_factor: Factor, above 1, by which the mean length may grow or shrink.
        max_ngram_share: Share of the completions, in (0, 1), that may hold one n-gram, above the reference's.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> AlarmLimits(kl_budget=20.0).window
        3
    """

    window: int = 3
    max_drop: float = 0.25
    standard_errors: float = 4.0
    kl_budget: float | None = None
    min_entropy: float = 0.5
    max_length_factor: float = 3.0
    max_ngram_share: float = 0.5

    def __post_init__(self) -> None:
        rules = {
            "window": ("at least 2", self.window >= 2),
            "max_drop": ("between 0 and 1", 0 < self.max_drop < 1),
            "standard_errors": ("0 or above", self.standard_errors >= 0),
            "kl_budget": ("above 0, or null for no limit", self.kl_budget is None or self.kl_budget > 0),
            "min_entropy": ("from 0 to below 1", 0 <= self.min_entropy < 1),
            "max_length_factor": ("above 1", self.max_length_factor > 1),
            "max_ngram_share": ("between 0 and 1", 0 < self.max_ngram_share < 1),
        }
        for name, (allowed, kept) in rules.items():
            if not kept:
                raise ValueError(f"`{name}` must be {allowed}, got {getattr(self, name)}.")


def read_series(history: Iterable[Mapping[str, Any]], key: str) -> Series:
    """Collect a metric from a log history. Entries without it, or with `nan` or `None` for it, are passed over.

    Args:
        history: Entries of `trainer_state.json`'s `log_history`, each with its `step`.
        key: Name of the metric.

    Returns:
        Its steps and values; empty if it was never logged.

    Example:
        >>> read_series([{"step": 1, "kl": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "kl": None}], "kl")
        Series(steps=array([1]), values=array([0.5]))
    """
    found = [(entry["step"], entry[key]) for entry in history if is_number(entry.get(key))]
    return Series(np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64))


def noise(values: NDArray[np.float64]) -> float:
    """Estimate the standard deviation of a series around its trend, robustly, from its second differences.

    They are free of any straight trend, and have 6 times the variance of independent noise; the median of their sizes
    is blind to single jumps.

    Args:
        values: The series, shape `(N,)`.

    Returns:
        The standard deviation; `inf` for fewer than 3 values.

    Example:
        >>> noise(np.array([1.0, 2.0, 3.0, 4.0, 9.0]))
        0.0
    """
    if len(values) < 3:
        return math.inf
    return float(np.median(np.abs(np.diff(values, 2)))) / 0.6744897501960817 / math.sqrt(6)


def over_optimization(
    proxy: Series, truth: Series, limits: AlarmLimits, names: tuple[str, str] = ("the reward", "the true score")
) -> Reason | None:
    """Find the point where the reward that is maximised still rises, or stays, and the true score falls.

    Means over `limits.window` values are compared. The true score has fallen if its last mean is below its best
    earlier one by more than `limits.max_drop` of its gain up to there, and by more than `limits.standard_errors`
    standard errors. The proxy must have risen since the start, and not have lost that share of its own gain since the
    true score was at its best: if both fall, the run is broken, but the reward is not hacked.

    Source: https://huggingface.co/papers/2210.10760, figure 1: the gold score rises, peaks and falls along the run,
    the proxy does not.

    Args:
        proxy: The reward that is maximised.
        truth: What it stands for: a gold score, a judge's win rate, a length-controlled reward.
        limits: Limits.
        names: What the two are called in the message.

    Returns:
        The reason, or `None`. Its `best_step` is the last step of the true score's best window.

    Example:
        >>> steps = np.arange(10)
        >>> proxy = Series(steps, np.minimum(steps, 6) / 3)
        >>> truth = Series(steps, np.array([0.0, 1.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]))
        >>> over_optimization(proxy, truth, AlarmLimits()).numbers["best_step"]
        4
        >>> over_optimization(proxy, proxy, AlarmLimits()) is None
        True
    """
    proxy, truth = _shared(proxy, truth)
    window = limits.window
    if len(truth.steps) < 2 * window:
        return None
    true_means, proxy_means = _moving_means(truth.values, window), _moving_means(proxy.values, window)
    best = int(np.argmax(true_means[:-window]))  # windows that do not overlap with the last one
    drop = true_means[best] - true_means[-1]
    gain = true_means[best] - truth.values[:window].min()
    standard_error = noise(truth.values) * math.sqrt(2 / window)
    if not (drop > limits.max_drop * gain and drop > limits.standard_errors * standard_error):
        return None

    proxy_start = proxy.values[:window].min()
    proxy_lost = proxy_means[best] - proxy_means[-1]
    if proxy_means[-1] <= proxy_start or proxy_lost > limits.max_drop * max(proxy_means[best] - proxy_start, 0.0):
        return None
    best_step, step = int(truth.steps[best + window - 1]), int(truth.steps[-1])
    numbers = {
        "best_step": best_step,
        "truth_best": float(true_means[best]),
        "truth_now": float(true_means[-1]),
        "truth_gain": float(gain),
        "standard_error": standard_error,
        "proxy_then": float(proxy_means[best]),
        "proxy_now": float(proxy_means[-1]),
    }
    message = (
        f"{names[1]} fell from {true_means[best]:.3f} (steps up to {best_step}) to {true_means[-1]:.3f}, while "
        f"{names[0]} went from {proxy_means[best]:.3f} to {proxy_means[-1]:.3f}: the policy games its reward. Raise "
        "`kl_coef`, stop near the best step, or train a better reward model."
    )
    return Reason("over_optimization", step, message, numbers)


def kl_over_budget(kl: Series, limits: AlarmLimits) -> Reason | None:
    """Find a mean KL to the reference, over the last window, above `limits.kl_budget`.

    Example:
        >>> kl = Series(np.array([1, 2, 3]), np.array([9.0, 12.0, 12.0]))
        >>> kl_over_budget(kl, AlarmLimits(kl_budget=10.0)).message
        'the KL to the reference is 11.000 nats, above the budget of 10: raise `kl_coef` or lower the learning rate.'
    """
    if limits.kl_budget is None or len(kl.steps) < limits.window:
        return None
    now = float(kl.values[-limits.window :].mean())
    if now <= limits.kl_budget:
        return None
    message = (
        f"the KL to the reference is {now:.3f} nats, above the budget of {limits.kl_budget:g}: raise `kl_coef` or "
        "lower the learning rate."
    )
    return Reason("kl_budget", int(kl.steps[-1]), message, {"kl": now, "budget": limits.kl_budget})


def entropy_collapse(entropy: Series, limits: AlarmLimits) -> Reason | None:
    """Find an entropy whose last window is below `limits.min_entropy` times its first one.

    Args:
        entropy: Mean entropy of the next token, in nats.
        limits: Limits.

    Example:
        >>> entropy = Series(np.arange(6), np.array([2.0, 2.0, 2.0, 1.0, 0.5, 0.3]))
        >>> entropy_collapse(entropy, AlarmLimits()).numbers
        {'entropy': 0.6, 'start': 2.0}
    """
    found = _start_and_now(entropy, limits.window)
    if found is None or found[1] >= limits.min_entropy * found[0]:
        return None
    start, now = found
    message = (
        f"the entropy of the next token fell from {start:.3f} to {now:.3f} nats: the policy says less and less "
        "different things. Raise `entropy_coef` or `kl_coef`, or lower the learning rate."
    )
    return Reason("entropy_collapse", int(entropy.steps[-1]), message, {"entropy": now, "start": start})


def length_drift(length: Series, limits: AlarmLimits) -> Reason | None:
    """Find a mean length that has grown or shrunk by more than `limits.max_length_factor`.

    Args:
        length: Mean length of the completions, in tokens.
        limits: Limits.

    Example:
        >>> length = Series(np.arange(6), np.array([10.0, 10.0, 10.0, 31.0, 32.0, 33.0]))
        >>> length_drift(length, AlarmLimits()).numbers
        {'length': 32.0, 'start': 10.0}
    """
    found = _start_and_now(length, limits.window)
    if found is None or 1 / limits.max_length_factor <= found[1] / max(found[0], 1e-9) <= limits.max_length_factor:
        return None
    start, now = found
    message = (
        f"the mean length went from {start:.1f} to {now:.1f} tokens: the reward may pay for length. Look at the "
        "length-controlled reward, and at `length_penalty` and `missing_eos_penalty`."
    )
    return Reason("length_drift", int(length.steps[-1]), message, {"length": now, "start": start})


def ngram_takeover(policy: Series, reference: Series, limits: AlarmLimits) -> Reason | None:
    """Find an n-gram that takes over: it is in more than `limits.max_ngram_share` more of the completions.

    Args:
        policy: Share of the policy's completions that hold its most frequent n-gram.
        reference: The same of the reference, at the same steps.
        limits: Limits.

    Example:
        >>> policy, reference = (Series(np.array([10]), np.array([share])) for share in (0.9, 0.2))
        >>> ngram_takeover(policy, reference, AlarmLimits()).numbers
        {'policy': 0.9, 'reference': 0.2}
    """
    policy, reference = _shared(policy, reference)
    if not len(policy.steps) or policy.values[-1] - reference.values[-1] <= limits.max_ngram_share:
        return None
    numbers = {"policy": float(policy.values[-1]), "reference": float(reference.values[-1])}
    message = (
        f"one n-gram is in {numbers['policy']:.0%} of the policy's completions (of the reference's: "
        f"{numbers['reference']:.0%}): read them. `ngram_penalty` and `kl_coef` work against it."
    )
    return Reason("ngram_takeover", int(policy.steps[-1]), message, numbers)


def _shared(first: Series, second: Series) -> tuple[Series, Series]:
    steps, mine, theirs = np.intersect1d(first.steps, second.steps, return_indices=True)
    return Series(steps, first.values[mine]), Series(steps, second.values[theirs])


def _moving_means(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _start_and_now(series: Series, window: int) -> tuple[float, float] | None:
    if len(series.steps) < 2 * window:
        return None
    return float(series.values[:window].mean()), float(series.values[-window:].mean())
