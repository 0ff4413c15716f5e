"""Losses of groups: up to `K` completions of each prompt, with ranks, one choice, or ratings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_recipes.reward_modeling.losses.pairs import log_preference


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    mask: Tensor | None = None,
    *,
    ties: Literal["drop", "soft"] = "drop",
    noise: float = 0.0,
) -> Tensor:
    """Pairwise loss of all pairs of a ranking: the mean over each prompt's pairs, then over the prompts.

    `K` completions are scored once and make `K * (K - 1) / 2` pairs, each with the same weight within its prompt.
    All pairs of a prompt in one step is what keeps the model from overfitting: as single elements of shuffled batches
    every completion would be seen `K - 1` times.

    Source: https://huggingface.co/papers/2203.02155, equation 1.

    Args:
        scores: Scores of the completions, shape `(N, K)`, or `(K,)` for one prompt.
        ranks: 1 = best; equal ranks are ties. Only their order counts. Same shape.
        mask: 1 where there is a completion, same shape. `None`: everywhere.
        ties: `"drop"` leaves tied pairs out (as InstructGPT does); `"soft"` fits them as labels of 0.5.
        noise: Share of the pairs that were ordered at random, as in `pairwise_loss`.

    Returns:
        The loss, a scalar, in nats. Prompts without a pair to compare are left out of the mean; without any the loss
        is 0.

    Raises:
        ValueError: If the shapes differ, or an option is not one of those named.

    Example:
        >>> round(ranking_loss(torch.tensor([2.0, 1.0, 0.0]), ranks=torch.tensor([1, 2, 3])).item(), 5)
        0.25115
    """
    if ties not in ("drop", "soft"):
        raise ValueError(f"`ties` must be 'drop' or 'soft', got {ties!r}.")
    scores, ranks, mask = _groups(scores, ranks, mask, "ranks")
    better, tied = _compare(ranks, mask)
    logps = log_preference(scores[:, :, None] - scores[:, None, :], noise)
    losses, counts = -logps, better
    if ties == "soft":
        losses = torch.where(tied, -(logps + logps.transpose(1, 2)) / 2, losses)
        counts = better | tied
    return group_mean(losses.flatten(1), counts.flatten(1))


def plackett_luce_loss(scores: Tensor, ranks: Tensor, mask: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of rankings in which the best is chosen first, then the best of the rest, and so on.

    `sum_i [logsumexp_{j not better than i} s_j - s_i]`. Tied completions are each chosen among all that are not better
    than they are (Breslow's treatment of ties): no order among them is assumed, and they are fitted best by equal
    scores. A tie of two alone costs twice the pairwise loss of a label of 0.5.

    Source: R. L. Plackett, "The Analysis of Permutations", 1975; N. Breslow, "Covariance Analysis of Censored Survival
    Data", 1974.

    Args:
        scores: Scores of the completions, shape `(N, K)`, or `(K,)` for one prompt.
        ranks: 1 = best; equal ranks are ties. Only their order counts. Same shape.
        mask: 1 where there is a completion, same shape. `None`: everywhere.

    Returns:
        The sum over each ranking, averaged over the prompts with at least two completions, a scalar, in nats.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> round(plackett_luce_loss(torch.tensor([2.0, 1.0, 0.0]), ranks=torch.tensor([1, 2, 3])).item(), 5)
        0.72087
    """
    scores, ranks, mask = _groups(scores, ranks, mask, "ranks")
    left = (ranks[:, :, None] <= ranks[:, None, :]) & mask[:, None, :]  # j is among those that i is chosen from
    left = left | torch.eye(scores.size(1), dtype=torch.bool, device=scores.device)  # for padding: no empty sum
    totals = scores[:, None, :].expand_as(left).masked_fill(~left, -torch.inf).logsumexp(dim=-1)
    sums = (totals - scores).masked_fill(~mask, 0.0).sum(dim=1)
    return group_mean(sums[:, None], (mask.sum(dim=1) > 1)[:, None])


