import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.data.preferences import compared_pairs, from_label_studio, load_preferences
from rlhf_recipes.tools.labeling.database import create
from rlhf_recipes.tools.labeling.export import preference_rows, vote_rows, write_export
from rlhf_recipes.tools.labeling.items import check_items
from rlhf_recipes.tools.labeling.label_studio import from_tasks, read_items_and_judgements, to_tasks
from rlhf_recipes.tools.labeling.records import STRENGTHS, Answer, Item, Judgement
from rlhf_recipes.tools.labeling.store import Store
from rlhf_recipes.tools.ranking.report import rank_votes
from tests.tools.labeling.conftest import pairs

SAYS = [
    Answer("ranked", [1, 2], "slightly", "a note"),
    Answer("ranked", [2, 1], "much"),
    Answer("ranked", [1, 1]),
    Answer("incomparable", note="two questions"),
    Answer("skipped"),
    Answer("ranked", [1, 2], "clearly"),
    Answer("ranked", [2, 1], "clearly"),
]


def said(number, answer, item=None, name="Ann", undone_at=None):
    item = number if item is None else item
    return Judgement(number + 1, item, name, answer, [1, 0], "then", f"t{number}", 1500, undone_at)


@pytest.fixture
def store(tmp_path):
    """Six kinds of judgements of pairs: the sixth checks the labeller, the seventh was taken back."""
    items = [item._replace(models=["new", "old"]) for item in pairs(7)]
    items[5] = items[5]._replace(gold=[1, 2])
    past = [said(n, answer, undone_at="later" if n == 6 else None) for n, answer in enumerate(SAYS)]
    create(tmp_path / "labels.sqlite", items, past=past)
    store = Store(tmp_path / "labels.sqlite")
    yield store
    store.close()


def test_the_reward_stage_reads_the_file_as_it_is(store, tmp_path):
    text = write_export(store, tmp_path / "prefs.jsonl", "preferences")
    assert "prefs.jsonl: 3 rows" in text
    assert "prefs.left_out.jsonl: 4 judgements" in text
    table = load_preferences(str(tmp_path / "prefs.jsonl"))
    assert compared_pairs(table) is table
    assert table["label"][:] == [1.0, 0.0, 0.5]
    assert [round(margin, 3) for margin in table["margin"]] == [0.333, 1.0, 0.0]
    assert table["completions"][0] == ["good 0", "bad 0"]
    assert table["row"][:] == [0, 1, 2]
    provenance = {
        name: table[0][name] for name in ("annotator", "grade", "note", "shown", "judged_at", "milliseconds")
    }
    assert provenance == {
        "annotator": "Ann",
        "grade": "slightly",
        "note": "a note",
        "shown": [1, 0],
        "judged_at": "t0",
        "milliseconds": 1500,
    }
    assert {name: table[0][name] for name in provenance} == provenance
    left_out = [json.loads(line) for line in (tmp_path / "prefs.left_out.jsonl").read_text().splitlines()]
    assert [row["left_out"] for row in left_out] == ["incomparable", "skipped", "known answer", "taken back"]
    assert [row.get("label") for row in left_out] == [None, None, 1.0, 0.0]
    assert left_out[0]["note"] == "two questions"
    assert left_out[3]["undone_at"] == "later"


def test_margins_are_written_for_all_rows_or_for_none():
    items = dict(enumerate(pairs(2)))
    unknown = Answer("ranked", [1, 2])
    kept, _ = preference_rows(items, [said(0, SAYS[0]), said(1, unknown)])
    assert ["margin" in row for row in kept] == [False, False]
    assert [row["grade"] for row in kept] == ["slightly", None]


def test_rankings_keep_their_ties(tmp_path):
    item = Item({"prompt": "q", "completions": ["a", "b", "c"], "row": 0, "topic": "x"}, models=["x", "y", "z"])
    create(tmp_path / "db", [item], past=[said(0, Answer("ranked", [2, 1, 2]))])
    store = Store(tmp_path / "db")
    assert write_export(store, tmp_path / "prefs.jsonl", "preferences").endswith("1 rows")
    assert not (tmp_path / "prefs.left_out.jsonl").exists()
    table = load_preferences(str(tmp_path / "prefs.jsonl"))
    assert table["ranks"][:] == [[2, 1, 2]]
    assert compared_pairs(table)["label"][:] == [0.0, 0.5, 1.0]
    assert table["topic"][:] == ["x"]
    store.close()


def test_votes_are_ranked(store, tmp_path):
    write_export(store, tmp_path / "votes.jsonl", "votes")
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    votes = [("new", False, 0), ("old", False, 1), ("old", True, 2)]
    assert [(row["winner"], row["tie"], row["group"]) for row in rows] == votes
    assert "new" in rank_votes(rows)
    with pytest.raises(ValueError, match="No judgement compares two models"):
        vote_rows(dict(enumerate(pairs(1))), [said(0, SAYS[0])])


