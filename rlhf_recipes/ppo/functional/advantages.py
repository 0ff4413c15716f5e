"""Advantages and returns: how much better a token was than the critic expected."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_recipes.masks import check_shapes, counted

AdvantageEstimator = Literal["gae", "bandit"]


def estimate_advantages(
    estimator: AdvantageEstimator,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    critic_lam: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate advantages by an estimator's name; a new one needs its function, and its case and word here.

    Args:
        estimator: `"gae"`: `gae` over the tokens; `"bandit"`: `bandit_advantages`, a completion as one action.
        rewards: Reward for each token, KL penalty included, shape `(B, T)`.
        values: The critic's estimate of the return before each token, in units of reward, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        gamma: Discount per token.
        lam: GAE's lambda, one or one for each sequence.
        critic_lam: Lambda of the returns; `None`: that of the advantages.

    Returns:
        Raw advantages, returns, and the mask of the values that the critic learns, each `(B, T)`.

    Example:
        >>> ones = torch.ones(1, 2)
        >>> estimates = estimate_advantages("bandit", torch.tensor([[0.0, 2.0]]), 0.5 * ones, ones)
        >>> [each.tolist() for each in estimates]
        [[[1.5, 1.5]], [[2.0, 2.0]], [[1.0, 0.0]]]
    """
    if estimator == "bandit":
        advantages, returns = bandit_advantages(rewards.sum(dim=1), values, mask)
        return advantages, returns, first_token_mask(mask)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    if critic_lam is not None:
        _, returns = gae(rewards, values, mask, gamma, critic_lam)
    return advantages, returns, mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the completion tokens of each sequence.

    `A_t = sum_l (gamma * lam)^l delta_{t+l}` with `delta_t = r_t + gamma * V_{t+1} - V_t`, and `V = 0` after the last
    counted token: a completion is an episode that ends there. Masked tokens are skipped, wherever they stand.

    Source: https://huggingface.co/papers/1506.02438, equation 16.

    Args:
        rewards: Reward for each token, shape `(B, T)`.
        values: The critic's estimate of the return before each token, in units of reward, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        gamma: Discount per token, in [0, 1].
        lam: 0 gives the TD error (low variance, biased by the critic), 1 the Monte-Carlo return minus the value. One
            number, or one for each sequence, shape `(B,)`, as `length_adaptive_lambda` gives them.

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
    check_shapes(mask, rewards=rewards, values=values)
    counts = mask.bool()
    rewards, values = rewards.detach(), counted(values.detach(), mask)
    if isinstance(lam, Tensor):
        _check_one_per_sequence(mask, lam=lam)
        lam = lam.detach().to(values)
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # A masked token hands on what it got from the next one, as if it were not there.
        advantage = torch.where(counts[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counts[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = counted(advantages, mask)
    return advantages, advantages + values


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """Choose GAE's lambda for each sequence by its length: `1 - 1 / (alpha * length)`.

    The weights of the TD errors then sum up to `1 + lam + lam^2 + ... = alpha * length`: the reward at the end reaches
    the first tokens of a long completion too. Held in [0, 1], so that a completion of up to `1 / alpha` tokens has 0.

    Source: https://huggingface.co/papers/2504.05118, section 4.2, where alpha is 0.05.

    Args:
        mask: 1 where a token counts, shape `(B, T)`.
        alpha: Share of the length that the weights sum up to, above 0.

    Returns:
        One lambda per sequence for `gae`, shape `(B,)`, float64; 0 for a sequence in which no token counts.

    Example:
        >>> length_adaptive_lambda(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), alpha=0.5).tolist()
        [0.5, 0.0]
    """
    lengths = mask.bool().sum(dim=1).double()
    return (1 - 1 / (alpha * lengths)).clamp(min=0.0)


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


def bandit_advantages(scores: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages of whole completions, each taken as one action: `A = R(x, y) - V(x)`.

    `V(x)` is the critic's value at the last token of the prompt, which is the value before the first counted token.
    There is one step, hence no discount, and the critic learns only from that one value: give `clipped_value_loss` the
    mask of `first_token_mask`.

    Args:
        scores: One score per completion, in units of reward, shape `(B,)`.
        values: The critic's estimate before each token, in units of reward, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        `(advantages, returns)`, each `(B, T)`, 0 where `mask` is 0, without gradient. Every counted token of a
        completion has the completion's advantage, and its score as return.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> advantages, returns = bandit_advantages(torch.tensor([2.0]), torch.tensor([[0.5, 9.0]]), torch.ones(1, 2))
        >>> advantages.tolist(), returns.tolist()
        ([[1.5, 1.5]], [[2.0, 2.0]])
    """
    check_shapes(mask, values=values)
    _check_one_per_sequence(mask, scores=scores)
    scores = scores.detach()
    prompt_values = counted(values.detach(), first_token_mask(mask)).sum(dim=1)
    return counted((scores - prompt_values)[:, None], mask), counted(scores[:, None], mask)


def first_token_mask(mask: Tensor) -> Tensor:
    """Mark the first counted token of each sequence: the one whose value is read at the end of the prompt.

    Args:
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        1 at the first counted token of each row and 0 elsewhere, shape and type of `mask`.

    Example:
        >>> first_token_mask(torch.tensor([[0, 1, 1], [0, 0, 0]])).tolist()
        [[0, 1, 0], [0, 0, 0]]
    """
    counts = mask.bool()
    return (counts & (counts.cumsum(dim=1) == 1)).to(mask.dtype)


def _check_one_per_sequence(mask: Tensor, **tensors: Tensor) -> None:
    # A shape of (B, 1) or () would be broadcast to a wrong result without any sign.
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape[:1]:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, but `mask` has shape {tuple(mask.shape)}. "
                f"Give one `{name}` per sequence, shape (B,)."
            )
