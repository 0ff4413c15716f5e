"""What the judgements so far say: of labellers, of their agreement, and of the models that wrote the answers."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import combinations
from statistics import median
from time import monotonic
from typing import Any, NamedTuple

from rlhf_recipes.statistics.agreement import human_agreement, krippendorff_alpha
from rlhf_recipes.tools.labeling.records import STRENGTHS, Item, Judgement
from rlhf_recipes.tools.labeling.store import Store
from rlhf_recipes.tools.ranking.ranking import ELO_PER_NAT, bradley_terry
from rlhf_recipes.tools.ranking.score_intervals import bootstrap_scores
from rlhf_recipes.tools.ranking.votes import Vote

MOST_JUDGEMENTS, MOST_VOTES = 20_000, 2_000  # 2,000 votes and 100 draws take 2 s, however long labelling goes on
_DRAWS = 100
_FRESH_SECONDS = 10.0


class LabellerResults(NamedTuple):
    """What one labeller did.

    Attributes:
        name: Who.
        judged: Judgements that hold, without skips.
        skipped: Items that were skipped.
        incomparable: Items that could not be compared.
        undone: Judgements that were taken back.
        seconds: Median time for an item; `nan` where no time is known.
        first: Share of the decided pairs in which the answer shown first won; `nan` without any.
        gold: Against the known answers, as `human_agreement` returns it; None where there is none.
    """

    name: str
    judged: int
    skipped: int
    incomparable: int
    undone: int
    seconds: float
    first: float
    gold: Mapping[str, Any] | None


class Standing(NamedTuple):
    """A model's Bradley-Terry score in Elo points around 1500, with its 95 % interval where votes give one."""

    model: str
    score: float
    low: float | None
    high: float | None
    votes: int


class Results(NamedTuple):
    """What the judgements say.

    Attributes:
        labellers: By name.
        alpha: Krippendorff's alpha of the choices (first, tie, second) on pairs that several judged.
        strength_alpha: The same with the strengths, as numbers from -3 to 3.
        shared: Number of pairs that several judged; a ranking has one for every two of its answers.
        standings: The best model first.
        votes: Number of votes they rest on, at most `MOST_VOTES`.
        judgements: Number of judgements that all of this rests on, at most `MOST_JUDGEMENTS`.
    """

    labellers: list[LabellerResults]
    alpha: float
    strength_alpha: float
    shared: int
    standings: list[Standing]
    votes: int
    judgements: int


