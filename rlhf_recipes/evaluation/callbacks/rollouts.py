"""What the alarm shows for its reasons: suspicious completions of the last rollout, and what many of them say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trl import GRPOTrainer, RLOOTrainer

from rlhf_recipes.evaluation.evidence import most_suspicious
from rlhf_recipes.evaluation.texts import top_ngrams
from rlhf_recipes.ppo._trl import last_rollout

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
    ids = tokenizer([_said(completion) for completion in completions], add_special_tokens=False)["input_ids"]
    return [{"ngram": tokenizer.decode(ngram), "share": share} for ngram, share in top_ngrams(ids, _NGRAM)]


def _said(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return " ".join(str(message.get("content") or "") for message in completion)
