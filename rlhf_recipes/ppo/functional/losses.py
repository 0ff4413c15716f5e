"""Losses to minimise: of the policy, of the critic, and their sum."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rlhf_recipes.masks import check_shapes, counted
from rlhf_recipes.ppo.functional.statistics import Aggregation, aggregate, masked_mean

Level = Literal["token", "sequence", "sequence_product"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def importance_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor, level: Level = "token") -> Tensor:
    """How much more probable the tokens have become under the policy that is trained.

    - `"token"`: `p_new / p_old` of each token.
    - `"sequence"`: the geometric mean of these over the sequence, `exp(mean_t (logps - old_logps))`, as in GSPO.
    - `"sequence_product"`: their product, `exp(sum_t (logps - old_logps))`, which is `p_new / p_old` of the whole
      completion. Exact, but it grows and shrinks exponentially with the length, up to overflow: for short completions.

    Source: `"token"` https://huggingface.co/papers/1707.06347, section 3; `"sequence"`
    https://huggingface.co/papers/2507.18071, equation 7.

    Args:
        logps: Log-probability of each token under the policy that is trained, in nats, shape `(B, T)`.
        old_logps: The same under the policy that sampled the tokens, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        level: `"token"`, `"sequence"` or `"sequence_product"`.

    Returns:
        The ratios, shape `(B, T)`, 0 where `mask` is 0. Those of a sequence stand at each of its counted tokens.
        Gradients flow into `logps` only.

    Raises:
        ValueError: If the shapes differ, or the level is unknown.

    Example:
        >>> logps, old_logps = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.25, 0.1]]).log()
        >>> for level in ("token", "sequence", "sequence_product"):
        ...     importance_ratio(logps, old_logps, torch.ones(1, 2), level)
        tensor([[2., 2.]])
        tensor([[2., 2.]])
        tensor([[4., 4.]])
    """
    check_shapes(mask, logps=logps, old_logps=old_logps)
    # The mask comes before `exp` too, so that it stops in the backward pass whatever padding makes of it, inf or nan.
    log_ratio = counted(logps - old_logps.detach(), mask)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True) / mask.bool().sum(dim=1, keepdim=True).clamp(min=1)
    elif level == "sequence_product":
        log_ratio = log_ratio.sum(dim=1, keepdim=True)
    elif level != "token":
        raise ValueError(f"`level` must be 'token', 'sequence' or 'sequence_product', got {level!r}.")
    return counted(log_ratio.exp(), mask)


def importance_weights(
    old_logps: Tensor,
    sampled_logps: Tensor,
    mask: Tensor,
    mode: Correction = "token_truncate",
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Weights of completions that another engine sampled, whose distributions are not quite the policy's.

    The ratio `p_old / p_sampled`, of each token or of the whole completion, within bounds: one outside is moved to the
    bound (`truncate`), or counts nothing (`mask`).

    Source: Ionides 2008, Truncated Importance Sampling, equation 2; the modes are those of TRL's GRPO
    (`vllm_importance_sampling_mode`).

    Args:
        old_logps: Log-probability of each token under the policy at the rollout, in nats, shape `(B, T)`.
        sampled_logps: The same under the engine that sampled, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        mode: `"token_truncate"`, `"token_mask"`, `"sequence_truncate"` or `"sequence_mask"`.
        low: Lower bound; `None`: there is none.
        high: Upper bound; `None`: there is none.

    Returns:
        The weights, shape `(B, T)`, without gradients; 0 where `mask` is 0.

    Raises:
        ValueError: If the shapes differ, or the mode is unknown.

    Example:
        >>> old, sampled = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.25, 0.05]]).log()
        >>> importance_weights(old, sampled, torch.ones(1, 2), "token_truncate", high=3.0)
        tensor([[2., 3.]])
        >>> importance_weights(old, sampled, torch.ones(1, 2), "token_mask", high=3.0)
        tensor([[2., 0.]])
    """
    level, _, bounded = mode.partition("_")
    if level not in ("token", "sequence") or bounded not in ("truncate", "mask"):
        raise ValueError(f"`mode` must be 'token_' or 'sequence_' and 'truncate' or 'mask', got {mode!r}.")
    ratio = importance_ratio(
        old_logps.detach(), sampled_logps, mask, "token" if level == "token" else "sequence_product"
    )
    within = ratio.clamp(low, high) if low is not None or high is not None else ratio
    weights = within if bounded == "truncate" else ratio.where(within == ratio, 0.0)
    return counted(weights, mask)