def best_of_k_loss(scores: Tensor, best: Tensor | int, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of the one completion that was chosen among `K`: `logsumexp_j s_j - s_best`.

    With `K = 2` this is the pairwise loss.

    Source: https://huggingface.co/papers/1909.08593, equation 1.

    Args:
        scores: Scores of the completions, shape `(N, K)`, or `(K,)` for one prompt.
        best: Index of the chosen completion, shape `(N,)`, or a number for one prompt.
        mask: 1 where there is a completion, same shape as `scores`. `None`: everywhere.

    Returns:
        The mean over the prompts, a scalar, in nats.

    Raises:
        ValueError: If the shapes differ, or an index names no completion.

    Example:
        >>> round(best_of_k_loss(torch.tensor([2.0, 1.0, 0.0]), best=0).item(), 5)
        0.40761
    """
    best = torch.as_tensor(best, device=scores.device)
    if best.shape != scores.shape[:-1]:
        raise ValueError(f"Expected one index per prompt, shape {tuple(scores.shape[:-1])}, got {tuple(best.shape)}.")
    scores, _, mask = _groups(scores, scores, mask, "scores")
    best = best.reshape(-1, 1)
    in_range = (best >= 0) & (best < scores.size(1))
    if not (in_range & mask.gather(1, best.where(in_range, 0))).all():
        raise ValueError(f"`best` names a completion that is not there: {best.flatten().tolist()}. Count from 0.")
    losses = scores.masked_fill(~mask, -torch.inf).logsumexp(dim=1, keepdim=True) - scores.gather(1, best)
    return losses.mean()


def regression_loss(scores: Tensor, ratings: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of scores against ratings: the mean over each prompt's completions, then over the prompts.

    Args:
        scores: Scores of the completions, shape `(N, K)`, or `(K,)` for one prompt.
        ratings: What they should be, in reward units, same shape.
        mask: 1 where there is a completion with a rating, same shape. `None`: everywhere.

    Returns:
        The loss, a scalar, in squared reward units.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> regression_loss(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 4.0])).item()
        4.5
    """
    scores, ratings, mask = _groups(scores, ratings, mask, "ratings")
    return group_mean((scores - ratings).square(), mask)


def centering_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Distance of the scores from being centered at 0: the mean of `(s_i + s_j)^2` over each prompt's pairs.

    Losses of comparisons leave the zero of the scores open. A small multiple of this closes it. With `K = 2` it is the
    term that TRL's `center_rewards_coefficient` weighs.

    Source: https://huggingface.co/papers/2312.09244.

    Args:
        scores: Scores of the completions, shape `(N, K)`, or `(K,)` for one prompt.
        mask: 1 where there is a completion, same shape. `None`: everywhere.

    Returns:
        The mean over the prompts with at least two completions, a scalar, in squared reward units.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> centering_loss(torch.tensor([2.0, -1.0])).item()
        1.0
    """
    scores, _, mask = _groups(scores, scores, mask, "scores")
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(diagonal=1)
    return group_mean((scores[:, :, None] + scores[:, None, :]).square().flatten(1), pairs.flatten(1))


def untied_margins(scores: Tensor, ranks: Tensor, mask: Tensor | None = None) -> Tensor:
    """Lead of the better completion in each untied pair.

    Args:
        scores: Scores of the completions, shape `(N, K)`, or `(K,)` for one prompt.
        ranks: 1 = best; equal ranks are ties. Only their order counts. Same shape.
        mask: 1 where there is a completion, same shape. `None`: everywhere.

    Returns:
        Score of the better minus score of the worse, shape `(P,)` for the `P` untied pairs of all prompts: a pair is
        scored in the right order where it is positive.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> untied_margins(torch.tensor([2.0, 1.0, 5.0]), ranks=torch.tensor([1, 2, 2])).tolist()
        [1.0, -3.0]
    """
    scores, ranks, mask = _groups(scores, ranks, mask, "ranks")
    better, _ = _compare(ranks, mask)
    return (scores[:, :, None] - scores[:, None, :])[better]


def group_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over groups of the mean over what counts in each; groups in which nothing counts are left out.

    Args:
        values: One value per entry, shape `(N, M)`.
        mask: 1 where an entry counts, shape `(N, M)`.

    Returns:
        A scalar; 0 where nothing counts at all.

    Example:
        >>> values, mask = torch.tensor([[1.0, 3.0], [4.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> group_mean(values, mask).item()  # (2 + 4) / 2
        3.0
    """
    mask = mask.bool()
    counts = mask.sum(dim=1)
    means = values.masked_fill(~mask, 0.0).sum(dim=1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)


def _groups(scores: Tensor, targets: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bring scores, targets and mask to `(N, K)`, with 0 at masked places."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    if scores.dim() not in (1, 2) or targets.shape != scores.shape or mask.shape != scores.shape:
        raise ValueError(
            f"Expected `scores`, `{name}` and `mask` of one shape, (N, K) or (K,), got {tuple(scores.shape)}, "
            f"{tuple(targets.shape)} and {tuple(mask.shape)}."
        )
    width = scores.size(-1)
    scores, targets, mask = (tensor.reshape(-1, width) for tensor in (scores, targets, mask))
    return scores.masked_fill(~mask, 0.0), targets.masked_fill(~mask, 0), mask


def _compare(ranks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return where `i` is better than `j`, and where they are tied (each tied pair once), both `(N, K, K)`."""
    both = mask[:, :, None] & mask[:, None, :]
    better = both & (ranks[:, :, None] < ranks[:, None, :])
    tied = (both & (ranks[:, :, None] == ranks[:, None, :])).triu(diagonal=1)
    return better, tied
