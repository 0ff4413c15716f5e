"""Losses of pairs: two completions of a prompt, and how probable it is that people prefer the first."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def log_preference(difference: Tensor, noise: float = 0.0) -> Tensor:
    """Log-probability that the completion which leads by `difference` is preferred.

    Bradley-Terry's `P = sigmoid(difference)`, or, with people who choose at random in a share `noise` of all cases,
    `P' = (1 - noise) * P + noise / 2`. Then no choice is impossible: the loss of a wrong label is at most
    `-log(noise / 2)`, however sure the model is.

    Source: https://huggingface.co/papers/1706.03741, section 2.2.3, equation 1 and the 10 % of random choices.

    Args:
        difference: Score of one completion minus the score of the other, any shape.
        noise: Share of random choices, in [0, 1).

    Returns:
        The log-probability in nats, of the same shape.

    Raises:
        ValueError: If `noise` is not in [0, 1).

    Example:
        >>> log_preference(torch.tensor([0.0, 1.0])).exp()
        tensor([0.5000, 0.7311])
        >>> log_preference(torch.tensor([0.0, 1.0, 99.0]), noise=0.1).exp()
        tensor([0.5000, 0.7080, 0.9500])
    """
    if not 0.0 <= noise < 1.0:
        raise ValueError(f"`noise` is the share of choices made at random and must lie in [0, 1), got {noise}.")
    if noise == 0.0:
        return logsigmoid(difference)
    at_random = torch.full_like(difference, math.log(noise) - math.log(2.0))
    return torch.logaddexp(math.log1p(-noise) + logsigmoid(difference), at_random)


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    label: Tensor | float = 1.0,
    margin: Tensor | float = 0.0,
    noise: float = 0.0,
) -> Tensor:
    """Cross-entropy of the labels of pairs under Bradley-Terry's model: hard labels, ties and soft labels alike.

    The mean of `-label * log P(d - margin) - (1 - label) * log P(-d - margin)`, where `d = chosen - rejected` and `P`
    is that of `log_preference`. A tie (label 0.5) is fitted best by equal scores. The margin is demanded of whichever
    side wins, so that naming the sides the other way round, with `1 - label`, changes nothing.

    Source: https://huggingface.co/papers/1706.03741, equation 1 (ties as labels of 0.5);
    https://huggingface.co/papers/2307.09288, equation 2 (`margin`).

    Args:
        chosen: Scores of the first completions, shape `(N,)`.
        rejected: Scores of the second completions, shape `(N,)`.
        label: Probability that `chosen` wins, in [0, 1]: one number, or shape `(N,)`. A tie is 0.5.
        margin: Lead of the winner at which its loss is that of a tie, in reward units: one number, or shape `(N,)`.
        noise: Share of labels given at random, in [0, 1): 0.1 gives `P' = 0.9 * P + 0.05`.

    Returns:
        The mean over the pairs, a scalar, in nats.

    Raises:
        ValueError: If the shapes differ, a label is not in [0, 1], or `noise` is not in [0, 1).

    Example:
        >>> chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
        >>> [round(pairwise_loss(chosen, rejected, label=label).item(), 4) for label in (1.0, 0.5, 0.0)]
        [0.3133, 0.8133, 1.3133]
    """
    return _losses(chosen, rejected, label, margin, noise).mean()


def scaled_pairwise_loss(
    chosen: Tensor, rejected: Tensor, strength: Tensor, label: Tensor | float = 1.0, noise: float = 0.0
) -> Tensor:
    """Pairwise loss in which a pair counts as often as its preference is strong.

    The mean over the pairs of `strength * loss`. It is not divided by the mean strength: strengths of 2 double the
    loss. A strength of 0 takes a pair out.

    Source: https://huggingface.co/papers/2410.01257 (scaled Bradley-Terry).

    Args:
        chosen: Scores of the first completions, shape `(N,)`.
        rejected: Scores of the second completions, shape `(N,)`.
        strength: How strong the preference is, such as 1 (slightly better) to 3 (much better), not negative, shape
            `(N,)`.
        label: As in `pairwise_loss`.
        noise: As in `pairwise_loss`.

    Returns:
        The mean over the pairs, a scalar, in nats.

    Raises:
        ValueError: If the shapes differ, a strength is negative, or as in `pairwise_loss`.

    Example:
        >>> chosen, rejected = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> round(scaled_pairwise_loss(chosen, rejected, strength=torch.tensor([3.0, 0.0])).item(), 4)
        0.4699
    """
    if strength.shape != chosen.shape:
        raise ValueError(f"Expected one strength per pair, shape {tuple(chosen.shape)}, got {tuple(strength.shape)}.")
    if (strength < 0).any():
        raise ValueError(f"A strength must not be negative, got {strength.min().item()}. Swap the two sides instead.")
    return (strength * _losses(chosen, rejected, label, 0.0, noise)).mean()


def _losses(chosen: Tensor, rejected: Tensor, label: Tensor | float, margin: Tensor | float, noise: float) -> Tensor:
    """Loss of each pair."""
    label, margin = (torch.as_tensor(value, dtype=chosen.dtype, device=chosen.device) for value in (label, margin))
    shapes = [tuple(tensor.shape) for tensor in (chosen, rejected, label, margin)]
    if shapes[0] != shapes[1] or any(shape not in ((), shapes[0]) for shape in shapes[2:]):
        raise ValueError(
            "Expected `chosen` and `rejected` of shape (N,), with `label` and `margin` of that shape or one number "
            f"each, got the shapes {', '.join(map(str, shapes))}."
        )
    outside = label[~((label >= 0) & (label <= 1))]  # nan too
    if outside.numel():
        raise ValueError(
            f"A label is the probability that `chosen` wins and must lie in [0, 1], got {outside.flatten()[0].item()}."
        )
    difference = chosen - rejected
    wins = label * log_preference(difference - margin, noise)
    return -(wins + (1 - label) * log_preference(-difference - margin, noise))
