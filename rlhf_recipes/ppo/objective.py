"""The loss of one micro-batch: what is minimised, and what is logged of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlhf_recipes.ppo.functional import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    masked_mean,
    total_loss,
)
from rlhf_recipes.shaping import kl_estimate

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig


@dataclass(frozen=True)
class Outputs:
    """What the trained networks say about a micro-batch, with gradients.

    Attributes:
        logps: Log-probabilities of the completion tokens in nats, shape `(B, T)`.
        entropies: Entropies of the distributions that they were drawn from, in nats, shape `(B, T)`.
        value_loss: Loss of the critic's values, a scalar.
        value_clipped: Share of the values whose clipped loss was the larger one, a scalar.
        full_kl: Exact KL per token in nats, shape `(B, T)`, where the loss needs it.
    """

    logps: Tensor
    entropies: Tensor
    value_loss: Tensor
    value_clipped: Tensor
    full_kl: Tensor | None = None


class LossMetrics(NamedTuple):
    """What is logged of a micro-batch: means, each with the number of items that it is over, and maxima."""

    means: dict[str, tuple[Tensor, Tensor]]
    maxima: dict[str, Tensor]


def count_items(mask: Tensor, args: PPOConfig) -> Tensor:
    """Number of items in a mean over a batch: tokens, or completions; with a fixed length those without tokens too."""
    if args.loss_aggregation == "token":
        return mask.sum()
    return mask.any(dim=1).sum() if args.loss_aggregation == "sequence" else mask.new_tensor(len(mask))


def ppo_loss(
    new: Outputs, batch: dict[str, Tensor], args: PPOConfig, kl_coef: float, entropy_coef: float
) -> tuple[Tensor, LossMetrics]:
    """Compute the loss of a micro-batch, `-(L_CLIP - c1 L_VF - beta L_KL + c2 L_entropy)`.

    Args:
        new: The outputs of the networks as they are now.
        batch: `completion_mask`, `value_mask`, `old_per_token_logps`, `advantages` and `ref_per_token_logps`, each
            `(B, T)`.
        args: Clips, weights and how to average.
        kl_coef: Weight of the KL in the loss: 0 where the penalty is part of the rewards.
        entropy_coef: Weight of the entropy bonus.

    Returns:
        The loss, a scalar, and the metrics.
    """
    mask, old_logps = batch["completion_mask"], batch["old_per_token_logps"]
    average: Any = {"aggregation": args.loss_aggregation, "length": args.max_completion_length}
    policy_loss, policy_clipped = clipped_policy_loss(
        new.logps,
        old_logps,
        batch["advantages"],
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
        kl = aggregate(kl_per_token(new, batch, args), mask, args.loss_aggregation, args.max_completion_length)
    loss = total_loss(
        policy_loss, new.value_loss, kl, entropy, vf_coef=args.vf_coef, kl_coef=kl_coef, entropy_coef=entropy_coef
    )
    log_ratio = (new.logps - old_logps).detach().masked_fill(~mask.bool(), 0.0)
    items, tokens, values = count_items(mask, args), mask.sum(), batch["value_mask"]
    means = {
        "entropy": (masked_mean(new.entropies, mask), tokens),
        "ppo/policy_loss": (policy_loss, items),
        "ppo/clip_fraction": (policy_clipped, tokens),
        "ppo/approx_kl": (0.5 * masked_mean(log_ratio**2, mask), tokens),
        "ppo/ratio_mean": (masked_mean(log_ratio.exp(), mask), tokens),
        "critic/value_loss": (new.value_loss, count_items(values, args)),
        "critic/clip_fraction": (new.value_clipped, values.sum()),
    }
    if kl_coef:
        means["ppo/kl_loss"] = (kl, items)
    return loss, LossMetrics(means, {"ppo/ratio_max": log_ratio.max().exp()})


def critic_loss(values: Tensor, batch: dict[str, Tensor], args: PPOConfig) -> tuple[Tensor, Tensor]:
    """Compute the loss of the critic's values before each token, in reward units, shape `(B, T)`.

    Args:
        values: The values as they are now.
        batch: `value_mask`, `old_values` and `returns`, each `(B, T)`.
        args: The clip, and how to average.

    Returns:
        The loss and the share of values whose clipped loss was the larger one, both scalars.
    """
    return clipped_value_loss(
        values,
        batch["old_values"],
        batch["returns"],
        batch["value_mask"],
        args.value_clip,
        aggregation=args.loss_aggregation,
        length=args.max_completion_length,
    )


def backward_now(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Give a scalar with the same value and the same gradient, and free what the loss kept for its backward pass.

    The gradient is computed at once and handed over whenever the result is differentiated, scaled as the result is
    then. Two networks that share no parameters so take the memory of the larger one alone.

    Args:
        loss: A scalar.
        parameters: Everything that it is to be differentiated by.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> loss = backward_now((weight**2).sum(), [weight])
        >>> (0.5 * loss).backward()
        >>> loss.item(), weight.grad.tolist()
        (10.0, [1.0, 3.0])
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    result = loss.detach()
    for parameter, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            result = result + ((parameter - parameter.detach()) * gradient).sum()
    return result


def kl_per_token(new: Outputs, batch: dict[str, Tensor], args: PPOConfig) -> Tensor:
    """KL of the loss at each token, `(B, T)`, with a gradient that is the KL's over the old policy's samples.

    Towards the reference it is KL(policy || reference), and the samples are the old policy's: the estimate is weighted
    with the ratio of new to old policy, through which the gradient of k1 and of k3 is the KL's (without it, that of k1
    would be 0 on average, and that of k3 biased). The gradient of k2 is the KL's without the ratio, while the samples
    are the policy's. Towards the old policy it is KL(old || policy), the penalty of
    https://huggingface.co/papers/1707.06347, equation 8, whose samples they are.
    """
    if new.full_kl is not None:
        return new.full_kl
    old_logps, estimator = batch["old_per_token_logps"], args.kl_estimator
    assert estimator != "full"  # then `full_kl` is given
    if args.kl_anchor == "old":
        return kl_estimate(old_logps, new.logps, estimator)
    if estimator == "k2":
        return kl_estimate(new.logps, batch["ref_per_token_logps"], estimator)
    ratio = (new.logps - old_logps).masked_fill(~batch["completion_mask"].bool(), 0.0).exp()
    return ratio * kl_estimate(new.logps, batch["ref_per_token_logps"], estimator)
