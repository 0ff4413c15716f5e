"""Signs in the logs that the critic or the updates are not well: numbers in, explanations out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_recipes.evaluation.hacking_signs import read_series


@dataclass(frozen=True)
class Check:
    """One thing to look at: the mean of the last values of a metric, against a limit.

    Attributes:
        kind: Its name.
        key: The metric.
        limit: The limit.
        above: Whether it is above the limit, or below it, that is not well.
        explanation: What it means and what to do.
    """

    kind: str
    key: str
    limit: float
    above: bool
    explanation: str


CRITIC_CHECKS = (
    Check(
        "critic_explains_nothing",
        "critic/explained_variance",
        -0.1,
        False,
        "the critic predicts the returns worse than a constant would, so it adds noise to the advantages. Raise "
        "`critic_learning_rate` or `critic_warmup_steps`, or start it from the reward model (`critic_init: reward`).",
    ),
    Check(
        "critic_blind_at_the_start",
        "critic/explained_variance_start",
        -0.5,
        False,
        "the critic is far off in the first third of the completions, where it knows least. Train it alone for a "
        "while (`critic_warmup_steps`), and keep `gae_lambda` near 1 until it is better.",
    ),
    Check(
        "critic_clipped",
        "critic/clip_fraction",
        0.6,
        True,
        "most values want to move further than `value_clip` lets them. Raise it, or set it to null.",
    ),
)
TRAINING_CHECKS = (
    Check(
        "policy_clipped",
        "ppo/clip_fraction",
        0.4,
        True,
        "much of the batch is clipped, and teaches nothing more. Lower `learning_rate` or `num_iterations`.",
    ),
    Check(
        "policy_clipped",
        "clip_ratio/region_mean",
        0.4,
        True,
        "much of the batch is clipped, and teaches nothing more. Lower `learning_rate` or `num_iterations`.",
    ),
    Check(
        "large_updates",
        "ppo/approx_kl",
        0.1,
        True,
        "the policy moves far within one rollout. Lower `learning_rate` or `num_iterations`, or set `target_kl`.",
    ),
    Check(
        "extreme_ratio",
        "ppo/ratio_max",
        100.0,
        True,
        "some token became a hundred times as probable within one rollout. Set `ratio_threshold` or `epsilon_high`, "
        "or lower `learning_rate`.",
    ),
    Check(
        "updates_dropped",
        "ppo/updates_made",
        0.5,
        False,
        "most updates are left out by `target_kl` or `ratio_threshold`. Lower `learning_rate` or `num_iterations`.",
    ),
    Check(
        "all_truncated",
        "completions/clipped_ratio",
        0.9,
        True,
        "almost no completion ends by itself. Raise `max_completion_length`, or set `missing_eos_penalty`.",
    ),
)


def failed_checks(
    history: Iterable[Mapping[str, Any]], checks: Sequence[Check], window: int = 3
) -> list[tuple[Check, float]]:
    """Find the checks that fail: the mean of the last `window` values is beyond the limit.

    Args:
        history: Entries of `trainer_state.json`'s `log_history`.
        checks: What to look at. Metrics with fewer values than the window are passed over.
        window: Logged values in the mean.

    Returns:
        The checks and the means.

    Example:
        >>> history = [{"step": step, "critic/explained_variance": -0.2} for step in range(3)]
        >>> [(check.kind, round(mean, 3)) for check, mean in failed_checks(history, CRITIC_CHECKS)]
        [('critic_explains_nothing', -0.2)]
    """
    rows, failed = list(history), []
    for check in checks:
        values = read_series(rows, check.key).values
        if len(values) >= window:
            mean = float(np.mean(values[-window:]))
            if mean > check.limit if check.above else mean < check.limit:
                failed.append((check, mean))
    return failed
