import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rlhf_recipes.tools.labeling import store as store_module
from rlhf_recipes.tools.labeling.database import create
from rlhf_recipes.tools.labeling.records import Answer, Item, Judgement, checked, dense
from rlhf_recipes.tools.labeling.store import Store
from tests.tools.labeling.conftest import pairs

FIRST = Answer("ranked", [1, 2], "clearly")


def signed_in(store, name="Ann"):
    return store.session(store.sign_in(name))


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        now = 1_800_000_000.0

    monkeypatch.setattr(store_module, "time", lambda: Clock.now)
    return Clock


class TestOneLabeller:
    def test_every_item_is_shown_once_in_a_seeded_order(self, opened):
        store = opened(pairs(20))
        ann, seen = signed_in(store), []
        while (showing := store.show(ann)) is not None:
            assert store.show(ann).number == showing.number, "loading the page again changes nothing"
            seen.append(showing.number)
            assert store.judge(ann, showing.number, FIRST)
        assert sorted(seen) == list(range(20))
        assert seen != sorted(seen)
        other = opened(pairs(20), name="other.sqlite")
        assert other.show(signed_in(other)).number == seen[0]
        assert opened(pairs(20), name="third.sqlite", seed=1).settings["seed"] == "1"

    def test_the_order_of_the_answers_is_recorded_and_that_of_labeller_and_item(self, opened):
        store = opened(pairs(200))
        ann = signed_in(store)
        showing = store.show(ann)
        store.judge(ann, showing.number, FIRST)
        [judgement] = store.judgements()
        assert judgement.shown == showing.shown == store.order("Ann", showing.number, 2)
        orders = {name: [store.order(name, item, 2)[0] for item in range(200)] for name in ("Ann", "Bob")}
        assert orders["Ann"] != orders["Bob"]
        for name in orders:
            assert 70 < sum(orders[name]) < 130, "each side comes first about as often"

    def test_all_of_a_judgement_is_kept(self, opened, clock):
        store = opened(pairs(1))
        ann = signed_in(store)
        store.show(ann)
        clock.now += 2.5
        assert store.judge(ann, 0, Answer("ranked", [2, 1], "much", "shorter"))
        [judgement] = store.judgements()
        assert judgement == Judgement(
            number=1,
            item=0,
            labeller="Ann",
            answer=Answer("ranked", [2, 1], "much", "shorter"),
            shown=store.order("Ann", 0, 2),
            shown_at="2027-01-15T08:00:00.000+00:00",
            judged_at="2027-01-15T08:00:02.500+00:00",
            milliseconds=2500,
            undone_at=None,
        )

    def test_a_second_click_changes_nothing(self, opened):
        store = opened(pairs(2))
        ann = signed_in(store)
        number = store.show(ann).number
        assert store.judge(ann, number, FIRST)
        assert not store.judge(ann, number, Answer("ranked", [2, 1]))
        assert not store.judge(ann, 1 - number, FIRST), "nobody has seen it"
        assert [judgement.answer.ranks for judgement in store.judgements()] == [[1, 2]]

    def test_undone_judgements_stay_and_their_item_comes_back(self, opened):
        store = opened(pairs(3))
        ann = signed_in(store)
        first = store.show(ann)
        store.judge(ann, first.number, FIRST._replace(note="hm"))
        second = store.show(ann)
        assert store.undo(ann)
        again = store.show(ann)
        assert (again.number, again.shown, again.note) == (first.number, first.shown, "hm")
        store.judge(ann, again.number, Answer("ranked", [1, 1]))
        assert store.show(ann).number == second.number
        kept, last = store.judgements()
        assert kept.undone_at is not None
        assert kept.answer.ranks == [1, 2]
        assert last.undone_at is None
        assert store.undo(ann)
        assert not store.undo(ann)
        assert not store.undo(signed_in(store, "Bob"))

    def test_skipped_items_do_not_come_back_and_are_not_judged(self, opened):
        store = opened(pairs(2))
        ann = signed_in(store)
        for verdict in ("skipped", "incomparable"):
            store.judge(ann, store.show(ann).number, Answer(verdict))
        assert store.show(ann) is None
        progress = store.progress(ann)
        assert (progress.done, progress.left, progress.finished, progress.wanted) == (2, 0, 1, 2)
        assert store.show(signed_in(store, "Bob")) is not None


