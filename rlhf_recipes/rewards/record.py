"""Record of what reward functions return for a rollout beside one number per completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COLUMN = "reward_record"  # of the rows that TRL hands to the reward functions


@dataclass(repr=False)
class RewardRecord:
    """The rewards of one rollout. Each row carries it to the reward functions, which fill it in.

    TRL takes one number per completion from a reward function, and keeps none.

    Attributes:
        scores: Weighted sum of all rewards of a completion, those per token included, in reward units, shape `(B,)`.
        rewards: The rewards by each function, nan where it gave none, shape `(B, functions)`.
        completion_ids: The sampled token ids of each completion, with the end token where it was sampled.
        finished: Whether each completion counts as finished.
        token_rewards: By reward function, for each completion one reward per token, or `None` where it gave none.
        attention: The reward adapter's attention to each completion's tokens, where the placement asks for it.
        potentials: For each completion the potential of the text before each token, where the run has potentials.
    """

    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    rewards: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    completion_ids: list[list[int]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    token_rewards: dict[str, list[Any]] = field(default_factory=dict)
    attention: list[Tensor] | None = None
    potentials: list[Any] | None = None
