"""Means, moments and shares over the tokens that count."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_recipes.masks import check_shapes, counted

Aggregation = Literal["token", "sequence", "fixed"]


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
    check_shapes(mask, values=values)
    return counted(values, mask).sum() / mask.bool().sum().clamp(min=1)


def aggregate(losses: Tensor, mask: Tensor, how: Aggregation = "token", length: int | None = None) -> Tensor:
    """Average losses per token to one number.

    - `"token"`: mean over all counted tokens of the batch. A long completion weighs more than a short one.
    - `"sequence"`: mean over the tokens of each sequence, then over the sequences that have one. Every completion
      weighs the same, so that a token of a long one weighs less.
    - `"fixed"`: sum over the tokens of each sequence divided by `length`, then mean over all sequences. Every token
      weighs the same in every batch.

    Parts of a batch give the whole when they are weighed with their number of counted tokens, of sequences that have
    a counted token, and of all sequences.

    Source: `"token"` https://huggingface.co/papers/2503.14476, equation 8; `"sequence"`
    https://huggingface.co/papers/2402.03300, equation 3; `"fixed"` https://huggingface.co/papers/2503.20783.

    Args:
        losses: Any loss per token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        how: `"token"`, `"sequence"` or `"fixed"`.
        length: For `"fixed"`: the constant in place of a sequence's number of tokens, as a rule the longest that a
            completion may be. The others do not use it.

    Returns:
        A scalar; 0 if no token counts.

    Raises:
        ValueError: If the shapes differ, `how` is unknown, or `"fixed"` has no positive `length`.

    Example:
        >>> losses, mask = torch.tensor([[4.0, 0.0], [1.0, 3.0]]), torch.tensor([[1, 0], [1, 1]])
        >>> [round(aggregate(losses, mask, how, length=4).item(), 3) for how in ("token", "sequence", "fixed")]
        [2.667, 3.0, 1.0]
    """
    if how == "token":
        return masked_mean(losses, mask)
    check_shapes(mask, losses=losses)
    sums, counts = counted(losses, mask).sum(dim=1), mask.bool().sum(dim=1)
    if how == "sequence":
        return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
    if how != "fixed":
        raise ValueError(f"`how` must be 'token', 'sequence' or 'fixed', got {how!r}.")
    if length is None or length <= 0:
        raise ValueError(f"'fixed' divides by `length`, which must be positive, got {length}.")
    return sums.sum() / (length * max(len(sums), 1))


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
    check_shapes(mask, values=values)
    kept = counted(values, mask).double()
    return kept.sum(), kept.square().sum(), mask.bool().sum().double()


def whiten(
    values: Tensor,
    mask: Tensor,
    center: bool = True,
    moments: tuple[Tensor, Tensor, Tensor] | Tensor | None = None,
    unbiased: bool = False,
) -> Tensor:
    """Scale the counted tokens to variance 1 and, if `center`, shift them to mean 0.

    `(x - mean) / sqrt(var + 1e-8)` with the population variance over all counted tokens of the batch, as the code of
    https://huggingface.co/papers/1909.08593 does for advantages and, without centering, for rewards. With `unbiased`
    the variance is the sample's, divided by `n - 1` in place of `n`: results are smaller by `sqrt(1 - 1 / n)`.

    Args:
        values: Any quantity per token, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        center: Whether to shift the mean to 0. If not, the mean stays what it was.
        moments: `masked_moments` summed over all processes, when `values` is only one process's part of the batch.
        unbiased: Whether to divide by `n - 1`. A single counted token has no variance then either.

    Returns:
        The whitened values, shape `(B, T)`, 0 where `mask` is 0.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]])).tolist()
        [[-1.0, 1.0, 0.0]]
    """
    check_shapes(mask, values=values)
    moments = masked_moments(values, mask) if moments is None else moments
    mean, variance = _mean_and_variance(moments)
    if unbiased:
        variance = variance * moments[2] / (moments[2] - 1).clamp(min=1)
    whitened = (counted(values, mask).double() - mean) * torch.rsqrt(variance + 1e-8)
    if not center:
        whitened = whitened + mean
    return counted(whitened, mask).to(values.dtype)


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
    check_shapes(mask, values=values, returns=returns)
    mean, total = _mean_and_variance(masked_moments(returns.detach(), mask))
    _, unexplained = _mean_and_variance(masked_moments((returns - values).detach(), mask))
    varies = total > 1e-12 * mean.square()  # less is the rounding of equal float32 returns
    return torch.where(varies, 1 - unexplained / total, 0.0).to(values.dtype)


def _mean_and_variance(moments: tuple[Tensor, Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    total, squares, count = moments
    mean, mean_square = total / count.clamp(min=1), squares / count.clamp(min=1)
    return mean, (mean_square - mean.square()).clamp(min=0)