class TestSeveralLabellers:
    def test_two_sessions_never_see_the_same_pair(self, opened):
        store = opened(pairs(4))
        sessions = [signed_in(store, name) for name in ("Ann", "Bob", "Ann")]  # one of them in two browsers
        assert len({store.show(session).number for session in sessions}) == 3
        store.show(signed_in(store, "Eve"))
        assert store.show(signed_in(store, "Dan")) is None

    def test_a_lease_ends_and_a_late_answer_is_not_lost(self, opened, clock):
        store = opened(pairs(1), lease_seconds=60)
        ann, bob = signed_in(store, "Ann"), signed_in(store, "Bob")
        assert store.show(ann).number == 0
        clock.now += 59
        assert store.show(bob) is None
        clock.now += 2
        assert store.show(bob).number == 0
        assert store.show(ann) is None
        store.show(bob)

    def test_an_answer_after_the_end_of_the_lease_is_kept(self, opened, clock):
        store = opened(pairs(1), lease_seconds=60)
        ann, bob = signed_in(store, "Ann"), signed_in(store, "Bob")
        store.show(ann)
        clock.now += 61
        assert store.judge(bob, store.show(bob).number, FIRST)
        assert store.judge(ann, 0, FIRST)
        assert len(store.judgements()) == 2

    def test_leaving_gives_the_pair_back_unless_the_page_was_loaded_again(self, opened):
        store = opened(pairs(1))
        ann, bob = signed_in(store, "Ann"), signed_in(store, "Bob")
        old = store.show(ann)
        new = store.show(ann)
        store.leave(ann, old.showing)  # the message of the page that was loaded again comes late
        assert store.show(bob) is None
        store.leave(ann, new.showing)
        assert store.show(bob).number == 0

    def test_who_comes_back_gets_the_same_pair(self, opened):
        store = opened(pairs(50))
        ann = signed_in(store)
        showing = store.show(ann)
        store.leave(ann, showing.showing)
        assert store.show(ann).number == showing.number

    def test_signing_out_gives_the_pair_back_and_ends_the_session(self, opened):
        store = opened(pairs(1))
        token = store.sign_in("Ann")
        ann = store.session(token)
        store.show(ann)
        store.sign_out(ann)
        assert store.session(token) is None
        assert store.show(signed_in(store, "Bob")).number == 0

    def test_sessions_end_with_the_password_and_with_time(self, opened, clock):
        token = opened(pairs(1), secret="old password").sign_in("Ann")
        assert opened(pairs(1), secret="old password").session(token).labeller == "Ann"
        assert opened(pairs(1), secret="new password").session(token) is None
        clock.now += 8 * 24 * 3600
        assert opened(pairs(1), secret="old password").session(token) is None

    @pytest.mark.parametrize(
        ("per_item", "shared", "judgements"), [(1, 1.0, 10), (3, 1.0, 30), (2, 0.3, 13), (3, 0.0, 10)]
    )
    def test_a_share_of_the_items_is_judged_by_several(self, opened, per_item, shared, judgements):
        store = opened(pairs(10))
        store.want(per_item, shared)
        label_all(store, [signed_in(store, name) for name in ("Ann", "Bob", "Eve", "Dan")])
        found = store.judgements()
        assert len(found) == judgements == len({(one.item, one.labeller) for one in found})
        times = Counter(one.item for one in found)
        assert sorted(times.values())[-round(10 * shared) :] == [per_item] * round(10 * shared) or shared == 0

    def test_more_can_be_asked_for_later(self, opened):
        store = opened(pairs(4))
        ann, bob = signed_in(store, "Ann"), signed_in(store, "Bob")
        label_all(store, [ann])
        assert store.show(bob) is None
        store.want(2, None)
        label_all(store, [ann, bob])
        assert Counter(one.labeller for one in store.judgements()) == {"Ann": 4, "Bob": 4}
        with pytest.raises(ValueError, match="Expected at least 1 labeller"):
            store.want(0, None)
        with pytest.raises(ValueError, match=r"got 2 and 1\.5"):
            store.want(None, 1.5)

    def test_known_answers_are_for_everybody_and_no_others(self, opened):
        items = pairs(4) + [item._replace(gold=[1, 2]) for item in pairs(6)[4:]]
        store = opened(items)
        label_all(store, [signed_in(store, name) for name in ("Ann", "Bob", "Eve")])
        times = Counter(one.item for one in store.judgements())
        assert times == {0: 1, 1: 1, 2: 1, 3: 1, 4: 3, 5: 3}
        progress = store.progress(signed_in(store, "Dan"))
        assert (progress.left, progress.finished, progress.wanted) == (2, 4, 4)


