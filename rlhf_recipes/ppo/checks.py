"""What must hold before the first update, and a clear error where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.models.roles import CRITIC, POLICY, Roles, base_name
from rlhf_recipes.ppo.functional import masked_mean


def check_trainable(roles: Roles) -> None:
    """Check that exactly the policy and the critic are trained.

    Raises:
        RuntimeError: If another parameter is trainable, or the policy or the critic has none.
    """
    names = [name for name, parameter in roles.model.named_parameters() if parameter.requires_grad]
    critic = [name for name in names if f".{CRITIC}." in name]
    policy = [name for name in names if f".{POLICY}." in name]
    others = sorted(set(names) - set(critic) - set(policy))
    if others or not policy or not critic:
        raise RuntimeError(
            "Only the policy's and the critic's adapters and the critic's head must be trained. Trainable now: "
            f"{len(policy)} tensors of the policy, {len(critic)} of the critic, and {len(others)} others {others[:3]}."
        )


def check_one_base(model: nn.Module, others: Iterable[Any]) -> None:
    """Check that no second copy of the policy's base model is in memory.

    Args:
        model: The policy.
        others: Reward functions, of which some may be models. A reward model with another base is allowed.

    Raises:
        ValueError: If a reward model is a second copy of the base.
    """
    base = base_name(model)
    for other in others:
        if isinstance(other, nn.Module) and base_name(other) == base:
            raise ValueError(
                f"A reward model is loaded as a second copy of the policy's base {base!r}. Give the folder of its "
                "adapter as the reward function instead: it is then put on the base that is already in memory."
            )


def check_prompts(dataset: Any, needed: int) -> None:
    """Check that a dataset has prompts, and enough of them for one rollout.

    Args:
        dataset: The training or evaluation data.
        needed: Different prompts in one rollout. TRL drops an incomplete one, so with fewer nothing would be trained.

    Raises:
        ValueError: If it has no column `prompt`, or too few rows.
    """
    if "prompt" not in dataset.column_names:
        raise ValueError(f"The dataset needs a column 'prompt'; it has {dataset.column_names}.")
    if len(dataset) < needed:
        raise ValueError(
            f"One rollout takes {needed} different prompts, but the dataset has {len(dataset)}. Give more prompts, or "
            "lower `per_device_train_batch_size` or `gradient_accumulation_steps`, or raise `num_generations`."
        )


def check_same_distribution(logps: Tensor, other: Tensor, mask: Tensor, what: str, cause: str) -> None:
    """Check that two networks that must be the same give the same log-probabilities.

    Args:
        logps: Log-probabilities of the completion tokens in nats, shape `(B, T)`.
        other: The same from the other network, shape `(B, T)`.
        mask: 1 = counts, shape `(B, T)`.
        what: What is compared, for the message.
        cause: Where to look, for the message.

    Raises:
        RuntimeError: If they differ by more than rounding: 1e-4 nats per token in float32, 0.02 in half precision.
    """
    tolerance = 1e-4 if logps.dtype == torch.float32 and not torch.is_autocast_enabled() else 2e-2
    difference = masked_mean((logps - other).abs().detach(), mask).item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"Before the first update {what}, but the log-probabilities differ by {difference:.2g} nats per token "
            f"(allowed: {tolerance:.0e}). {cause}"
        )


def check_rewards(rewards_per_func: Tensor, names: Sequence[str]) -> None:
    """Check that every completion got a reward from at least one function.

    Args:
        rewards_per_func: Rewards, NaN where a function returned `None`, shape `(B, functions)`.
        names: Names of the functions.

    Raises:
        ValueError: If all functions returned `None` for a completion.
    """
    missing = rewards_per_func.isnan().all(dim=1).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"Every reward function ({', '.join(names)}) returned None for completion {missing[0]} and "
            f"{len(missing) - 1} more of {len(rewards_per_func)}. At least one must return a number."
        )
