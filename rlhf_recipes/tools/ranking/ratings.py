"""Ratings from rankings: the rows that a reward model is fitted to by regression."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from rlhf_recipes.tools.ranking.ranking import ScoringMethod, bradley_terry
from rlhf_recipes.tools.ranking.votes import Vote, votes_of_ranking

Pool = Literal["row", "prompt", "all"]


def rate_rankings(
    table: Dataset, method: ScoringMethod = bradley_terry, pool: Pool = "row", normalize: bool = True
) -> Dataset:
    """Give every ranked completion a rating.

    What is pooled shares one scale: more rankings of the same completions make their ratings more exact. Ratings of
    different pools have the same zero by construction only: how good a pool is as a whole, no ranking within it says.

    Args:
        table: Preference table with `prompt`, `completions` and `ranks` (1 = best, ties share a rank), and possibly
            `completion_ids`. Equal completions of one row count once.
        method: Turns votes into scores, such as `bradley_terry`, `average_elo` or `functools.partial(elo, k=16)`.
        pool: Which votes are scored together. "row": each ranking alone. "prompt": all rankings of a prompt; the same
            text with the same token ids is the same item. "all": all rankings; the same text is the same item under
            every prompt, and votes must connect all items.
        normalize: Shift and scale all ratings of the table to mean 0 and standard deviation 1, so that the loss and
            the learning rate do not depend on the method's unit. Rate training and test rows together, or their
            units differ.

    Returns:
        The table with `ratings`, `K` floats a row in the order of `completions`, in place of `ranks`, which the
        ratings of a pool may contradict. Other columns stay as they are.

    Raises:
        ValueError: If a column is missing; a row has no valid ranking, ranks equal completions differently or has
            nothing but equal ones (with the row, from 0); votes are refused by the method; or all ratings are equal
            and cannot be normalized.

    Example:
        >>> rows = {"prompt": ["q", "r"], "completions": [["a", "b"], ["c", "d"]], "ranks": [[2, 1], [1, 2]]}
        >>> rate_rankings(Dataset.from_dict(rows))["ratings"][:]
        [[-1.0, 1.0], [1.0, -1.0]]
    """
    if missing := {"prompt", "completions", "ranks"} - set(table.column_names):
        raise ValueError(f"Expected a table with {sorted(missing)} beside its columns {table.column_names}.")
    read = [name for name in ("prompt", "completions", "ranks", "completion_ids") if name in table.column_names]
    rows: list[Mapping[str, Any]] = list(table.select_columns(read))
    items = [_items(row, number, pool) for number, row in enumerate(rows)]
    pools = [{"row": number, "prompt": _text(row["prompt"]), "all": 0}[pool] for number, row in enumerate(rows)]
    votes: dict[Hashable, list[Vote]] = {}
    for number, row in enumerate(rows):
        votes.setdefault(pools[number], []).extend(_votes(items[number], row["ranks"], number))
    scores = {key: method(group_votes, allow_disconnected=pool == "prompt") for key, group_votes in votes.items()}
    ratings = [[scores[key][item] for item in row_items] for key, row_items in zip(pools, items, strict=True)]
    table = table.remove_columns([name for name in ("ranks", "ratings") if name in table.column_names])
    return table.add_column("ratings", _normalized(ratings) if normalize else ratings)


def _items(row: Mapping[str, Any], number: int, pool: Pool) -> list[Hashable]:
    # What the completions of a row are told apart by.
    completions, ranks, ids = row["completions"], row["ranks"], row.get("completion_ids")
    if completions is None or ranks is None or len(completions) != len(ranks):
        raise ValueError(
            f"Row {number} has no ranking: `ranks` {ranks!r} for {len(completions or [])} completions. Give one rank "
            "for each completion, 1 for the best."
        )
    if pool == "all" or ids is None:
        return [_text(completion) for completion in completions]
    return [(_text(completion), *tokens) for completion, tokens in zip(completions, ids, strict=True)]


def _text(value: str | list[dict[str, Any]]) -> str:
    # A text, or a chat in one spelling.
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _votes(items: list[Hashable], ranks: list[int], number: int) -> list[Vote]:
    rank_of: dict[Hashable, int] = {}
    for item, rank in zip(items, ranks, strict=True):
        if rank_of.setdefault(item, rank) != rank:
            raise ValueError(
                f"Row {number} contradicts itself: it gives the ranks {rank_of[item]} and {rank} to equal completions "
                f"({str(item)[:60]}). Give them one rank."
            )
    if len(rank_of) < 2:
        raise ValueError(f"Row {number} has fewer than two distinct completions: nothing is ranked. Leave it out.")
    try:
        return votes_of_ranking(list(rank_of), list(rank_of.values()), group=number)
    except ValueError as error:
        raise ValueError(f"Row {number}: {error}") from error


def _normalized(ratings: Iterable[list[float]]) -> list[list[float]]:
    rows = list(ratings)
    values = np.concatenate([np.asarray(row) for row in rows])
    mean, deviation = values.mean(), values.std()
    if not deviation > 0:
        raise ValueError("All ratings are equal, so there is nothing to learn from them: every ranking is a tie.")
    return [((np.asarray(row) - mean) / deviation).tolist() for row in rows]
