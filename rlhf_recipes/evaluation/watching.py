"""The hooks that watch a training on rewards, as the arguments of its stage ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_recipes.evaluation.callbacks import FrontierTracker, PolicyEvaluation, RewardHackingAlarm
from rlhf_recipes.evaluation.hacking_signs import AlarmLimits

if TYPE_CHECKING:
    from datasets import Dataset

    from rlhf_recipes.ppo.arguments import PolicyArguments


def watch_training(trainer: Any, rows: Dataset, policy_args: PolicyArguments, gold: str | None = None) -> None:
    """Watch how the score grows with the KL and, as the arguments say, held-out prompts and signs of a hacked reward.

    Args:
        trainer: A PPO, GRPO or RLOO trainer that has not started.
        rows: Held-out rows with a column `prompt`.
        policy_args: `evaluation_steps` adds a `PolicyEvaluation`; `alarm` and `alarm_kl_budget` set a
            `RewardHackingAlarm`. A `FrontierTracker` is always there.
        gold: Name of the reward function that measures the truth, if there is one.
    """
    if policy_args.evaluation_steps is not None:
        trainer.add_callback(PolicyEvaluation(trainer, rows, policy_args.evaluation_steps, gold=gold, at_end=False))
    trainer.add_callback(FrontierTracker(trainer, gold=gold))
    if policy_args.alarm != "off":
        limits = AlarmLimits(kl_budget=policy_args.alarm_kl_budget)
        trainer.add_callback(RewardHackingAlarm(trainer, gold=gold, action=policy_args.alarm, limits=limits))
