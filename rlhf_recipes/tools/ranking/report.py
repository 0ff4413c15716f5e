"""Report of votes as text: strengths, how far annotators agree, and which pairs to ask about next."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from rlhf_recipes.statistics.agreement import human_agreement
from rlhf_recipes.tools.columns import in_columns
from rlhf_recipes.tools.ranking.active import select_queries
from rlhf_recipes.tools.ranking.ranking import bradley_terry
from rlhf_recipes.tools.ranking.score_intervals import bootstrap_draws, bootstrap_scores
from rlhf_recipes.tools.ranking.votes import Vote, read_votes

_FEWEST = 10  # annotators that are drawn whole: of fewer the draws are too much alike
_MEMBERS = 100  # draws that are asked which pairs they disagree about


def rank_votes(rows: Iterable[Mapping[str, Any]], ask_about: int | None = None, seed: int = 0) -> str:
    """Rank the items of a table of votes.

    Args:
        rows: Votes as `read_votes` takes them, optionally with `annotator`, who voted. Cells that are None count as
            missing. Without `group`, the votes of an annotator are drawn together if there are at least ten of them.
        ask_about: How many pairs to propose for the next votes, those on whose winner the draws of the bootstrap
            disagree most; None for no proposal.
        seed: Seed of the bootstrap.

    Returns:
        Lines of text: Bradley-Terry scores in nats with their 95 % intervals, the best first; the items that the votes
        do not place; each annotator against the majority of the others; the pairs.

    Raises:
        ValueError: If the votes are refused by `read_votes` or `bradley_terry`, all are in one group, or `ask_about`
            is below 1.

    Example:
        >>> votes = [{"winner": "new", "loser": "old"}] * 30 + [{"winner": "old", "loser": "new"}] * 10
        >>> print(rank_votes(votes))
        item   score     95 % interval  votes
        new    0.532    [0.249, 0.925]     40
        old   -0.532  [-0.925, -0.249]     40
        Drawn for the intervals: 40 single votes. Scores in nats, the prior is 1 vote.
    """
    table = [{name: value for name, value in row.items() if value is not None} for row in rows]
    votes, drawn = _grouped(read_votes(table), [row.get("annotator") for row in table])
    scores = bootstrap_scores(votes, bradley_terry, seed=seed)
    order = sorted(scores, key=lambda item: -scores[item].score)
    lines = [["item", "score", "95 % interval", "votes"]]
    for item in order:
        score, low, high = scores[item]
        interval = "not identified" if low is None else f"[{low:.3f}, {high:.3f}]"
        number = sum(item in (vote.winner, vote.loser) for vote in votes)
        lines.append([_shown(item), f"{score:.3f}", interval, str(number)])
    parts = [*in_columns(lines, left=1), f"Drawn for the intervals: {drawn}. Scores in nats, the prior is 1 vote."]
    if unplaced := [_shown(item) for item in order if scores[item].low is None]:
        parts.append(
            f"Not identified: {', '.join(unplaced)}. No chain of votes leads back and forth between these and the "
            "others, so the prior alone says how far apart they are. Ask about pairs with their neighbours."
        )
    parts += _agreement(table, votes)
    if ask_about is not None:
        parts += _next_pairs(votes, order, ask_about, seed)
    return "\n".join(parts)


def _grouped(votes: list[Vote], annotators: Sequence[Hashable]) -> tuple[list[Vote], str]:
    """The votes, in groups that are drawn together, and what these are."""
    if groups := {vote.group for vote in votes} - {None}:
        ungrouped = sum(vote.group is None for vote in votes)
        return votes, f"{len(groups)} groups" + (f" and {ungrouped} single votes" if ungrouped else "")
    names = set(annotators) - {None}
    if len(names) < _FEWEST:
        return votes, f"{len(votes)} single votes"
    own = [vote._replace(group=name) for vote, name in zip(votes, annotators, strict=True)]
    return own, f"{len(names)} annotators"


def _agreement(table: Sequence[Mapping[str, Any]], votes: Sequence[Vote]) -> list[str]:
    """Each annotator against the majority of the others, on what both voted on: a pair of items, in its group."""
    sums: dict[Hashable, dict[Hashable, int]] = defaultdict(lambda: defaultdict(int))
    for row, vote in zip(table, votes, strict=True):
        if (name := row.get("annotator")) is not None:
            # Which side is the first must not depend on who won: it would change what chance gives.
            first, second = sorted((vote.winner, vote.loser), key=repr)
            pair = (row.get("group"), first, second)
            sums[pair][name] += 0 if vote.tie else 1 if vote.winner == first else -1
    names = list(dict.fromkeys(name for by_name in sums.values() for name in by_name))
    if len(names) < 2:
        return []
    lines = [["annotator", "shared", "accuracy", "kappa"]]
    for name in names:
        shared = [by_name for by_name in sums.values() if name in by_name and len(by_name) > 1]
        own = [_outcome(by_name[name]) for by_name in shared]
        others = [_outcome(sum(_sign(by_name[other]) for other in by_name if other != name)) for by_name in shared]
        agreement: Mapping[str, Any] = human_agreement(own, others) if shared else {}
        numbers = [agreement.get(measure, math.nan) for measure in ("accuracy", "kappa")]
        lines.append([_shown(name), str(len(shared)), *("-" if math.isnan(x) else f"{x:.3f}" for x in numbers)])
    return ["", "Each annotator against the majority of the others:", *in_columns(lines, left=1)]


def _outcome(total: int) -> float:
    """1 for the first side, 0 for the second, 0.5 for neither."""
    return (_sign(total) + 1) / 2


def _sign(total: int) -> int:
    return (total > 0) - (total < 0)


def _shown(item: Hashable) -> str:
    text = " ".join(str(item).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _next_pairs(votes: Sequence[Vote], items: Sequence[Hashable], number: int, seed: int) -> list[str]:
    draws = torch.from_numpy(bootstrap_draws(votes, bradley_terry, items, resamples=_MEMBERS, seed=seed))
    pairs = list(combinations(range(len(items)), 2))
    first, second = (draws[:, list(places)] for places in zip(*pairs, strict=True))
    queries = select_queries(first, second, min(number, len(pairs)), seed)
    chances = (first - second).sigmoid()
    lines = [["first", "second", "first wins", "deviation"]]
    for place in queries.tolist():
        left, right = pairs[place]
        chance = chances[:, place]
        lines.append(
            [_shown(items[left]), _shown(items[right]), f"{chance.mean():.2f}", f"{chance.std(correction=0):.3f}"]
        )
    return ["", "Ask next about the pairs on which the draws disagree most:", *in_columns(lines, left=2)]