def label_all(store, sessions):
    """Let sessions take turns until nothing is left for any of them."""
    left = True
    while left:
        left = False
        for session in sessions:
            if (showing := store.show(session)) is not None:
                left = store.judge(session, showing.number, FIRST)


class TestTheFile:
    def test_it_is_refused_for_other_data_and_goes_on_with_the_same(self, opened):
        store = opened(pairs(3))
        ann = signed_in(store)
        store.judge(ann, store.show(ann).number, FIRST)
        store.close()
        again = opened(pairs(3))
        again.check_same(pairs(3), "moved.jsonl")
        assert len(again.judgements()) == 1
        with pytest.raises(ValueError, match=r"other data \(3 rows of pairs.jsonl\) than new.jsonl \(4 rows\)"):
            again.check_same(pairs(4), "new.jsonl")

    def test_other_files_are_refused_and_stay_as_they_are(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="Name the rows to label"):
            Store(tmp_path / "none.sqlite")
        text = tmp_path / "text.sqlite"
        text.write_text("not a database" * 100)
        with pytest.raises(ValueError, match="cannot be read as a database of labels"):
            Store(text)
        assert text.read_text() == "not a database" * 100
        foreign = tmp_path / "foreign.sqlite"
        with sqlite3.connect(foreign) as database:
            database.execute("CREATE TABLE judgements (x)")
        database.close()
        with pytest.raises(ValueError, match=r"Expected a database of labels, and .* is none"):
            Store(foreign)
        with pytest.raises(FileExistsError, match="is there already"):
            create(foreign, pairs(1))

    def test_a_later_version_is_refused(self, opened):
        store = opened(pairs(1))
        store._database.execute("PRAGMA user_version = 2")
        with pytest.raises(ValueError, match="one of version 2; this is for version 1"):
            Store(store.path)

    def test_every_click_is_synced_to_the_disk(self, opened):
        store = opened(pairs(1))
        pragmas = [store._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        assert pragmas == ["wal", 2]  # FULL

    def test_nothing_is_lost_when_the_process_is_killed(self, tmp_path):
        path = tmp_path / "labels.sqlite"
        create(path, pairs(500))
        program = (
            "import sys, pathlib; from rlhf_recipes.tools.labeling.store import *\n"
            "store = Store(pathlib.Path(sys.argv[1])); ann = store.session(store.sign_in('Ann'))\n"
            "while (showing := store.show(ann)) is not None:\n"
            "    store.judge(ann, showing.number, Answer('ranked', [1, 2]))\n"
            "    print(showing.number, flush=True)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
        said = [int(process.stdout.readline()) for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().splitlines()]
        process.wait()
        store = Store(path)
        kept = [judgement.item for judgement in store.judgements()]
        store.close()
        assert kept[: len(said)] == said
        assert len(kept) - len(said) in (0, 1), "one may be written that was not said yet"

    def test_threads_and_processes_share_a_file(self, opened):
        stores = [opened(pairs(60)), opened(pairs(60))]  # as two servers would
        stores[0].want(2, 1.0)

        def work(store, name):
            session = signed_in(store, name)
            while (showing := store.show(session)) is not None:
                store.judge(session, showing.number, FIRST)

        threads = [threading.Thread(target=work, args=(stores[n % 2], f"labeller {n}")) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        label_all(stores[0], [signed_in(stores[0], f"late {n}") for n in range(2)])
        found = stores[1].judgements()
        assert len(found) == 120 == len({(one.item, one.labeller) for one in found})

    def test_what_was_judged_elsewhere_can_be_brought_along(self, tmp_path):
        past = [Judgement(0, 1, "Ann", FIRST, [1, 0], "then", "now", 5, None)]
        create(tmp_path / "a.sqlite", pairs(2), past=past)
        store = Store(tmp_path / "a.sqlite")
        assert store.judgements() == [past[0]._replace(number=1)]
        assert store.show(signed_in(store, "Bob")).number == 0
        store.close()
        with pytest.raises(ValueError, match="judges the same item twice"):
            create(tmp_path / "b.sqlite", pairs(2), past=past * 2)
        assert [path.name for path in tmp_path.glob("b.*")] == [], "all of it or nothing"


def test_a_tie_has_no_strength_and_ranks_have_no_gaps():
    assert checked(Answer("ranked", [2, 2], "much"), 2) == Answer("ranked", [1, 1])
    assert checked(Answer("ranked", [1, 3, 1], "much"), 3) == Answer("ranked", [1, 2, 1])
    assert checked(Answer("skipped", strength="much", note="x"), 2) == Answer("skipped", note="x")


@pytest.mark.parametrize(
    ("answer", "number", "message"),
    [
        (Answer("liked"), 2, "got 'liked'"),
        (Answer("ranked"), 2, "Expected ranks with the verdict `ranked` alone"),
        (Answer("skipped", [1, 2]), 2, "Expected ranks"),
        (Answer("ranked", [1, 2]), 3, "a rank from 1 to 3 for each of the 3 answers"),
        (Answer("ranked", [0, 1]), 2, "a rank from 1 to 2"),
        (Answer("ranked", [1, 2], "hugely"), 2, "Expected a strength of slightly, clearly, much"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(answer, number, message):
    with pytest.raises(ValueError, match=message):
        checked(answer, number)


@given(st.lists(st.integers(1, 9), min_size=1))
def test_dense_ranks_keep_the_order_and_have_no_gaps(ranks):
    found = dense(ranks)
    assert sorted(set(found)) == list(range(1, len(set(ranks)) + 1))
    for one, its in zip(ranks, found, strict=True):
        for other, others in zip(ranks, found, strict=True):
            assert (one < other) == (its < others)


class Labelling(RuleBasedStateMachine):
    """Labellers come, judge, take back, leave and come again, in any order; a plain list remembers what was said."""

    folder = None

    @initialize(wanted=st.integers(1, 2), gold=st.integers(0, 1))
    def start(self, wanted, gold):
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "labels.sqlite"
        items = pairs(4)
        create(path, items[: 4 - gold] + [item._replace(gold=[1, 2]) for item in items[4 - gold :]])
        self.store, self.wanted, self.gold = Store(path), wanted, {3} if gold else set()
        self.store.want(wanted, 1.0)
        self.sessions = [signed_in(self.store, name) for name in ("Ann", "Bob", "Ann")]
        self.seen, self.holding, self.undone = {}, [], 0

    @rule(who=st.integers(0, 2))
    def load(self, who):
        showing = self.store.show(self.sessions[who])
        self.seen.pop(who, None)
        if showing is not None:
            name = self.sessions[who].labeller
            assert (name, showing.number) not in [(said[0], said[1]) for said in self.holding]
            self.seen[who] = showing

    @rule(who=st.integers(0, 2), ranks=st.sampled_from([[1, 2], [2, 1], [1, 1]]))
    def judge(self, who, ranks):
        if who in self.seen:
            number = self.seen.pop(who).number
            assert self.store.judge(self.sessions[who], number, Answer("ranked", ranks))
            self.holding.append((self.sessions[who].labeller, number, ranks, who))

    @rule(who=st.integers(0, 2))
    def undo(self, who):
        own = [said for said in self.holding if said[3] == who]
        assert self.store.undo(self.sessions[who]) == bool(own)
        if own:
            self.holding.remove(own[-1])
            self.undone += 1
            self.seen.pop(who, None)
            self.load(who)
            assert self.seen[who].number == own[-1][1]

    @invariant()
    def nothing_is_lost_and_nothing_is_seen_twice(self):
        if not hasattr(self, "store"):
            return
        found = self.store.judgements()
        assert [(one.labeller, one.item, one.answer.ranks) for one in found if one.undone_at is None] == [
            said[:3] for said in self.holding
        ]
        assert sum(one.undone_at is not None for one in found) == self.undone
        busy = Counter(showing.number for showing in self.seen.values())
        done = Counter(number for _, number, _, _ in self.holding)
        for number in set(range(4)) - self.gold:
            assert busy[number] + done[number] <= self.wanted

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_labelling_in_any_order(tmp_path):
    from hypothesis.stateful import run_state_machine_as_test

    Labelling.folder = tmp_path
    run_state_machine_as_test(
        Labelling,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


class TestAdding:
    def test_an_open_page_shows_what_another_process_adds(self, opened):
        served, loop = opened(pairs(2)), opened([])
        ann = signed_in(served)
        for _ in range(2):
            assert served.judge(ann, served.show(ann).number, FIRST)
        assert served.show(ann) is None
        more = [Item(item.row | {"prompt": "later"}) for item in pairs(3)]
        assert loop.add(more, "round 2")
        seen = []
        while (showing := served.show(ann)) is not None:
            assert showing.item.row["prompt"] == "later"
            seen.append(showing.number)
            served.judge(ann, showing.number, FIRST)
        assert sorted(seen) == [2, 3, 4]
        assert served.progress(ann).finished == 5

    def test_what_was_added_is_not_added_again_and_never_replaced(self, opened):
        store = opened(pairs(2))
        assert store.add(pairs(3), "round 2")
        assert not store.add(pairs(3), "round 2")
        assert not store.add(pairs(2), "pairs.jsonl"), "the name and the items that it was made of"
        with pytest.raises(ValueError, match="other items under the name 'round 2'"):
            store.add(pairs(4), "round 2")
        assert sorted(store.items()) == [0, 1, 2, 3, 4]
        store.check_same(pairs(2), "pairs.jsonl")

    def test_wishes_for_several_labellers_hold_for_what_is_added(self, opened):
        store = opened(pairs(4))
        store.want(2, 0.5)
        store.add(pairs(10, gold=None), "more")
        wanted = store._all("SELECT item, wanted, missing FROM items WHERE item >= 4")
        assert sorted(number for _, number, _ in wanted) == [1] * 5 + [2] * 5
        assert all(number == missing for _, number, missing in wanted)

    def test_what_a_lone_labeller_skips_is_not_waited_for(self, opened):
        store = opened(pairs(3))
        ann = signed_in(store)
        first = store.show(ann).number
        store.judge(ann, first, Answer("skipped"))
        assert store.open_items() == [item for item in range(3) if item != first]
        store.undo(ann)
        assert store.open_items() == [0, 1, 2]

    def test_a_program_judges_what_is_left_and_nothing_twice(self, opened):
        store = opened(pairs(5))
        calls = []

        def say(number, item):
            calls.append(number)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return Answer("ranked", [1, 2]) if number % 2 else Answer("incomparable")

        with pytest.raises(KeyboardInterrupt):
            store.judge_all("program", say)
        assert len(store.judgements()) == 2
        assert store.judge_all("program", say) == 3
        assert store.judge_all("program", say) == 0
        judged = {judgement.item: judgement.answer.verdict for judgement in store.judgements()}
        assert judged == {n: "ranked" if n % 2 else "incomparable" for n in range(5)}
        assert store.open_items() == []
