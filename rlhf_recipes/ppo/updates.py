"""Control of updates: early stop of a rollout's epochs, dropped minibatches, warm-up of the critic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlhf_recipes.ppo.config import PPOConfig


class UpdateControl:
    """Sum up the micro-batches of an optimizer step, over all processes, and decide about it.

    Args:
        args: `target_kl` (nats per token, mean over the tokens of a step), `ratio_threshold`, the critic's
            warm-up, and TRL's adaptive entropy.
        accelerator: Adds up the processes.

    Attributes:
        stopped: Whether the rest of this rollout's updates is left out.
        warming_up: Whether only the critic is trained.
        entropy_coef: Weight of the entropy bonus in the next step.
        made: Whether the update of the last step that was decided about is made.
    """

    def __init__(self, args: PPOConfig, accelerator: Accelerator) -> None:
        self._args = args
        self._accelerator = accelerator
        self._sums: Tensor | None = None
        self._adapted_coef = args.entropy_coef
        self.entropy_coef = 0.0 if args.use_adaptive_entropy else args.entropy_coef
        self.stopped, self.made = False, True
        self.warming_up = args.critic_warmup_steps > 0

    def begin_rollout(self, explained_variance: float, step: int) -> None:
        """Start on a new rollout.

        Args:
            explained_variance: The critic's, on this rollout, before it is trained on it.
            step: Optimizer steps so far.
        """
        enough = self._args.critic_warmup_explained_variance
        self.stopped = False
        if step >= self._args.critic_warmup_steps or (enough is not None and explained_variance >= enough):
            self.warming_up = False

    def record(self, log_ratio: Tensor, entropies: Tensor, mask: Tensor) -> None:
        """Add a micro-batch: log-ratios of new to old policy and entropies in nats, and the mask, each `(B, T)`."""
        counts = mask.bool()
        log_ratio, entropies = log_ratio.detach()[counts].double(), entropies.detach()[counts].double()
        sums = torch.stack(
            [0.5 * log_ratio.square().sum(), log_ratio.exp().sum(), entropies.sum(), counts.sum().double()]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def decide(self) -> None:
        """Decide whether the update of the micro-batches since the last call is made, and adapt the entropy bonus."""
        assert self._sums is not None
        total: Tensor = self._accelerator.reduce(self._sums, reduction="sum")
        self._sums = None
        approx_kl, ratio, entropy = (total[:3] / total[3].clamp(min=1)).tolist()
        self._adapt_entropy(entropy)
        if self._args.target_kl is not None and approx_kl > self._args.target_kl:
            self.stopped = True
        too_far = self._args.ratio_threshold is not None and ratio > self._args.ratio_threshold
        self.made = not (self.stopped or too_far)

    def _adapt_entropy(self, entropy: float) -> None:
        # As TRL's GRPO does it (Skywork-OR1, https://huggingface.co/papers/2505.22312): the weight moves by a fixed
        # step towards the target, and acts only while the entropy is at or below it.
        args = self._args
        if not args.use_adaptive_entropy:
            return
        low = entropy <= args.entropy_target
        moved = self._adapted_coef + (args.entropy_coef_delta if low else -args.entropy_coef_delta)
        self._adapted_coef = min(max(moved, args.entropy_coef_min), args.entropy_coef_max)
        self.entropy_coef = self._adapted_coef if low else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, at the end of an optimizer step."""
        return {
            "stopped": self.stopped,
            "warming_up": self.warming_up,
            "adapted_coef": self._adapted_coef,
            "entropy_coef": self.entropy_coef,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.stopped, self.warming_up = state["stopped"], state["warming_up"]
        if self._args.use_adaptive_entropy:  # else it is what the configuration says
            self._adapted_coef, self.entropy_coef = state["adapted_coef"], state["entropy_coef"]
