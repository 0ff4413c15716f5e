import math
import time

import pytest

from rlhf_recipes.tools.labeling import results as results_module
from rlhf_recipes.tools.labeling.records import Answer, Item, Judgement
from rlhf_recipes.tools.labeling.results import LiveResults, compute_results, votes_of
from tests.tools.labeling.conftest import pairs


def judged(item, name, ranks, shown=(0, 1), strength="clearly", milliseconds=1000, verdict="ranked", undone_at=None):
    answer = Answer(verdict, ranks, strength)
    return Judgement(item * 10 + ord(name[0]), item, name, answer, list(shown), None, None, milliseconds, undone_at)


def test_numbers_of_a_labeller_by_hand():
    items = {n: item._replace(gold=[1, 2] if n < 3 else None) for n, item in enumerate(pairs(6))}
    found = compute_results(
        items,
        [
            judged(0, "Ann", [1, 2], milliseconds=1000),  # right, and the first on the page wins
            judged(1, "Ann", [2, 1], shown=(1, 0), milliseconds=9000),  # wrong, and again the first on the page
            judged(2, "Ann", [1, 1]),  # half right
            judged(3, "Ann", [2, 1], milliseconds=3000),
            judged(4, "Ann", None, verdict="skipped"),
            judged(5, "Ann", None, verdict="incomparable"),
            judged(5, "Ann", [1, 2], undone_at="then"),
        ],
    )
    [ann] = found.labellers
    assert (ann.name, ann.judged, ann.skipped, ann.incomparable, ann.undone) == ("Ann", 5, 1, 1, 1)
    assert ann.seconds == 1.0
    assert ann.first == 2 / 3
    assert (ann.gold["accuracy"], ann.gold["pairs"]) == (0.5, 3)
    assert (found.shared, found.standings, found.judgements) == (0, [], 7)
    assert math.isnan(found.alpha)


def test_agreement_by_hand():
    items = dict(enumerate(pairs(3)))
    same = [judged(0, name, [1, 2]) for name in ("Ann", "Bob")] + [judged(1, name, [2, 1]) for name in ("Ann", "Bob")]
    assert compute_results(items, same).alpha == 1.0
    # Pairs (1, 1), (-1, -1), (1, -1): of six judgements three are of each kind.
    # Observed 2 of 6 differ; expected 2 * 3 * 3 / 30 = 0.6. So 1 - (1/3) / 0.6.
    split = [*same, judged(2, "Ann", [1, 2]), judged(2, "Bob", [2, 1])]
    found = compute_results(items, split)
    assert found.alpha == pytest.approx(4 / 9)
    assert found.shared == 3
    # All with the strength 2 of 3, so that every difference is 0 or 4 squared: the same alpha.
    assert found.strength_alpha == pytest.approx(4 / 9)
    one_apart = [*same, judged(2, "Ann", [1, 2], strength="much"), judged(2, "Bob", [1, 2], strength="clearly")]
    found = compute_results(items, one_apart)
    assert found.alpha == 1.0
    assert 0.9 < found.strength_alpha < 1
    undone = [*same, judged(2, "Ann", [1, 2]), judged(2, "Bob", [2, 1], undone_at="then")]
    assert compute_results(items, undone).shared == 2


def test_a_ranking_is_a_pair_for_every_two_answers():
    item = Item({"prompt": "q", "completions": list("abc")}, models=["x", "y", "x"])
    said = [judged(0, "Ann", [1, 2, 3], (0, 1, 2), None), judged(0, "Bob", [1, 3, 2], (2, 1, 0), None)]
    found = compute_results({0: item}, said)
    assert found.shared == 3
    assert [(vote.winner, vote.loser) for vote in votes_of(item, said[0])] == [("x", "y"), ("y", "x")]
    assert found.votes == 4
    assert math.isnan(found.labellers[0].first)


def test_standings_of_models_have_intervals_where_votes_give_them():
    items = {n: item._replace(models=["new", "old"]) for n, item in enumerate(pairs(40))}
    said = [judged(n, "Ann", [1, 2] if n % 4 else [2, 1]) for n in range(40)]
    new, old = compute_results(items, said).standings
    # 30 wins of 40 and a prior of one vote against 0 for each: the two are symmetric around 1500.
    assert (new.model, old.model, new.votes) == ("new", "old", 40)
    assert new.low < new.score < new.high
    assert new.score - 1500 == pytest.approx(1500 - old.score)
    assert 150 < new.score - old.score < 400 / math.log(10) * math.log(3), "the prior pulls log(3) nats together"
    assert compute_results(items, said[:1]).standings == [], "one item draws no interval"
    assert compute_results(items, [one for one in said if one.answer.ranks == [1, 2]]).standings[0].low is None


def test_votes_are_bounded(monkeypatch):
    monkeypatch.setattr(results_module, "MOST_VOTES", 5)
    items = {n: item._replace(models=["new", "old"]) for n, item in enumerate(pairs(9))}
    found = compute_results(items, [judged(n, "Ann", [1, 2] if n > 3 else [2, 1]) for n in range(9)])
    assert found.votes == 5
    assert found.standings[0].model == "new", "the latest count"


def test_requests_do_not_compute_again_and_again(opened, monkeypatch):
    store, calls, now = opened(pairs(2)), [], [0.0]
    monkeypatch.setattr(results_module, "monotonic", lambda: now[0])
    compute = results_module.compute_results
    monkeypatch.setattr(results_module, "compute_results", lambda *args: calls.append(1) or compute(*args))
    live = LiveResults(store)
    assert live.get() is None, "no request waits"

    def wait_for(judgements):
        deadline = time.monotonic() + 30
        while (found := live.get()) is None or found.judgements != judgements:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    wait_for(0)
    ann = store.session(store.sign_in("Ann"))
    store.judge(ann, store.show(ann).number, Answer("ranked", [1, 2]))
    for _ in range(50):
        assert live.get().judgements == 0
    assert len(calls) == 1
    now[0] += 11
    assert live.get().judgements == 0, "the last ones, while the next ones are computed"
    wait_for(1)
    assert len(calls) == 2
