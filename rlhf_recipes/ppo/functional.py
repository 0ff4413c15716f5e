"""The maths of PPO: tensors in, tensors out.

`B` sequences, `T` completion tokens, `V` vocabulary. Every `mask` is `(B, T)` with 1 where a token counts and 0 on
padding. What stands at a masked position, even `nan` or `inf`, never changes a result or a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average over the tokens that count.

    Args:
        values: Any quantity per token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        The mean over all counted tokens of the batch, a scalar; 0 if no token counts.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]])).item()
        2.0
    """
    _check_shapes(mask, values=values)
    return _counted(values, mask).sum() / mask.bool().sum().clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum up what `whiten` needs to know of a batch.

    The moments of a batch spread over several processes are the sums of the moments of its parts.

    Args:
        values: Any quantity per token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        `(sum, sum_of_squares, count)` over the counted tokens: float64 scalars, because a variance from sums of
        squares cancels in float32.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> [moment.item() for moment in masked_moments(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]]))]
        [4.0, 10.0, 2.0]
    """
    _check_shapes(mask, values=values)
    counted = _counted(values, mask).double()
    return counted.sum(), counted.square().sum(), mask.bool().sum().double()


def whiten(
    values: Tensor, mask: Tensor, center: bool = True, moments: tuple[Tensor, Tensor, Tensor] | Tensor | None = None
) -> Tensor:
    """Scale the counted tokens to variance 1 and, if `center`, shift them to mean 0.

    `(x - mean) / sqrt(var + 1e-8)` with the population variance over all counted tokens of the batch, as the code of
    https://huggingface.co/papers/1909.08593 does for advantages and, without centering, for rewards.

    Args:
        values: Any quantity per token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        center: Whether to shift the mean to 0. If not, the mean stays what it was.
        moments: `masked_moments` summed over all processes, when `values` is only one process's part of the batch.

    Returns:
        The whitened values, shape `(B, T)`, 0 where `mask` is 0.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]])).tolist()
        [[-1.0, 1.0, 0.0]]
    """
    _check_shapes(mask, values=values)
    mean, variance = _mean_and_variance(masked_moments(values, mask) if moments is None else moments)
    whitened = (_counted(values, mask).double() - mean) * torch.rsqrt(variance + 1e-8)
    if not center:
        whitened = whitened + mean
    return _counted(whitened, mask).to(values.dtype)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the completion tokens of each sequence.

    `A_t = sum_l (gamma * lam)^l delta_{t+l}` with `delta_t = r_t + gamma * V_{t+1} - V_t`, and `V = 0` after the last
    counted token: a completion is an episode that ends there. Masked tokens are skipped, wherever they stand.

    Source: https://huggingface.co/papers/1506.02438, equation 16.

    Args:
        rewards: Reward for each token, shape `(B, T)`.
        values: The critic's estimate of the return before each token, in units of reward, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        gamma: Discount per token, in [0, 1].
        lam: 0 gives the TD error (low variance, biased by the critic), 1 the Monte-Carlo return minus the value.

    Returns:
        `(advantages, returns)`, each `(B, T)`, 0 where `mask` is 0, without gradient. The advantages are raw: whiten
        them separately. The returns, `advantages + values`, are the critic's targets.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
        >>> [result.tolist() for result in gae(rewards, values, torch.ones(1, 2), gamma=1.0, lam=0.5)]
        [[[0.25, 0.5]], [[0.75, 1.0]]]
    """
    _check_shapes(mask, rewards=rewards, values=values)
    counts = mask.bool()
    rewards, values = rewards.detach(), _counted(values.detach(), mask)
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # A masked token hands on what it got from the next one, as if it were not there.
        advantage = torch.where(counts[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counts[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = _counted(advantages, mask)
    return advantages, advantages + values


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Sum up the discounted rewards from each token on: `R_t = sum_k gamma^k r_{t+k}`.

    Args:
        rewards: Reward for each token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        gamma: Discount per token, in [0, 1].

    Returns:
        The returns, shape `(B, T)`, 0 where `mask` is 0, without gradient.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> discounted_returns(torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1, 3), gamma=0.5).tolist()
        [[0.25, 0.5, 1.0]]
    """
    # Without a critic, and with nothing cut from the sum, GAE is the return.
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[1]


def clipped_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate objective, negated: a loss to minimise.

    The mean over counted tokens of `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` with
    `ratio = exp(logps - old_logps)`. Gradients flow into `logps` only.

    Source: https://huggingface.co/papers/1707.06347, equation 7 (there `clip_low = clip_high`).

    Args:
        logps: Log-probability of each token under the policy that is trained, in nats, shape `(B, T)`.
        old_logps: The same under the policy that sampled the tokens, shape `(B, T)`.
        advantages: Advantage of each token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        clip_low: How far below 1 the ratio may fall before a token with negative advantage stops counting.
        clip_high: How far above 1 it may rise before a token with positive advantage stops counting.

    Returns:
        `(loss, clip_fraction)`, two scalars; the second is the share of counted tokens that the clip cut off.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> logps, old_logps = torch.tensor([[0.5, 0.1]]).log(), torch.tensor([[0.25, 0.1]]).log()
        >>> loss, clipped = clipped_policy_loss(logps, old_logps, torch.ones(1, 2), torch.ones(1, 2), 0.2, 0.2)
        >>> round(loss.item(), 4), clipped.item()  # ratios 2 and 1, so -(1.2 + 1) / 2
        (-1.1, 0.5)
    """
    _check_shapes(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    advantages = advantages.detach()
    # The mask comes before `exp`, so that it stops in the backward pass whatever padding makes of it, inf or nan.
    ratio = _counted(logps - old_logps.detach(), mask).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return masked_mean(torch.maximum(plain, clipped), mask), masked_mean(clipped > plain, mask)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Squared error of the critic that gives no credit for moving further than `clip` from the old value.

    Half the mean over counted tokens of `max((V - R)^2, (V' - R)^2)`, where `V'` is `V` held within `clip` of the old
    value. Gradients flow into `values` only.

    Source: the value clipping of OpenAI's PPO, described in https://huggingface.co/papers/2005.12729.

    Args:
        values: Estimates of the critic that is trained, in units of reward, shape `(B, T)`.
        old_values: Its estimates at the rollout, shape `(B, T)`.
        returns: The targets, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        clip: Range around the old value, in units of reward. `None` gives half the mean squared error.

    Returns:
        `(loss, clip_fraction)`, two scalars; the second is the share of counted tokens that the clip cut off.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> values, old_values, returns = torch.tensor([[0.8]]), torch.tensor([[0.3]]), torch.tensor([[1.0]])
        >>> loss, clipped = clipped_value_loss(values, old_values, returns, torch.ones(1, 1), clip=0.2)
        >>> round(loss.item(), 4), clipped.item()  # held at 0.5, so (0.5 - 1)^2 / 2
        (0.125, 1.0)
    """
    _check_shapes(mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = _counted(values, mask), old_values.detach(), returns.detach()
    reach = math.inf if clip is None else clip
    error = (values - returns).square()
    # Not `old + clamp(values - old)`: rounding would then count values inside the range as clipped.
    clipped_error = (values.clamp(old_values - reach, old_values + reach) - returns).square()
    return 0.5 * masked_mean(torch.maximum(error, clipped_error), mask), masked_mean(clipped_error > error, mask)


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


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance of the returns that the critic explains, `1 - Var[R - V] / Var[R]`.

    Args:
        values: The critic's estimates, shape `(B, T)`.
        returns: The returns that they estimate, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        A scalar without gradient: 1 for a perfect critic (up to a constant), 0 for one that knows nothing, less for
        one that misleads. 0 if the returns do not vary.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> returns = torch.tensor([[1.0, 2.0, 3.0]])
        >>> explained_variance(returns / 2, returns, torch.ones(1, 3)).item()
        0.75
    """
    _check_shapes(mask, values=values, returns=returns)
    mean, total = _mean_and_variance(masked_moments(returns.detach(), mask))
    _, unexplained = _mean_and_variance(masked_moments((returns - values).detach(), mask))
    varies = total > 1e-12 * mean.square()  # less is the rounding of equal float32 returns
    return torch.where(varies, 1 - unexplained / total, 0.0).to(values.dtype)


def _counted(tensor: Tensor, mask: Tensor) -> Tensor:
    # Not `tensor * mask`, because nan * 0 and inf * 0 are nan.
    return tensor.masked_fill(~mask.bool(), 0.0)


def _mean_and_variance(moments: tuple[Tensor, Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    total, squares, count = moments
    mean, mean_square = total / count.clamp(min=1), squares / count.clamp(min=1)
    return mean, (mean_square - mean.square()).clamp(min=0)


def _check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    # Tensors of shape (B, 1) or (T,) would be broadcast to a wrong result without any sign.
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, but `mask` has shape {tuple(mask.shape)}. "
                "Give every tensor one entry per token, shape (B, T)."
            )