def clipped_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    dual_clip: float | None = None,
    level: Level = "token",
    aggregation: Aggregation = "token",
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate objective, negated: a loss to minimise.

    The mean of `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`; with `dual_clip`, where `A < 0`, of
    `-max(min(...), dual_clip * A)`: however probable a bad token has become, it pulls no harder than that. Gradients
    flow into `logps` only.

    Source: https://huggingface.co/papers/1707.06347, equation 7 (there `clip_low = clip_high`);
    https://huggingface.co/papers/1912.09729, equation 5 (`dual_clip`).

    Args:
        logps: Log-probability of each token under the policy that is trained, in nats, shape `(B, T)`.
        old_logps: The same under the policy that sampled the tokens, shape `(B, T)`.
        advantages: Advantage of each token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        clip_low: How far below 1 the ratio may fall before a token with negative advantage stops counting.
        clip_high: How far above 1 it may rise before a token with positive advantage stops counting.
        dual_clip: Ratio above which a token with negative advantage stops counting, above `1`. `None`: there is none.
        level: Whose ratio, as in `importance_ratio`.
        aggregation: How to average, as in `aggregate`.
        length: For the aggregation `"fixed"`.

    Returns:
        `(loss, clip_fraction)`, two scalars; the second is the share of counted tokens that a clip cut off.

    Raises:
        ValueError: If the shapes differ, or an option is not one of those named.

    Example:
        >>> logps, old_logps = torch.tensor([[0.5, 0.1]]).log(), torch.tensor([[0.25, 0.1]]).log()
        >>> loss, clipped = clipped_policy_loss(logps, old_logps, torch.ones(1, 2), torch.ones(1, 2), 0.2, 0.2)
        >>> round(loss.item(), 4), clipped.item()  # ratios 2 and 1, so -(1.2 + 1) / 2
        (-1.1, 0.5)
    """
    check_shapes(mask, advantages=advantages)
    ratio = importance_ratio(logps, old_logps, mask, level)
    advantages = advantages.detach()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses, cut = torch.maximum(plain, clipped), clipped > plain
    if dual_clip is not None:
        if dual_clip <= 1:
            raise ValueError(f"`dual_clip` must be above 1, the ratio before the first update, got {dual_clip}.")
        ceiling = torch.where(advantages < 0, -dual_clip * advantages, math.inf)
        losses, cut = torch.minimum(losses, ceiling), cut | (losses > ceiling)
    return aggregate(losses, mask, aggregation, length), masked_mean(cut, mask)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    *,
    aggregation: Aggregation = "token",
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared error of the critic that gives no credit for moving further than `clip` from the old value.

    Half the mean of `max((V - R)^2, (V' - R)^2)`, where `V'` is `V` held within `clip` of the old value. Gradients
    flow into `values` only.

    Source: the value clipping of OpenAI's PPO, described in https://huggingface.co/papers/2005.12729.

    Args:
        values: Estimates of the critic that is trained, in units of reward, shape `(B, T)`.
        old_values: Its estimates at the rollout, shape `(B, T)`.
        returns: The targets, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        clip: Range around the old value, in units of reward. `None` gives half the mean squared error.
        aggregation: How to average, as in `aggregate`.
        length: For the aggregation `"fixed"`.

    Returns:
        `(loss, clip_fraction)`, two scalars; the second is the share of counted tokens that the clip cut off.

    Raises:
        ValueError: If the shapes differ, or the aggregation is not one of those named.

    Example:
        >>> values, old_values, returns = torch.tensor([[0.8]]), torch.tensor([[0.3]]), torch.tensor([[1.0]])
        >>> loss, clipped = clipped_value_loss(values, old_values, returns, torch.ones(1, 1), clip=0.2)
        >>> round(loss.item(), 4), clipped.item()  # held at 0.5, so (0.5 - 1)^2 / 2
        (0.125, 1.0)
    """
    check_shapes(mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = counted(values, mask), old_values.detach(), returns.detach()
    reach = math.inf if clip is None else clip
    error = (values - returns).square()
    # Not `old + clamp(values - old)`: rounding would then count values inside the range as clipped.
    clipped_error = (values.clamp(old_values - reach, old_values + reach) - returns).square()
    loss = 0.5 * aggregate(torch.maximum(error, clipped_error), mask, aggregation, length)
    return loss, masked_mean(clipped_error > error, mask)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution: `-sum_v p_v log p_v`.

    Args:
        logits: Unnormalised log-probabilities, shape `(..., V)`; `-inf` excludes a token.

    Returns:
        The entropy in nats, shape `(...)`: 0 for a certain token, `log V` for a uniform distribution.

    Example:
        >>> entropy(torch.zeros(1, 2)).exp().tolist()
        [2.0]
    """
    logps = logits.log_softmax(dim=-1)
    # With a finite log-probability an excluded token adds 0, not nan, to the sum and to the gradient.
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(dim=-1)


def total_loss(
    policy_loss: Tensor,
    value_loss: Tensor,
    kl: Tensor,
    entropy: Tensor,
    *,
    vf_coef: float,
    kl_coef: float,
    entropy_coef: float,
) -> Tensor:
    """PPO's whole objective, negated: `-(L_CLIP - c1 * L_VF - beta * L_KL + c2 * L_entropy)`.

    That is `policy_loss + vf_coef * value_loss + kl_coef * kl - entropy_coef * entropy`, because `policy_loss` is
    `-L_CLIP`. `clipped_value_loss` is half the squared error: where `L_VF` is the whole of it, `vf_coef` is `2 * c1`.

    Source: https://huggingface.co/papers/1707.06347, equation 9, and the KL penalty of equation 8.

    Args:
        policy_loss: From `clipped_policy_loss`, a scalar.
        value_loss: From `clipped_value_loss`, in units of reward squared, a scalar.
        kl: Mean KL to the reference or to the old policy, in nats, a scalar. 0 if the KL is part of the rewards.
        entropy: Mean entropy of the policy, in nats, a scalar.
        vf_coef: Weight of the value loss.
        kl_coef: Weight of the KL.
        entropy_coef: Weight of the entropy, which is raised.

    Returns:
        The loss to minimise, a scalar.

    Example:
        >>> losses = [torch.tensor(number) for number in (-0.5, 2.0, 0.1, 3.0)]
        >>> round(total_loss(*losses, vf_coef=0.1, kl_coef=0.2, entropy_coef=0.01).item(), 4)
        -0.31
    """
    return policy_loss + vf_coef * value_loss + kl_coef * kl - entropy_coef * entropy
