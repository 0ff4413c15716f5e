"""Scores from votes: Elo and Bradley-Terry.

`evalica` does the maths wherever it has it: sequential Elo, and the Bradley-Terry fit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rlhf_recipes.extras import from_extra
from rlhf_recipes.tools.ranking.votes import Vote, check_undefeated, check_votes

with from_extra("ranking", needed_by="Ranking votes"):
    import evalica

Scores = dict[Hashable, float]

ELO_PER_NAT = 400 / math.log(10)
"""Elo points (on the scale 400) that are one nat of Bradley-Terry score: 173.72."""


class ScoringMethod(Protocol):
    """A function from votes to one score per item, such as `bradley_terry` or `functools.partial(elo, k=16)`."""

    def __call__(
        self, votes: Sequence[Vote], items: Sequence[Hashable] | None = None, allow_disconnected: bool = False
    ) -> Scores:
        """Score the items."""


def win_probability(difference: float) -> float:
    """Probability that an item wins which is `difference` Elo points ahead: `1 / (1 + 10^(-difference / 400))`.

    Args:
        difference: Elo points.

    Returns:
        A probability.

    Example:
        >>> round(win_probability(400.0), 5), win_probability(0.0)
        (0.90909, 0.5)
    """
    return 0.5 * (1.0 + math.tanh(difference / ELO_PER_NAT / 2))  # the sigmoid, which cannot overflow


def elo(
    votes: Sequence[Vote],
    items: Sequence[Hashable] | None = None,
    allow_disconnected: bool = False,
    k: float = 32.0,
    initial: float = 1500.0,
) -> Scores:
    """Elo scores after the votes in the order in which they come: later votes count more, and the order matters.

    After each vote the winner gains and the loser gives `k (outcome - win_probability(winner - loser))`, with outcome
    1, or 0.5 for a tie; the sum of all scores stays the same.

    Source: A. E. Elo, The Rating of Chessplayers, Past and Present (1978); computed by `evalica.elo`.

    Args:
        votes: The votes in the order of play.
        items: All items, in the wanted order; by default those of the votes.
        allow_disconnected: Accept items that no chain of votes connects: they stay near `initial`, and a difference
            between them says nothing.
        k: Elo points that one vote can move a score.
        initial: Elo points before the first vote.

    Returns:
        Elo points of each item.

    Raises:
        ValueError: If `k` is not positive, or the votes are refused by `check_votes`.

    Example:
        >>> elo([Vote("a", "b")])
        {'a': 1516.0, 'b': 1484.0}
    """
    listed = check_votes(votes, items, allow_disconnected)
    _check_k(k)
    return _sequential(votes, listed, k, initial)


def average_elo(
    votes: Sequence[Vote],
    items: Sequence[Hashable] | None = None,
    allow_disconnected: bool = False,
    k: float = 32.0,
    initial: float = 1500.0,
    rounds: int = 100,
    seed: int = 0,
) -> Scores:
    """Elo scores averaged over random orders of the votes, for votes that have no order.

    Each round plays all votes from the start in a new order. What is left of the order shrinks with the square root
    of `rounds`.

    Args:
        votes: The votes.
        items: All items, in the wanted order; by default those of the votes.
        allow_disconnected: As in `elo`.
        k: Elo points that one vote can move a score.
        initial: Elo points before the first vote.
        rounds: Number of orders.
        seed: Seed of the orders. They do not depend on what the items are called.

    Returns:
        Elo points of each item, the mean over the rounds.

    Raises:
        ValueError: If `k` or `rounds` is not positive, or the votes are refused by `check_votes`.

    Example:
        >>> average_elo([Vote("a", "b"), Vote("a", "b", tie=True)], rounds=50)["a"] > 1514
        True
    """
    listed = check_votes(votes, items, allow_disconnected)
    _check_k(k)
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    rng, order = random.Random(seed), list(votes)
    totals = dict.fromkeys(listed, 0.0)
    for _ in range(rounds):
        rng.shuffle(order)
        for item, score in _sequential(order, listed, k, initial).items():
            totals[item] += score
    return {item: total / rounds for item, total in totals.items()}


def round_robin_elo(
    votes: Sequence[Vote],
    items: Sequence[Hashable] | None = None,
    allow_disconnected: bool = False,
    k: float = 32.0,
    initial: float = 1500.0,
) -> Scores:
    """Elo scores after votes that are all counted at once, such as those of one ranking.

    Every item still has its initial score, so each win gives `k / 2` and each loss takes it. The order of the votes
    does not matter, nor does the strength of the opponents.

    Args:
        votes: The votes.
        items: All items, in the wanted order; by default those of the votes.
        allow_disconnected: As in `elo`.
        k: Elo points that one vote can move a score.
        initial: Elo points before the votes.

    Returns:
        Elo points of each item.

    Raises:
        ValueError: If `k` is not positive, or the votes are refused by `check_votes`.

    Example:
        >>> from rlhf_recipes.tools.ranking.votes import votes_of_ranking
        >>> round_robin_elo(votes_of_ranking("abcd", [1, 2, 3, 4]))
        {'a': 1548.0, 'b': 1516.0, 'c': 1484.0, 'd': 1452.0}
    """
    listed = check_votes(votes, items, allow_disconnected)
    _check_k(k)
    scores = dict.fromkeys(listed, float(initial))
    for vote in votes:
        gain = 0.0 if vote.tie else k / 2
        scores[vote.winner] += gain
        scores[vote.loser] -= gain
    return scores


def bradley_terry(
    votes: Sequence[Vote],
    items: Sequence[Hashable] | None = None,
    allow_disconnected: bool = False,
    prior: float = 1.0,
) -> Scores:
    """Bradley-Terry scores: the most probable ones, given all votes at once and a prior.

    An item with score `a` beats one with score `b` with probability `sigmoid(a - b)`; a tie counts as half a win for
    either side. As prior, every item wins `prior` votes against an imaginary item of score 0 and loses as many, which
    pulls scores together and keeps an item finite that never lost. With `prior=1` that is a logistic distribution.

    Source: R. A. Bradley and M. E. Terry, "Rank Analysis of Incomplete Block Designs", 1952; the prior as in
    https://huggingface.co/papers/2207.00076; computed by `evalica.bradley_terry`, in memory that grows with the square
    of the number of items.

    Args:
        votes: The votes; their order does not matter, and they may contradict each other.
        items: All items, in the wanted order; by default those of the votes.
        allow_disconnected: Accept items that no chain of votes connects. Each part is centred on the imaginary item,
            so that a difference between parts comes from the prior alone.
        prior: Imaginary wins, and as many losses, of each item; 0 for the plain maximum of the likelihood.

    Returns:
        Scores in nats, with mean 0. Times `ELO_PER_NAT` they are Elo points.

    Raises:
        ValueError: If `prior` is negative or not finite, the votes are refused by `check_votes`, or without a prior
            some items never lose to the others.
        RuntimeError: If the fit did not converge.

    Example:
        >>> votes = [Vote("a", "b")] * 3 + [Vote("b", "a")]
        >>> scores = bradley_terry(votes, prior=0)
        >>> round(scores["a"] - scores["b"], 4) == round(math.log(3), 4)
        True
        >>> {item: round(score, 3) for item, score in bradley_terry([Vote("a", "b")]).items()}
        {'a': 0.528, 'b': -0.528}
    """
    listed = check_votes(votes, items, allow_disconnected and prior > 0)
    if not 0 <= prior < math.inf:
        raise ValueError(f"`prior` must be 0 or more votes, got {prior}.")
    if prior == 0:
        check_undefeated(votes, listed)
    number = {item: index for index, item in enumerate(listed)}
    imaginary = range(len(listed)) if prior else ()
    result = evalica.bradley_terry(
        [number[vote.winner] for vote in votes] + list(imaginary),
        [number[vote.loser] for vote in votes] + [len(listed)] * len(imaginary),
        _winners(votes) + [evalica.Winner.Draw] * len(imaginary),
        # A tie that counts twice is one win and one loss.
        weights=[1.0] * len(votes) + [2 * prior] * len(imaginary),
        tolerance=1e-10,
        limit=5000,
    )
    strengths = result.scores.to_dict()
    # The strength of the imaginary item comes last. It is fixed where the prior does not need it.
    scores = np.log([strengths[index] for index in range(len(strengths))])
    _check_converged(scores, votes, number, prior)
    scores = scores[: len(listed)] - scores[: len(listed)].mean()
    return dict(zip(listed, scores.tolist(), strict=True))


def _check_k(k: float) -> None:
    if not 0 < k < math.inf:
        raise ValueError(f"`k` must be a positive number of Elo points, got {k}.")


def _winners(votes: Sequence[Vote]) -> list[evalica.Winner]:
    return [evalica.Winner.Draw if vote.tie else evalica.Winner.X for vote in votes]


def _sequential(votes: Sequence[Vote], items: Sequence[Hashable], k: float, initial: float) -> Scores:
    number = {item: index for index, item in enumerate(items)}
    result = evalica.elo(
        [number[vote.winner] for vote in votes],
        [number[vote.loser] for vote in votes],
        _winners(votes),
        initial=initial,
        k=k,
    )
    played = result.scores.to_dict()
    return {item: float(played.get(index, initial)) for item, index in number.items()}


def _check_converged(
    scores: NDArray[np.float64], votes: Sequence[Vote], number: dict[Hashable, int], prior: float
) -> None:
    # At the optimum every item has won as many votes as its score makes likely. evalica stops at a step size or at
    # its limit, and neither says how far the optimum is. What Newton's method would still move does, in nats; surplus
    # votes alone do not, since a chain of few votes hides behind many votes elsewhere.
    winners = np.array([number[vote.winner] for vote in votes])
    losers = np.array([number[vote.loser] for vote in votes])
    outcomes = np.array([0.5 if vote.tie else 1.0 for vote in votes])
    chances = expit(scores[winners] - scores[losers])
    balance, curvature = np.zeros(len(number)), np.zeros((len(number), len(number)))
    for sign, ones, others in ((1, winners, losers), (-1, losers, winners)):
        np.add.at(balance, ones, sign * (outcomes - chances))
        np.add.at(curvature, (ones, ones), chances * (1 - chances))
        np.add.at(curvature, (ones, others), -chances * (1 - chances))
    if prior:
        against = expit(scores[:-1] - scores[-1])
        balance += prior * (1 - 2 * against)
        np.fill_diagonal(curvature, curvature.diagonal() + 2 * prior * against * (1 - against))
    else:
        curvature += 1  # all scores may move together, which changes nothing
    try:
        left = np.abs(np.linalg.solve(curvature, balance)).max()
    except np.linalg.LinAlgError:
        left = math.inf
    if not left < 1e-4:
        raise RuntimeError(
            f"The Bradley-Terry fit is off by {left:.2g} nats after evalica's last step: the votes hold long chains "
            "of items that hardly ever lose. Give a larger `prior`."
        )
