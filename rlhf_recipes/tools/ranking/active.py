"""What to ask a labeller: how many pairs when, and those that an ensemble of reward models disagrees about most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

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


def label_schedule(budget: int, steps: Sequence[int], halved_after: float) -> list[int]:
    """Spread a budget of labels over rounds so that the rate of labelling falls while the policy learns.

    Source: https://huggingface.co/papers/1706.03741, appendix A.1: after `T` frames of training labels come at a rate
    in proportion to `c / (T + c)`, with `c` of 2 million. It also asks for a quarter of all labels before any
    training; here the first round is at `T = 0` and gets the most by the same rule.

    Args:
        budget: Labels of all rounds together.
        steps: Training steps of the policy that lie before each round, from 0 upwards.
        halved_after: Training steps after which the rate is half of that at the start, `c`, above 0.

    Returns:
        Labels of each round. They add up to the budget exactly (the largest remainders are rounded up) and never rise.

    Raises:
        ValueError: If there is no round, the steps fall or begin below 0, or a number is out of its range.

    Example:
        >>> label_schedule(100, steps=[0, 50, 100, 150], halved_after=50)
        [48, 24, 16, 12]
    """
    if budget < 1 or not halved_after > 0:
        raise ValueError(f"Expected a budget of at least 1 and `halved_after` above 0, got {budget}, {halved_after}.")
    if not steps or steps[0] < 0 or any(later < earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"Expected the steps before each round, at least one, which never fall; got {list(steps)}.")
    rates = [halved_after / (done + halved_after) for done in steps]
    shares = [budget * rate / sum(rates) for rate in rates]
    labels = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: labels[number] - shares[number])
    for number in by_remainder[: budget - sum(labels)]:
        labels[number] += 1
    return sorted(labels, reverse=True)  # a remainder could lift a later round by one above an earlier one