class LiveResults:
    """Results that are computed beside the requests that show them, at most every ten seconds.

    Args:
        store: The database.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._items = store.items()
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._latest: Results | None = None
        self._next: Future[Results] | None = None
        self._started = -math.inf

    def get(self) -> Results | None:
        """Return the latest results; None while the first ones are computed."""
        with self._lock:
            if self._next is not None and self._next.done():
                self._latest, self._next = self._next.result(), None
            if self._next is None and monotonic() - self._started > _FRESH_SECONDS:
                self._started = monotonic()
                self._next = self._worker.submit(self._compute)
            return self._latest

    def _compute(self) -> Results:
        judgements = self._store.judgements(latest=MOST_JUDGEMENTS)
        if any(judgement.item not in self._items for judgement in judgements):
            self._items = self._store.items()  # some were added; none is ever changed or removed
        return compute_results(self._items, judgements)


def compute_results(items: Mapping[int, Item], judgements: Sequence[Judgement]) -> Results:
    """Compute what judgements say.

    Args:
        items: The items by number.
        judgements: Judgements of them, those that were taken back too.

    Returns:
        The results.

    Example:
        >>> from rlhf_recipes.tools.labeling.records import Answer
        >>> item = Item({"prompt": "Hi", "completions": ["Hello!", "No."]}, models=["new", "old"])
        >>> says = [Judgement(1, 0, name, Answer("ranked", [1, 2]), [0, 1], None, None, 900, None) for name in "ab"]
        >>> found = compute_results({0: item}, says)
        >>> found.shared, found.labellers[0].first, found.votes
        (1, 1.0, 2)
    """
    holding = [judgement for judgement in judgements if judgement.undone_at is None]
    ranked = [judgement for judgement in holding if judgement.answer.ranks is not None]
    votes = [vote for judgement in ranked for vote in votes_of(items[judgement.item], judgement)][-MOST_VOTES:]
    names = sorted({judgement.labeller for judgement in judgements})
    own: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        own[judgement.labeller].append(judgement)
    alpha, shared = _alpha(ranked)
    signed = [judgement for judgement in ranked if _signed_strength(judgement) is not None]
    strength_alpha = krippendorff_alpha(
        [float(_signed_strength(judgement) or 0) for judgement in signed],
        [judgement.item for judgement in signed],
        interval=True,
    )
    return Results(
        labellers=[_of_labeller(name, items, own[name]) for name in names],
        alpha=alpha,
        strength_alpha=strength_alpha,
        shared=shared,
        standings=_standings(votes),
        votes=len(votes),
        judgements=len(judgements),
    )


def votes_of(item: Item, judgement: Judgement) -> list[Vote]:
    """Read a judgement as votes between the models that wrote the answers.

    Args:
        item: What was judged.
        judgement: The judgement, with ranks.

    Returns:
        A vote for every two answers of different models, in one `group` for each item; none where it names no models.

    Example:
        >>> from rlhf_recipes.tools.labeling.records import Answer
        >>> item = Item({"prompt": "Hi", "completions": ["Hello!", "No."]}, models=["new", "old"])
        >>> votes_of(item, Judgement(1, 7, "Ann", Answer("ranked", [2, 1]), None, None, None, None, None))
        [Vote(winner='old', loser='new', tie=False, group=7)]
    """
    if item.models is None or judgement.answer.ranks is None:
        return []
    return [
        Vote(*((first, second) if outcome > 0 else (second, first)), tie=outcome == 0, group=judgement.item)
        for (first, second), outcome in zip(
            combinations(item.models, 2), _outcomes(judgement.answer.ranks), strict=True
        )
        if first != second
    ]


def _outcomes(ranks: Sequence[int]) -> list[int]:
    """For every two answers 1 where the first is better, -1 where the second is, 0 for a tie."""
    return [(first < second) - (first > second) for first, second in combinations(ranks, 2)]


def _alpha(ranked: Sequence[Judgement]) -> tuple[float, int]:
    values: list[float] = []
    units: list[str] = []
    times: dict[str, int] = defaultdict(int)
    for judgement in ranked:
        for place, outcome in enumerate(_outcomes(judgement.answer.ranks or [])):
            unit = f"{judgement.item}/{place}"
            values.append(outcome)
            units.append(unit)
            times[unit] += 1
    return krippendorff_alpha(values, units), sum(number > 1 for number in times.values())


def _signed_strength(judgement: Judgement) -> int | None:
    """From -3 (the second is much better) to 3; 0 for a tie, None where the strength is not known."""
    ranks, strength = judgement.answer.ranks, judgement.answer.strength
    if ranks == [1, 1]:
        return 0
    if strength is None or ranks is None:
        return None
    return (STRENGTHS.index(strength) + 1) * (1 if ranks == [1, 2] else -1)


def _of_labeller(name: str, items: Mapping[int, Item], judgements: Sequence[Judgement]) -> LabellerResults:
    holding = [judgement for judgement in judgements if judgement.undone_at is None]
    verdicts = [judgement.answer.verdict for judgement in holding]
    times = [judgement.milliseconds for judgement in holding if judgement.milliseconds is not None]
    firsts = [
        judgement.shown[0] == judgement.answer.ranks.index(1)
        for judgement in holding
        if judgement.shown is not None
        and judgement.answer.ranks is not None
        and sorted(judgement.answer.ranks) == [1, 2]
    ]
    return LabellerResults(
        name=name,
        judged=len(holding) - verdicts.count("skipped"),
        skipped=verdicts.count("skipped"),
        incomparable=verdicts.count("incomparable"),
        undone=len(judgements) - len(holding),
        seconds=median(times) / 1000 if times else math.nan,
        first=sum(firsts) / len(firsts) if firsts else math.nan,
        gold=_against_gold(items, holding),
    )


def _against_gold(items: Mapping[int, Item], judgements: Sequence[Judgement]) -> Mapping[str, Any] | None:
    said: list[float] = []
    known: list[float] = []
    for judgement in judgements:
        gold = items[judgement.item].gold
        if gold is not None and judgement.answer.ranks is not None:
            said += ((outcome + 1) / 2 for outcome in _outcomes(judgement.answer.ranks))
            known += ((outcome + 1) / 2 for outcome in _outcomes(gold))
    return human_agreement(said, known) if said else None


def _standings(votes: Sequence[Vote]) -> list[Standing]:
    if len({vote.group for vote in votes}) < 2:
        return []  # a bootstrap of one item says nothing
    # Models that no vote connects yet are scored by the prior, and have no interval.
    scores = bootstrap_scores(votes, partial(bradley_terry, allow_disconnected=True), resamples=_DRAWS)
    numbers: dict[Any, int] = defaultdict(int)
    for vote in votes:
        numbers[vote.winner] += 1
        numbers[vote.loser] += 1
    standings = [
        Standing(
            model=str(model),
            score=_elo(score),
            low=None if low is None else _elo(low),
            high=None if high is None else _elo(high),
            votes=numbers[model],
        )
        for model, (score, low, high) in scores.items()
    ]
    return sorted(standings, key=lambda standing: -standing.score)


def _elo(score: float) -> float:
    return 1500 + ELO_PER_NAT * score
