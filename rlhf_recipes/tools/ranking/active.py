"""Choose the pairs to ask a labeller about: those that an ensemble of reward models disagrees about most."""

from __future__ import annotations

import torch
from torch import Tensor


def preference_variance(first_scores: Tensor, second_scores: Tensor) -> Tensor:
    """Variance, over the members of an ensemble, of the probability that the first completion of a pair wins.

    Source: https://huggingface.co/papers/1706.03741, section 2.2.4, with the Bradley-Terry probability
    `sigmoid(first - second)` of each member.

    Args:
        first_scores: Each member's scores of the first completions (reward units), shape `(M, N)` with `M >= 2`.
        second_scores: Their scores of the second completions, shape `(M, N)`.

    Returns:
        Variance for each pair, in [0, 0.25], shape `(N,)`: 0 where all members agree, 0.25 where half of them are
        sure of the first and half of the second.

    Raises:
        ValueError: If the shapes differ, there are fewer than two members, or a score is not finite.

    Example:
        >>> preference_variance(torch.tensor([[9.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [9.0, 1.0]]))
        tensor([0.2499, 0.0000])
    """
    if first_scores.shape != second_scores.shape or first_scores.dim() != 2 or len(first_scores) < 2:
        raise ValueError(
            "Expected the scores of at least two members for both sides of each pair, shape (M, N) with M >= 2, got "
            f"shapes {tuple(first_scores.shape)} and {tuple(second_scores.shape)}."
        )
    differences = first_scores - second_scores
    if not differences.isfinite().all():
        member, pair = (~differences.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"The scores of pair {pair} by member {member} are not finite: the member diverged.")
    return differences.sigmoid().var(dim=0, correction=0)


def select_queries(first_scores: Tensor, second_scores: Tensor, budget: int, seed: int = 0) -> Tensor:
    """Choose the pairs that an ensemble of reward models disagrees about most.

    Give many more candidates than the budget, about ten times as many: among few candidates there is little to
    choose from. Pairs with the same variance come in random order, so that members which are all alike choose at
    random, not the first candidates.

    Source: https://huggingface.co/papers/1706.03741, section 2.2.4 (an ensemble of three).

    Args:
        first_scores: Each member's scores of the first completions (reward units), shape `(M, N)` with `M >= 2`.
        second_scores: Their scores of the second completions, shape `(M, N)`.
        budget: Number of pairs that can be labelled, from 1 to `N`.
        seed: Seed of the order among equal variances.

    Returns:
        Indices of the chosen pairs, highest variance first, shape `(budget,)`.

    Raises:
        ValueError: If `budget` is not from 1 to `N`, or the scores are refused by `preference_variance`.

    Example:
        >>> first = torch.tensor([[5.0, 5.0, 1.0], [5.0, -5.0, 2.0], [5.0, 5.0, 3.0]])
        >>> select_queries(first, torch.zeros(3, 3), budget=2)
        tensor([1, 2])
    """
    variance = preference_variance(first_scores, second_scores)
    candidates = len(variance)
    if not 1 <= budget <= candidates:
        raise ValueError(f"`budget` must be from 1 to the number of candidates, {candidates}, got {budget}.")
    shuffled = torch.randperm(candidates, generator=torch.Generator().manual_seed(seed)).to(variance.device)
    order = variance[shuffled].argsort(descending=True, stable=True)
    return shuffled[order[:budget]]
