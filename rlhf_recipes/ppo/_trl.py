"""Prompts, rewards and the last rollout of a trainer's engine, for evaluations; calls what is inside TRL."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from rlhf_recipes.data.reward_prompts import REWARD_PROMPT
from rlhf_recipes.models.images import images_in
from rlhf_recipes.rewards.encoding import which_ended


def tokenized_prompts(trainer: Any, prompts: list[Any]) -> list[list[int]]:
    """Token ids of prompts as a GRPO, RLOO or PPO trainer makes them, with its template, tools and their options."""
    prompt_ids, *_ = trainer._tokenize_prompts(prompts)
    return [list(ids) for ids in prompt_ids]


def rows_for_rewards(
    trainer: Any, rows: list[dict[str, Any]], prompts: list[Any], completion_ids: list[list[int]]
) -> list[dict[str, Any]]:
    """Give rows what reward functions get besides: token ids of the prompts, and which completions ended.

    Args:
        trainer: A PPO trainer.
        rows: Values by column.
        prompts: Their prompts, as the policy reads them.
        completion_ids: Token ids of their completions.

    Returns:
        The rows with `prompt_ids`, `finished` and, where they have a column `reward_prompt`, `reward_prompt_ids`; with
        a processor also `images`, a list of pictures each.
    """
    ended = which_ended(len(rows), completion_ids, trainer.eos_token_ids, None)
    columns: dict[str, Any] = {"prompt_ids": tokenized_prompts(trainer, prompts), "finished": ended}
    if trainer.image_reader is not None:
        columns["images"] = list(map(images_in, prompts))
    if REWARD_PROMPT in rows[0]:
        columns["reward_prompt_ids"] = tokenized_prompts(trainer, [row[REWARD_PROMPT] for row in rows])
    more = zip(*columns.values(), strict=True)
    return [{**row, **dict(zip(columns, values, strict=True))} for row, values in zip(rows, more, strict=True)]


def rewards(
    trainer: GRPOTrainer, rows: list[dict[str, Any]], completions: list[Any], completion_ids: list[list[int]]
) -> Tensor:
    """Call all reward functions of a trainer: rewards of all processes, shape `(processes * B, functions)`."""
    prompts = [row["prompt"] for row in rows]
    rewards_per_func: Tensor = trainer._calculate_rewards(rows, prompts, completions, completion_ids)
    # What a function logs of these completions is not of the next rollout, to which TRL would add it
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()
    return rewards_per_func


def last_rollout(trainer: Any) -> list[dict[str, Any]]:
    """What a GRPO, RLOO or PPO trainer keeps of its last rollout for its table of completions, from all processes.

    Returns:
        For each completion `prompt`, `completion` and `scores`, which has the score by each reward function (nan where
        it gave none); at most as many as a rollout has, the newest.
    """
    logs = trainer._logs
    return [
        {"prompt": prompt, "completion": completion, "scores": dict(zip(logs["rewards"], scores, strict=True))}
        for prompt, completion, *scores in zip(
            logs["prompt"], logs["completion"], *logs["rewards"].values(), strict=True
        )
    ]
