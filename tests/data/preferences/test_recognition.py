import itertools
import json

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_recipes.config import DataArguments
from rlhf_recipes.data.preferences import (
    check_preferences,
    load_preferences,
    preference_features,
    to_pairs,
    to_preference_table,
)
from rlhf_recipes.data.preferences.recognition import _KINDS, _fitting
from rlhf_recipes.data.preferences.schema import make_table
from rlhf_recipes.data.splits import load_preference_splits

HI = {"prompt": "Hi"}
SIDES = HI | {"response_1": "a", "response_2": "b"}
PAIR = HI | {"chosen": "a", "rejected": "b"}
TWO = HI | {"completions": ["a", "b"]}

KINDS = [
    (PAIR, {"label": 1.0}),
    (PAIR | {"margin": 2}, {"label": 1.0, "margin": 2.0}),
    (PAIR | {"label": "tie"}, {"label": 0.5}),
    (PAIR | {"strength": "better"}, {"label": 1.0, "margin": 2 / 3}),
    (SIDES | {"label": 0.25}, {"label": 0.25}),
    (SIDES | {"label": 0, "strength": "better"}, {"label": 0.0, "margin": 2 / 3}),
    (SIDES | {"preference_strength": 2}, {"label": 0.0, "margin": 2.0}),
    (TWO | {"label": "second"}, {"label": 0.0}),
    (TWO | {"label": 1, "margin": 2}, {"label": 1.0, "margin": 2.0}),
    (TWO | {"ranks": [2, 1]}, {"ranks": [2, 1]}),
    (TWO | {"ranks": [2, 1], "best": 1}, {"ranks": [2, 1], "best": 1}),
    (TWO | {"ranking": "B > A"}, {"ranks": [2, 1]}),
    (TWO | {"best": 0}, {"best": 0}),
    (TWO | {"ratings": [1, 2]}, {"ratings": [1.0, 2.0]}),
    (TWO | {"labels": [True, False]}, {"completions": ["a\nb"], "step_labels": [[1.0, 0.0]]}),
    (TWO | {"steps": [["a"], ["b"]], "step_labels": [[1], [0]]}, {"step_labels": [[1.0], [0.0]]}),
    (HI | {"completion": "a", "rating": 3}, {"completions": ["a"], "ratings": [3.0]}),
    (HI | {"completion": "a", "completion_ids": [5], "token_labels": [1]}, {"token_labels": [[1.0]]}),
    (TWO | {"completion_ids": [[5], [6]], "token_labels": [[1], [0]]}, {"token_labels": [[1.0], [0.0]]}),
    (
        {"instruction": "Hi", "completions": [{"response": "a", "annotations": {"x": {"Rating": 1}}}]},
        {"ratings": [1.0]},
    ),
    (
        {
            "data": {"prompt": "Hi", "answer1": "a", "answer2": "b"},
            "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "right"}}]}],
        },
        {"label": 0.0},
    ),
    (PAIR | {"data": "x", "instruction": "y"}, {"label": 1.0, "data": "x", "instruction": "y"}),
]


@pytest.mark.parametrize(("row", "expected"), KINDS)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_kinds_are_recognised_by_their_columns(row, expected, as_dataset):
    table = to_preference_table(Dataset.from_list([row]) if as_dataset else [row])
    features = preference_features()
    assert {name: table.features[name] for name in features} == features
    [found] = table.to_list()
    assert {name: found[name] for name in expected} == expected
    assert found["prompt"] == "Hi"
    assert to_preference_table(table).to_list() == table.to_list(), "a table is a kind, too"