def test_nothing_is_overwritten_and_nothing_empty_is_written(store, tmp_path):
    (tmp_path / "prefs.left_out.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"prefs.left_out.jsonl is there already"):
        write_export(store, tmp_path / "prefs.jsonl", "preferences")
    assert not (tmp_path / "prefs.jsonl").exists()
    with pytest.raises(ValueError, match="Nothing to train on yet: none of 2 judgements"):
        preference_rows(dict(enumerate(pairs(7))), [said(3, SAYS[3]), said(4, SAYS[4])])


class TestLabelStudio:
    def test_back_without_loss(self, store, tmp_path):
        write_export(store, tmp_path / "tasks.json", "label_studio")
        items, judgements = read_items_and_judgements(str(tmp_path / "tasks.json"))
        sources = [item._replace(row={k: v for k, v in item.row.items() if k != "source"}) for item in items]
        assert sources == list(store.items().values())
        assert judgements == store.judgements()
        create(tmp_path / "again.sqlite", items, past=judgements)
        again = Store(tmp_path / "again.sqlite")
        for kind in ("preferences", "votes"):
            write_export(store, tmp_path / f"{kind}.one", kind)
            write_export(again, tmp_path / f"{kind}.two", kind)
        again.close()

        def rows(name):
            found = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
            return [{k: v for k, v in row.items() if k != "source"} for row in found]

        for name in ("preferences", "preferences.left_out", "votes"):
            assert rows(f"{name}.one") == rows(f"{name}.two")

    def test_the_reader_of_exports_takes_what_is_for_training(self, store):
        table = from_label_studio(to_tasks(store.items(), store.judgements()))
        assert table["label"][:] == [1.0, 0.0, 0.5, 1.0]  # the check of the labeller too: it is none there
        assert table["annotator"][:] == ["1"] * 4

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_any_judgement_comes_back(self, data):
        sizes = data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
        items = check_items([{"prompt": f"q{n}", "completions": list("abcd")[:size]} for n, size in enumerate(sizes)])
        given_answers = []
        for number, size in enumerate(sizes):
            ranks = data.draw(st.lists(st.integers(1, size), min_size=size, max_size=size))
            ranks = [sorted(set(ranks)).index(rank) + 1 for rank in ranks]
            decided = size == 2 and max(ranks) == 2
            strength = data.draw(st.sampled_from([None, *STRENGTHS])) if decided else None
            verdict = data.draw(st.sampled_from(["ranked", "ranked", "incomparable", "skipped"]))
            answer = Answer("ranked", ranks, strength) if verdict == "ranked" else Answer(verdict)
            note = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
            undone_at = data.draw(st.sampled_from([None, "later"]))
            given_answers.append(said(number, answer._replace(note=note), undone_at=undone_at))
        tasks = json.loads(json.dumps(to_tasks(dict(enumerate(items)), given_answers)))
        assert from_tasks(tasks) == (items, given_answers)

    def test_a_change_made_there_counts(self, store):
        tasks = to_tasks(store.items(), store.judgements())
        tasks[0]["annotations"][0]["result"][0]["value"]["selected"] = "right"
        assert from_tasks(tasks)[1][0].answer.ranks == [2, 1]
        ranked = dict(enumerate(check_items([{"prompt": "q", "completions": list("abc")}])))
        [task] = to_tasks(ranked, [said(0, Answer("ranked", [1, 2, 2]))])
        assert from_tasks([task])[1][0].answer.ranks == [1, 2, 2]
        task["annotations"][0]["result"][0]["value"]["ranker"]["rank"] = ["2", "0", "1"]
        assert from_tasks([task])[1][0].answer.ranks == [2, 3, 1]

    def test_an_export_of_label_studio_itself_is_read(self):
        data = {"prompt": "Hi", "answer1": "Hello!", "answer2": "No."}
        left = {"id": "x", "type": "pairwise", "value": {"selected": "left"}, "from_name": "pw", "to_name": "answer1"}
        annotations = [
            {
                "id": 8,
                "completed_by": {"id": 5, "email": "a@b.c"},
                "result": [left],
                "lead_time": 2.5,
                "created_at": "t",
            },
            {"id": 7, "completed_by": 3, "result": []},
            {"id": 9, "completed_by": 4, "result": [], "was_cancelled": True},
        ]
        items, judgements = from_tasks([{"id": 1, "data": data, "annotations": annotations}, {"id": 2, "data": data}])
        assert len(items) == 2
        assert [one.labeller for one in judgements] == ["labeller 3", "labeller 5", "labeller 4"]
        assert [one.answer.ranks for one in judgements] == [[1, 1], [1, 2], None]
        assert (judgements[1].milliseconds, judgements[1].judged_at, judgements[1].shown) == (2500, "t", None)
        ranker = {"type": "ranker", "value": {"ranker": {"best": ["z", "x", "y"]}}}
        listed = {"prompt": "Hi", "answers": [{"id": name, "body": name * 2} for name in "xyz"]}
        _, [ranked] = from_tasks([{"data": listed, "annotations": [{"completed_by": 1, "result": [ranker]}]}])
        assert ranked.answer.ranks == [2, 3, 1]

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ({"data": {"prompt": "q", "answer1": "a"}}, "task 0 has neither `answer1` and `answer2`"),
            ({"data": {"prompt": "q", "answers": ["a"]}}, "nor `answers` with a `body`"),
            ({"annotations": ["x"]}, "An annotation of task 0 is no object"),
            ({"annotations": [{"result": [{"type": "pairwise", "value": {"selected": "up"}}]}]}, "selects neither"),
            (
                {"annotations": [{"result": [{"type": "ranker", "value": {"ranker": {"r": ["0"]}}}]}]},
                "does not rank all",
            ),
        ],
    )
    def test_what_cannot_be_read_is_refused_with_its_task(self, task, message):
        with pytest.raises(ValueError, match=message):
            from_tasks([{"data": {"prompt": "q", "answer1": "a", "answer2": "b"}} | task])

    def test_a_column_that_a_task_needs_is_refused(self):
        item = Item({"prompt": "q", "completions": ["a", "b"], "answer1": "x"})
        with pytest.raises(ValueError, match="The column `answer1` of the data is that of an answer"):
            to_tasks({0: item}, [])
