"""Prompts, rewards and the last rollout of a trainer's engine; calls what is inside TRL."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from rlhf_recipes.data.chat_templates import with_first_space
from rlhf_recipes.data.reward_prompts import REWARD_PROMPT
from rlhf_recipes.models.images import chat_with_images, images_in


def tokenized_prompts(trainer: Any, prompts: list[Any]) -> list[list[int]]:
    """Token ids of prompts as a GRPO, RLOO or PPO trainer makes them, with its template, tools and their options."""
    prompt_ids, *_ = trainer._tokenize_prompts(prompts)
    return [list(ids) for ids in prompt_ids]


def as_scored(
    trainer: Any,
    rows: list[dict[str, Any]],
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    ended: list[bool],
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Complete what reward functions get of a rollout.

    Args:
        trainer: A GRPO, RLOO or PPO trainer.
        rows: The rows of the prompts, `B` of them.
        prompts: Their prompts, as the policy reads them.
        completions: The completions as TRL decodes them.
        completion_ids: Their token ids.
        ended: Whether each counts as finished.

    Returns:
        The rows with `prompt_ids` and `finished` (an adapter scores the very tokens that were sampled, and shows a
        model an end token only where there is one), with `reward_prompt_ids` where they have a column `reward_prompt`,
        and where there is a processor with `images`, a list of pictures each, and `pixels`, what networks see of them;
        and the completions as they go on from their prompts.
    """
    graded = [row[REWARD_PROMPT] for row in rows] if REWARD_PROMPT in rows[0] else None
    columns: dict[str, Any] = {"finished": ended}
    if getattr(trainer, "image_reader", None) is not None:
        columns["images"] = list(map(images_in, prompts))
        columns["pixels"] = [trainer.image_reader.pixels({"images": images}) for images in columns["images"]]
        if graded is not None:
            texts_and_images = zip(graded, columns["images"], strict=True)
            graded = [chat_with_images({"prompt": chat, "images": images}) for chat, images in texts_and_images]
    columns["prompt_ids"] = tokenized_prompts(trainer, prompts)
    if graded is not None:
        columns["reward_prompt_ids"] = tokenized_prompts(trainer, graded)
    more = zip(*columns.values(), strict=True)
    texts = zip(prompts, completions, completion_ids, strict=True)
    return (
        [{**row, **dict(zip(columns, values, strict=True))} for row, values in zip(rows, more, strict=True)],
        [with_first_space(trainer.processing_class, *text) for text in texts],
    )


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