@pytest.mark.parametrize(
    "row",
    [
        {},
        HI,
        TWO,
        SIDES,
        HI | {"completion": "a"},
        PAIR | {"ranks": [1, 2]},
        PAIR | {"completions": ["a", "b"]},
        PAIR | {"response_1": "a", "response_2": "b"},
        PAIR | {"label": 1, "preference_strength": 1},
        PAIR | {"strength": "better", "preference_strength": 1},
        PAIR | {"strength": "better", "margin": 1},
        TWO | {"label": 1, "labels": [1, 1]},
        TWO | {"ranks": [1, 2], "ranking": "A > B"},
        HI | {"completion": "a", "completions": ["a"], "ratings": [1]},
        PAIR | {"data": {}, "annotations": []},
    ],
)
def test_columns_of_no_kind_or_of_two_are_refused(row):
    with pytest.raises(ValueError, match="Expected the columns of one kind of preferences; found") as caught:
        to_preference_table([row])
    for name in row:
        assert f"`{name}`" in str(caught.value).split("The kinds are")[0]
    assert "`chosen`, `rejected` with nothing more or `label`" in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["a", "b", "", "tie", "A > B"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_rows_of_any_shape_are_read_or_refused_with_a_clear_message(data):
    row = dict(data.draw(st.sampled_from(KINDS))[0])
    for name in data.draw(st.lists(st.sampled_from(sorted(row)), min_size=1, max_size=2)):
        row[name] = data.draw(JSON)
    try:
        table = to_preference_table([row, row])
    except ValueError as error:
        said = str(error)
    else:
        check_preferences(table)
        said = "Expected"
    assert any(words in said for words in ("cannot be used", "Expected", "values of different types"))


def test_bad_rows_are_counted_by_reason_and_dropped_only_when_asked_for(caplog):
    rows = [
        TWO | {"label": 1},
        TWO | {"label": 2},
        TWO | {"label": 0.5, "completions": ["a", "a"]},
        TWO | {"label": 7},
        TWO | {"ranks": [1, 2, 3]},
    ]
    message = (
        "4 of 5 rows cannot be used: 2 x `label` is not a probability between 0 and 1 (first: row 1); "
        "1 x the two completions are the same (first: row 2); "
        "1 x `ranks` does not have one rank per completion (first: row 4)."
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        to_preference_table(rows)
    assert str(caught.value) == f"{message} Correct them, or leave them out with `drop_bad_rows: true`."
    assert to_preference_table(rows, drop_bad_rows=True)["row"][:] == [0]
    assert f"Left out: {message}" in caplog.text
    with pytest.raises(ValueError, match="No row is left. 1 of 1 rows"):
        to_preference_table(rows[1:2], drop_bad_rows=True)


def test_where_rows_come_from_is_kept():
    rows = [TWO | {"label": 1, "source": "web", "row": 7, "line": 9}, TWO | {"label": 0}]
    table = to_preference_table(rows, source="here")
    assert (table["source"][:], table["row"][:], table["line"][:]) == (["web", "here"], [7, 1], [9, None])
    with pytest.raises(ValueError, match="1 x `row` or `line` is not the number of a row or a line .first: row x"):
        to_preference_table([TWO | {"label": 1, "row": "x"}])


def test_lines_of_files_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [TWO | {"label": "tie"}, TWO | {"label": 0.7}, TWO | {"label": 1.7}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    table = load_preferences(str(path), drop_bad_rows=True)
    assert (table["label"][:], table["row"][:], table["line"][:]) == ([0.5, 0.7], [0, 1], [1, 3])
    assert table["source"][:] == [str(path)] * 2
    with pytest.raises(ValueError, match="between 0 and 1 .first: row 2 in line 5"):
        load_preferences(str(path))


def test_parquet_and_folders_have_no_lines(tmp_path):
    table = to_preference_table([TWO | {"ranks": [1, 2]}])
    table.remove_columns(["row", "source", "line"]).to_parquet(str(tmp_path / "test.parquet"))
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\nHi,a,b\n")
    loaded = load_preferences(str(tmp_path), split="test")
    assert (loaded["ranks"][:], loaded["line"][:]) == ([[1, 2]], [None])
    assert loaded["source"][:] == [str(tmp_path / "test.parquet")]
    assert load_preferences(str(tmp_path))["label"][:] == [1.0]


def test_chats_and_text_are_two_tables():
    chat = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completions": [[{"role": "assistant", "content": text}] for text in "ab"],
        "label": 1.0,
    }
    table = to_preference_table([chat, chat])
    assert table.features == preference_features(chat=True)
    assert table["completions"][0] == chat["completions"]
    with pytest.raises(ValueError, match="^row 0 is chats and row 1 is text. Make two tables"):
        to_preference_table([chat, TWO | {"label": 1}])


def test_no_columns_fit_two_readers():
    for one, other in itertools.permutations(_KINDS, 2):
        if one.needs < other.needs:
            assert {kind.read for kind in _fitting(other.needs)} == {other.read}, "the kind that needs more"
        both = _fitting(one.needs | other.needs)
        if len({kind.read for kind in both}) > 1:
            with pytest.raises(ValueError, match="Expected the columns of one kind"):
                to_preference_table([dict.fromkeys(one.needs | other.needs, "a")])


def test_messages_keep_calls_of_tools():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completions": [[call], [call | {"tool_calls": [{"name": "answer"}]}]],
        "best": 0,
    }
    table = to_preference_table([row])
    assert table[0]["completions"][0][0]["tool_calls"] == [{"name": "search"}]
    assert len(to_pairs(table)) == 1
    assert to_preference_table(table).to_list() == table.to_list()


def test_other_columns_need_one_type():
    with pytest.raises(ValueError, match="`note` has values of different types"):
        to_preference_table([TWO | {"label": 1, "note": 3}, TWO | {"label": 1, "note": "x"}])
    table = make_table([HI | {"completions": ["a"], "ratings": [1.0], "row": 0, "note": None}], {"note": None})
    assert table["note"][:] == [None]


def test_a_table_needs_a_judgement():
    with pytest.raises(ValueError, match="Expected at least one of the columns `label`, `ranks`"):
        check_preferences([TWO])
    with pytest.raises(ValueError, match="Expected the columns `prompt`, `completions`; found `prompt`, `label`"):
        check_preferences([HI | {"label": 1}])


def test_splits_hold_out_prompts_with_all_of_their_rankings(tmp_path):
    path = tmp_path / "rankings.jsonl"
    rows = [
        {"prompt": f"p{number}", "completions": ["a", "b", str(repeat)], "ranks": [1, 2, 2]}
        for number in range(30)
        for repeat in range(2)
    ]
    path.write_text("\n".join(map(json.dumps, [*rows, HI | {"completions": ["a"], "ranks": [1]}])))
    splits = load_preference_splits(DataArguments(str(path), test_size=0.3, drop_bad_rows=True, max_test_rows=4))
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
    assert len(splits["test"]) == 4
    assert len(splits["train"]) == 2 * len(set(splits["train"]["prompt"]))
    assert splits["train"]["line"][0] == splits["train"]["row"][0] + 1
