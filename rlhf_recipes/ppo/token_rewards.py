"""Make one reward per token of the scores of a rollout: transforms, placement, potential.

`B` completions, `T` completion tokens. A rollout's rewards lie on its tokens before the KL penalty is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_recipes.ppo.checks import check_on_tokens, check_per_token
from rlhf_recipes.ppo.functional import estimate_advantages, length_adaptive_lambda
from rlhf_recipes.ppo.setup import configured_transforms
from rlhf_recipes.shaping import (
    Completions,
    ScoreTransform,
    apply_transforms,
    place_scores,
    potential_shaping,
)

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.rewards.record import RewardRecord

Placement = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scored:
    """What the reward functions said about a rollout.

    Attributes:
        scores: Weighted sum of all rewards of a completion, those per token included, in reward units, shape `(B,)`.
        token_rewards: Weighted sum of the rewards that were given per token, shape `(B, T)`, or `None`.
        attention: The reward adapter's attention over the completion, shape `(B, T)`, or `None`.
        potentials: Potential of the text before each token, shape `(B, T)`, or `None`.
    """

    scores: Tensor
    token_rewards: Tensor | None = None
    attention: Tensor | None = None
    potentials: Tensor | None = None

    @classmethod
    def from_record(cls, record: RewardRecord, weights: Mapping[str, float], mask: Tensor, args: PPOConfig) -> Scored:
        """Pad what the reward functions recorded to the shape of the completions.

        Args:
            record: The record of the rollout.
            weights: The weight of each reward function by its name.
            mask: 1 where a token counts, shape `(B, T)`.
            args: The configuration.

        Raises:
            ValueError: If rewards were given per token, and completions are taken as a whole or cut.
        """
        token_rewards = None
        for name, rows in record.token_rewards.items():
            check_per_token(args, name)
            weighted = weights[name] * pad_rows(rows, mask)
            token_rewards = weighted if token_rewards is None else token_rewards + weighted
        attention, potentials = (
            None if rows is None else pad_rows(rows, mask) for rows in (record.attention, record.potentials)
        )
        return cls(record.scores, token_rewards, attention, potentials)


class TokenRewards:
    """Transform scores and place them on tokens, as the configuration says.

    Args:
        args: The configuration.
        placement: Callable from scores `(B,)` and mask `(B, T)` to token rewards `(B, T)`, in place of
            `args.reward_placement`.
        transforms: Further score transforms, after those of the configuration.
    """

    def __init__(
        self, args: PPOConfig, placement: Placement | None = None, transforms: Sequence[ScoreTransform] = ()
    ) -> None:
        self._args, self._placement = args, placement
        for index, transform in enumerate(transforms):
            if not callable(transform) or not hasattr(transform, "name"):
                raise TypeError(
                    f"`score_transforms[{index}]` is {transform!r}. Give a callable from scores and completions to "
                    "scores, with a `name` for the logs (`rlhf_recipes.shaping.ScoreTransform`)."
                )
        self.transforms = [*configured_transforms(args), *transforms]

    def __call__(
        self, scored: Scored, mask: Tensor, completions: Completions
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Make token rewards, still without the KL penalty.

        Args:
            scored: What the reward functions said.
            mask: 1 where a token counts, shape `(B, T)`.
            completions: What the transforms know of the completions.

        Returns:
            Token rewards `(B, T)`; the transformed scores `(B,)`; and what each transform added, `(B,)` by its name.
        """
        scores, contributions = apply_transforms(scored.scores, completions, self.transforms)
        # What was given per token stays where it is; the rest of the score is placed.
        per_token = torch.zeros_like(mask, dtype=scores.dtype)
        if scored.token_rewards is not None:
            per_token = scored.token_rewards.masked_fill(~mask.bool(), 0.0)
        rewards = per_token + self._place(scores - per_token.sum(dim=1), scored.attention, mask)
        if scored.potentials is not None:
            rewards = rewards + potential_shaping(scored.potentials, mask, self._args.gamma)
        return rewards, scores, contributions

    def _place(self, scores: Tensor, attention: Tensor | None, mask: Tensor) -> Tensor:
        args = self._args
        if self._placement is None:
            return place_scores(
                scores, mask, args.reward_placement, args.placement_gamma, attention, args.attention_weight
            )
        placed = self._placement(scores, mask)
        check_on_tokens(placed, mask)
        return placed.detach().masked_fill(~mask.bool(), 0.0)


def configured_advantages(
    args: PPOConfig, token_rewards: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw advantages, returns, and the mask of the values that the critic learns, as the configuration asks for them.

    Args:
        args: The estimator, and its parameters.
        token_rewards: Rewards, KL penalty included, shape `(B, T)`.
        values: The critic's values before each token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
    """
    lam = args.gae_lambda if args.gae_lambda_alpha is None else length_adaptive_lambda(mask, args.gae_lambda_alpha)
    return estimate_advantages(
        args.advantage_estimator, token_rewards, values, mask, args.gamma, lam, args.critic_lambda
    )


def pad_rows(rows: Sequence[Sequence[float] | Tensor | None], mask: Tensor) -> Tensor:
    """Pad one list of numbers per completion on the right to the shape of `mask`; `None` becomes zeros."""
    padded = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for index, row in enumerate(rows):
        if row is not None:
            values = torch.as_tensor(row, dtype=torch.float32, device=mask.device)
            padded[index, : len(values)] = values
    return padded
