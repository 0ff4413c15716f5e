"""Votes: who was preferred to whom. Rankings are read as one vote for each pair that they hold."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


class Vote(NamedTuple):
    """One comparison of two items, such as two completions or two models.

    Attributes:
        winner: The preferred item; of a tie, either one.
        loser: The other item.
        tie: Whether neither was preferred.
        group: What the vote belongs with, such as its rater, prompt or ranking; None if it stands alone. A bootstrap
            draws whole groups.
    """

    winner: Hashable
    loser: Hashable
    tie: bool = False
    group: Hashable = None


def votes_of_ranking(items: Sequence[Hashable], ranks: Sequence[int], group: Hashable = None) -> list[Vote]:
    """Read a ranking of `K` items as `K (K - 1) / 2` votes.

    Args:
        items: `K` distinct items.
        ranks: Rank of each item: 1 is the best, ties share a rank, and ranks may be left out (1, 1, 3).
        group: What the ranking belongs with.

    Returns:
        One vote for each pair of items, in the order of `items`.

    Raises:
        ValueError: If the lengths differ, there are fewer than two items, an item comes twice, or a rank is not a
            whole number from 1 on.

    Example:
        >>> for vote in votes_of_ranking(["a", "b", "c"], [2, 1, 2]):
        ...     print(vote.winner, "=" if vote.tie else ">", vote.loser)
        b > a
        a = c
        b > c
    """
    if len(items) != len(ranks) or len(items) < 2:
        raise ValueError(
            f"A ranking gives one rank to each of at least two items, got {len(items)} items and {len(ranks)} ranks."
        )
    if len(set(items)) != len(items):
        twice = next(item for item in items if list(items).count(item) > 1)
        raise ValueError(f"The ranking contradicts itself: {_short(twice)} is in it twice. Keep one of the two.")
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
            raise ValueError(f"Ranks are whole numbers from 1 (the best) on, got {list(ranks)}.")
    votes = []
    for (first, rank), (second, other_rank) in combinations(zip(items, ranks, strict=True), 2):
        winner, loser = (second, first) if other_rank < rank else (first, second)
        votes.append(Vote(winner, loser, tie=bool(rank == other_rank), group=group))
    return votes


def read_votes(rows: Iterable[Mapping[str, Any]]) -> list[Vote]:
    """Read a table of raw votes.

    Args:
        rows: Rows with `winner` and `loser`, optionally `tie` (a bool) and `group` (the rater, say).

    Returns:
        One vote for each row, in order.

    Raises:
        ValueError: If a row lacks a side or its value is missing, both sides are the same item, or `tie` is not a
            bool; with the row's number (from 0).

    Example:
        >>> read_votes([{"winner": "a", "loser": "b"}, {"winner": "a", "loser": "c", "tie": True, "group": "eve"}])
        [Vote(winner='a', loser='b', tie=False, group=None), Vote(winner='a', loser='c', tie=True, group='eve')]
    """
    votes = []
    for number, row in enumerate(rows):
        vote = Vote(row.get("winner"), row.get("loser"), row.get("tie", False), row.get("group"))
        _check_vote(vote, number, f"; its columns are {sorted(row)}")
        votes.append(vote)
    return votes


def check_votes(
    votes: Sequence[Vote], items: Sequence[Hashable] | None = None, allow_disconnected: bool = False
) -> list[Hashable]:
    """List the items of votes, and check that votes lead from each of them to every other one.

    Where no chain of votes leads from one item to another, nothing is known about which is better.

    Args:
        votes: The votes.
        items: All items, in the wanted order; by default those of the votes, as they come.
        allow_disconnected: Accept items that no chain of votes connects.

    Returns:
        The items.

    Raises:
        ValueError: If there is no vote, a vote is none (a side is missing, both are one item, `tie` is not a bool;
            with its number, from 0), an item is listed twice or is not listed, was never compared, or the votes fall
            apart into unconnected parts.

    Example:
        >>> check_votes([Vote("a", "b"), Vote("c", "a")])
        ['a', 'b', 'c']
    """
    if not votes:
        raise ValueError("There are no votes, so there is nothing to tell the items apart by.")
    for number, vote in enumerate(votes):
        _check_vote(vote, number)
    voted = dict.fromkeys(item for vote in votes for item in (vote.winner, vote.loser))
    listed = list(dict.fromkeys(items)) if items is not None else list(voted)
    if items is not None and len(listed) != len(items):
        raise ValueError(f"`items` lists an item twice: {len(items)} entries, {len(listed)} distinct ones.")
    if unknown := voted.keys() - set(listed):
        raise ValueError(f"{len(unknown)} items of the votes are not in `items`, such as {_short(unknown.pop())}.")
    if allow_disconnected:
        return listed
    if silent := [item for item in listed if item not in voted]:
        raise ValueError(
            f"{len(silent)} of {len(listed)} items were never compared, such as {_short(silent[0])}. Leave them out, "
            "or set `allow_disconnected=True` to score them anyway."
        )
    parts = _parts(votes, listed, directed=False)
    if parts.max() > 0:
        other = listed[int(np.argmax(parts > 0))]
        raise ValueError(
            f"The votes fall apart into {parts.max() + 1} parts: no chain of votes leads from {_short(listed[0])} to "
            f"{_short(other)}, so nothing is known about which is better. Score the parts one by one, or set "
            "`allow_disconnected=True`."
        )
    return listed


def check_undefeated(votes: Sequence[Vote], items: Sequence[Hashable]) -> None:
    """Check that the most likely Bradley-Terry scores are finite without a prior.

    They are if and only if every item beats or ties every other one along some chain of votes.

    Source: L. R. Ford, "Solution of a Ranking Problem from Binary Comparisons", 1957.

    Args:
        votes: The votes.
        items: Their items.

    Raises:
        ValueError: If some items never lose to the others.

    Example:
        >>> check_undefeated([Vote("a", "b"), Vote("b", "c"), Vote("c", "a")], items=["a", "b", "c"])
    """
    parts = _parts(votes, items, directed=True)
    part_of = dict(zip(items, parts, strict=True))
    beaten = {part_of[vote.loser] for vote in votes if not vote.tie and part_of[vote.winner] != part_of[vote.loser]}
    top = [item for item in items if part_of[item] not in beaten]
    if parts.max() > 0:
        raise ValueError(
            f"{len(top)} of {len(items)} items never lose to any of the others, such as {_short(top[0])}: without a "
            "prior their scores grow without limit. Set `prior` above 0."
        )


def identified_items(votes: Sequence[Vote], anchor: Hashable = None) -> set[Hashable]:
    """Find the items whose place among the others the votes alone decide.

    They are the largest part within which every item beats or ties every other one along some chain of votes. An item
    that never lost, or never won, is in no such part: how far ahead or behind it lies is up to the prior or to `k`.
    Nor is a group of items that never loses to the rest.

    Source: L. R. Ford, "Solution of a Ranking Problem from Binary Comparisons", 1957.

    Args:
        votes: The votes.
        anchor: An item: find those whose lead over this one is decided.

    Returns:
        The items of that part, or of the part of `anchor`; none where a part is a single item, or where without
        `anchor` two parts are the largest.

    Example:
        >>> votes = [Vote("a", "b"), Vote("b", "c"), Vote("c", "b")]  # "a" never lost
        >>> sorted(identified_items(votes)), identified_items(votes, anchor="a")
        (['b', 'c'], set())
    """
    items = list(dict.fromkeys(item for vote in votes for item in (vote.winner, vote.loser)))
    parts = _parts(votes, items, directed=True)
    sizes = np.bincount(parts)
    if anchor is not None:
        part = parts[items.index(anchor)] if anchor in items else -1
    else:
        part = int(sizes.argmax()) if (sizes == sizes.max()).sum() == 1 else -1
    if part < 0 or sizes[part] < 2:
        return set()
    return {item for item, own in zip(items, parts, strict=True) if own == part}


def _check_vote(vote: Vote, number: int, columns: str = "") -> None:
    # A side that is missing comes as None, or from a table as nan, which is unlike itself.
    for side, item in (("loser", vote.loser), ("winner", vote.winner)):
        if not isinstance(item, Hashable):
            raise ValueError(
                f"The {side} of vote {number} is a {type(item).__name__}. Name items by texts or numbers."
            )
        if item is None or item != item:
            raise ValueError(
                f"Vote {number} names no `{side}`{columns}. A vote names both items themselves; a tie has both sides, "
                "in either order, and `tie: true`."
            )
    if not isinstance(vote.tie, bool | np.bool_):
        raise ValueError(
            f"`tie` of vote {number} must be true or false, got {vote.tie!r}. Ranks, and numbers or words for a side, "
            "are no votes: name the winner first and the loser second."
        )
    if vote.winner == vote.loser:
        raise ValueError(f"Vote {number} compares {_short(vote.winner)} with itself. Leave it out.")


def _parts(votes: Sequence[Vote], items: Sequence[Hashable], directed: bool) -> NDArray[np.int32]:
    # The number of the part that each item is in; parts are counted as `items` come where direction does not matter.
    number = {item: index for index, item in enumerate(items)}
    edges = [(number[vote.winner], number[vote.loser]) for vote in votes]
    edges += [(loser, winner) for (winner, loser), vote in zip(edges, votes, strict=True) if vote.tie]
    starts, ends = np.array(edges).T
    graph = coo_array((np.ones(len(edges)), (starts, ends)), shape=(len(items), len(items)))
    parts: NDArray[np.int32] = connected_components(graph.tocsr(), directed=directed, connection="strong")[1]
    return parts


def _short(item: Hashable) -> str:
    text = repr(item)
    return text if len(text) <= 60 else f"{text[:57]}..."
