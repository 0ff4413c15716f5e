"""The loss of one micro-batch, and its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlhf_recipes.ppo.functional import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    masked_mean,
    total_loss,
)
from rlhf_recipes.ppo.metrics import LossMetrics
from rlhf_recipes.shaping import kl_estimate

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.passes import PolicyPass
    from rlhf_recipes.ppo.rollout import Rollout


def count_items(mask: Tensor, args: PPOConfig) -> Tensor:
    """Number of items in a mean over a batch: tokens, or completions; with a fixed length those without tokens too."""
    if args.loss_aggregation == "token":
        return mask.sum()
    return mask.any(dim=1).sum() if args.loss_aggregation == "sequence" else mask.new_tensor(len(mask))


def share_of_step(batch: Rollout, args: PPOConfig, accumulated: int, processes: int) -> Tensor:
    """Weight of a micro-batch's means, so that they add up to the mean over the items of an optimizer step.

    Args:
        batch: The micro-batch.
        args: How the loss is averaged, and the micro-batches of a rollout.
        accumulated: Micro-batches of the step on each process.
        processes: Processes, over which DDP averages.
    """
    step = batch.items_in_rollout * accumulated / args.micro_batches_per_rollout
    share: Tensor = count_items(batch.completion_mask, args) * processes / step.clamp(min=1.0)
    return share


def policy_loss(
    new: PolicyPass,
    batch: Rollout,
    args: PPOConfig,
    kl_coef: float,
    entropy_coef: float,
    exact_kl: Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """Compute the policy's terms of the loss of a micro-batch, `-(L_CLIP - beta L_KL + c2 L_entropy)`.

    `critic_loss` is the remaining one.

    Args:
        new: What the policy says as it is now, with gradients.
        batch: The micro-batch.
        args: Clips, weights and how to average.
        kl_coef: Weight of the KL in the loss: 0 where the penalty is part of the rewards.
        entropy_coef: Weight of the entropy bonus.
        exact_kl: KL per token in nats, shape `(B, T)`, in the place of an estimate from the samples.

    Returns:
        The loss, a scalar, and the metrics.
    """
    mask, old_logps = batch.completion_mask, batch.old_per_token_logps
    average: Any = {"aggregation": args.loss_aggregation, "length": args.max_completion_length}
    clipped_loss, clipped = clipped_policy_loss(
        new.logps,
        old_logps,
        batch.advantages,
        mask,
        args.epsilon,
        args.epsilon if args.epsilon_high is None else args.epsilon_high,
        dual_clip=args.delta,
        level=args.importance_sampling_level,
        **average,
    )
    entropy = aggregate(new.entropies, mask, args.loss_aggregation, args.max_completion_length)
    kl = new.logps.new_zeros(())
    if kl_coef:
        per_token = kl_per_token(new.logps, batch, args) if exact_kl is None else exact_kl
        kl = aggregate(per_token, mask, args.loss_aggregation, args.max_completion_length)
    none = kl.new_zeros(())  # the critic's term may have to wait until the policy's activations are gone
    loss = total_loss(clipped_loss, none, kl, entropy, vf_coef=0.0, kl_coef=kl_coef, entropy_coef=entropy_coef)
    log_ratio = (new.logps - old_logps).detach().masked_fill(~mask.bool(), 0.0)
    items, tokens = count_items(mask, args), mask.sum()
    means = {
        "entropy": (masked_mean(new.entropies, mask), tokens),
        "ppo/policy_loss": (clipped_loss, items),
        "ppo/clip_fraction": (clipped, tokens),
        "ppo/approx_kl": (0.5 * masked_mean(log_ratio**2, mask), tokens),
        "ppo/ratio_mean": (masked_mean(log_ratio.exp(), mask), tokens),
    }
    if kl_coef:
        means["ppo/kl_loss"] = (kl, items)
    return loss, LossMetrics.of(means, {"ppo/ratio_max": log_ratio.max().exp()})


def critic_loss(values: Tensor, batch: Rollout, args: PPOConfig) -> tuple[Tensor, LossMetrics]:
    """Compute the critic's term of the loss of a micro-batch, `c1 L_VF`.

    Args:
        values: The values before each token as they are now, in reward units, shape `(B, T)`.
        batch: The micro-batch.
        args: The clip, the weight, and how to average.

    Returns:
        The loss, a scalar, and the metrics.
    """
    mask = batch.value_mask
    average: Any = {"aggregation": args.loss_aggregation, "length": args.max_completion_length}
    loss, clipped = clipped_value_loss(values, batch.old_values, batch.returns, mask, args.value_clip, **average)
    means = {"critic/value_loss": (loss, count_items(mask, args)), "critic/clip_fraction": (clipped, mask.sum())}
    return args.vf_coef * loss, LossMetrics.of(means, {})


def kl_per_token(logps: Tensor, batch: Rollout, args: PPOConfig) -> Tensor:
    """KL of the loss at each token, `(B, T)`, with a gradient that is the KL's over the old policy's samples.

    Towards the reference it is KL(policy || reference), and the samples are the old policy's: the estimate is weighted
    with the ratio of new to old policy, through which the gradient of k1 and of k3 is the KL's (without it, that of k1
    would be 0 on average, and that of k3 biased). The gradient of k2 is the KL's without the ratio, while the samples
    are the policy's. Towards the old policy it is KL(old || policy), the penalty of
    https://huggingface.co/papers/1707.06347, equation 8, whose samples they are.
    """
    old_logps, estimator = batch.old_per_token_logps, args.kl_estimator
    assert estimator != "full"  # it is computed from states, not estimated
    if args.kl_anchor == "old":
        return kl_estimate(old_logps, logps, estimator)
    if estimator == "k2":
        return kl_estimate(logps, batch.ref_per_token_logps, estimator)
    ratio = (logps - old_logps).masked_fill(~batch.completion_mask.bool(), 0.0).exp()
    return ratio * kl_estimate(logps, batch.ref_per_token_logps, estimator)
