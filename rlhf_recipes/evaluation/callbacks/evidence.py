"""What the alarm shows for its reasons: suspicious completions of the last rollout, and what many of them say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from trl import GRPOTrainer, RLOOTrainer

from rlhf_recipes.messages import contents
from rlhf_recipes.ppo._trl import last_rollout
from rlhf_recipes.statistics.texts import top_ngrams

Row = dict[str, Any]

_NGRAM = 4


def rollout_evidence(trainer: Any, gold: str | None = None) -> tuple[list[Row], list[Row]]:
    """Look for evidence in the last rollout of a trainer.

    Args:
        trainer: A trainer that samples: `PPOTrainer`, GRPO or RLOO. Others have no rollout.
        gold: Name of the reward function that measures the truth, if there is one of this name.

    Returns:
        The most suspicious completions, each with `prompt`, `completion`, `reward` (the weighted sum) and the score by
        each reward function; and the sequences of 4 tokens that are in the most completions, each with its `ngram` as
        text and the `share` of the completions. Both empty without a rollout.
    """
    rollout = last_rollout(trainer) if isinstance(trainer, GRPOTrainer | RLOOTrainer) else []
    if not rollout:
        return [], []
    weights = dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
    for row in rollout:
        scores = [row["scores"][name] * weight for name, weight in weights.items()]
        row["reward"] = sum(score for score in scores if math.isfinite(score))
    truth = [row["scores"][gold] for row in rollout] if gold in weights else None
    chosen = [rollout[index] for index in most_suspicious([row["reward"] for row in rollout], truth)]
    samples = [
        {"prompt": row["prompt"], "completion": row["completion"], "reward": row["reward"]}
        | {f"rewards/{name}": score if math.isfinite(score) else None for name, score in row["scores"].items()}
        for row in chosen
    ]
    return samples, _ngrams(trainer, [row["completion"] for row in rollout])


def _ngrams(trainer: Any, completions: Sequence[Any]) -> list[Row]:
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    ids = tokenizer([contents(completion) for completion in completions], add_special_tokens=False)["input_ids"]
    return [{"ngram": tokenizer.decode(ngram), "share": share} for ngram, share in top_ngrams(ids, _NGRAM)]


def most_suspicious(proxy: ArrayLike, truth: ArrayLike | None = None, most: int = 10) -> list[int]:
    """Find the completions that stand higher by the reward than by the true score.

    The two scores have different units, so ranks are compared: `rank(proxy) - rank(truth)`, equal scores with their
    mean rank. Without a true score the highest rewards come first.

    Args:
        proxy: Rewards, shape `(N,)`.
        truth: True scores of the same completions, shape `(N,)`.
        most: How many to return.

    Returns:
        Indices, the most suspicious first, of equal ones the first. Completions with a score that is not finite are
        left out.

    Example:
        >>> most_suspicious([0.1, 3.0, 2.0], [0.5, -1.0, 9.0], most=1)
        [1]
        >>> most_suspicious([0.1, 3.0, 2.0])
        [1, 2, 0]
    """
    rewards = np.asarray(proxy, np.float64)
    scores = np.zeros_like(rewards) if truth is None else np.asarray(truth, np.float64)
    known = np.flatnonzero(np.isfinite(rewards) & np.isfinite(scores))
    distance = rankdata(rewards[known]) - rankdata(scores[known])
    return [int(index) for index in known[np.argsort(-distance, kind="stable")][:most]]
