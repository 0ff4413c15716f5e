"""Rows in the forms of HelpSteer2 and 3, PKU-SafeRLHF, Nectar and RewardBench 2."""

import itertools
import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.data.preferences import (
    compared_pairs,
    from_helpsteer2,
    from_safe_rlhf,
    load_preferences,
    to_preference_table,
)

ASPECTS = {"helpfulness": 3, "correctness": 2, "coherence": 4, "complexity": 1, "verbosity": 0}
CHAT = [{"role": "user", "content": "Hi"}]
THREE = {"context": CHAT, "response1": "a", "response2": "b"}
SAFE = {"prompt": "Hi", "response_0": "a", "response_1": "b"}
NECTAR_PROMPT = "\n\nHuman: Hi\n\nAssistant: "
BENCH = {"prompt": "1 + 1?", "chosen": ["2"], "rejected": ["3", "4", "5"], "num_correct": 1}


def steer(prompt, response, helpfulness=3, **others):
    return {"prompt": prompt, "response": response} | ASPECTS | {"helpfulness": helpfulness} | others


def answers(*ranked):
    return [{"answer": text, "rank": rank, "model": "m"} for text, rank in ranked]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from([0, 1, 2.5, 4]), min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_helpsteer2_pairs_are_those_of_a_prompt_in_any_order(groups, data):
    """Oracle: all pairs of responses to one prompt, compared by hand."""
    rows = [
        steer(f"p{p}", f"r{p} {k}", rating) for p, ratings in enumerate(groups) for k, rating in enumerate(ratings)
    ]
    rows = data.draw(st.permutations(rows))
    expected = {}
    for one, other in itertools.combinations(rows, 2):
        if one["prompt"] == other["prompt"]:
            difference = one["helpfulness"] - other["helpfulness"]
            expected[one["response"], other["response"]] = 0.5 if difference == 0 else float(difference > 0)
    table = to_preference_table(rows)
    assert sorted(table["prompt"]) == sorted({row["prompt"] for row in rows})
    assert dict(zip(itertools.chain(*table["completions"]), itertools.chain(*table["ratings"]), strict=True)) == {
        row["response"]: row["helpfulness"] for row in rows
    }
    pairs = compared_pairs(table)
    if not expected:
        assert pairs is table
    else:
        assert {tuple(pair["completions"]): pair["label"] for pair in pairs} == expected


def test_helpsteer2_keeps_other_columns_by_response_and_knows_where_rows_come_from(tmp_path):
    rows = [steer("b", "x", 1, by="Ann"), steer("a", "y", 2, by="Bob"), steer("b", "z", 4, by="Eve")]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    table = load_preferences(str(tmp_path / "rows.jsonl"))
    assert table["by"][:] == [["Ann", "Eve"], ["Bob"]]
    assert (table["correctness"][0], table["row"][:], table["line"][:]) == ([2, 2], [0, 1], [1, 3])
    assert from_helpsteer2(rows, rating="verbosity")["ratings"][:] == [[0, 0], [0]]


@pytest.mark.parametrize("wrap", [list, Dataset.from_list, lambda rows: Dataset.from_list(rows).with_format("numpy")])
@pytest.mark.parametrize("number", [int, float, np.int64, np.float32])
def test_helpsteer2_ratings_may_be_numbers_of_any_type(wrap, number):
    rows = [steer("p", "x", number(1)), steer("p", "y", number(4))]
    assert to_preference_table(wrap(rows))["ratings"][:] == [[1.0, 4.0]]


def test_helpsteer2_prompts_may_be_chats():
    table = to_preference_table([steer(CHAT, "x", 1), steer(CHAT, "y", 4)])
    assert (table[0]["prompt"], table[0]["completions"]) == (CHAT, [assistant("x"), assistant("y")])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"helpfulness": None}, "`helpfulness` is not a finite number"),
        ({"helpfulness": "4"}, "`helpfulness` is not a finite number"),
        ({"helpfulness": float("nan")}, "`helpfulness` is not a finite number"),
        ({"helpfulness": True}, "`helpfulness` is not a finite number"),
        ({"helpfulness": [4]}, "`helpfulness` is not a finite number"),
        ({"prompt": None}, "empty `prompt`"),
        ({"prompt": " "}, "empty `prompt`"),
        ({"response": ""}, "empty `response`"),
        ({"response": None}, "empty `response`"),
        ({"response": 3}, "`response` is neither text nor a chat"),
    ],
)
def test_helpsteer2_bad_rows_are_named_and_left_out_when_asked_for(change, reason, caplog):
    rows = [steer("p", "x", 1), steer("p", "y", 4), steer("q", "x") | change, steer("q", "y")]
    with pytest.raises(ValueError, match="1 of 4 rows cannot be used") as caught:
        to_preference_table(rows)
    assert f"1 x {reason}" in str(caught.value)
    assert "(first: row 2)" in str(caught.value)
    table = to_preference_table(rows, drop_bad_rows=True)
    assert table["completions"][:] == [["x", "y"], ["y"]]
    assert compared_pairs(table)["completions"][:] == [["x", "y"]]
    assert "1 of 2 rows compare no completions, so that no pair can be made of them (first: row 3)" in caplog.text


def test_one_response_rated_in_two_ways_is_refused():
    with pytest.raises(ValueError, match="equal completions are ranked or rated differently .first: row 0"):
        to_preference_table([steer("p", "x", 1), steer("p", "x", 4)])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (THREE | {"overall_preference": -3}, {"prompt": CHAT, "label": 1.0, "margin": 3.0}),
        (THREE | {"overall_preference": 1.0}, {"completions": [assistant("a"), assistant("b")], "label": 0.0}),
        (THREE | {"overall_preference": 0, "domain": "code"}, {"label": 0.5, "margin": 0.0, "domain": "code"}),
        (THREE | {"context": "Hi", "overall_preference": np.int64(2)}, {"completions": ["a", "b"], "margin": 2.0}),
        (SAFE | {"better_response_id": 0, "safer_response_id": 1}, {"label": 1.0, "safer_response_id": 1}),
        (SAFE | {"better_response_id": 1.0, "is_response_0_safe": True}, {"label": 0.0, "is_response_0_safe": True}),
        (SAFE | {"safer_response_id": 1}, {"label": 0.0}),
        (SAFE | {"prompt": CHAT, "better_response_id": 0}, {"completions": [assistant("a"), assistant("b")]}),
        (
            {"prompt": NECTAR_PROMPT, "answers": answers(("a", 3.0), ("b", 1.0), ("c", 3.0)), "turns": 1},
            {"prompt": NECTAR_PROMPT[:-1], "completions": [" a", " b", " c"], "ranks": [2, 1, 2], "turns": 1},
        ),
        ({"prompt": "Hi", "answers": answers((" a", 2), ("b", 7))}, {"completions": [" a", "b"], "ranks": [1, 2]}),
        ({"prompt": CHAT, "answers": answers(("a", 2), ("b", 1))}, {"completions": [assistant("a"), assistant("b")]}),
        (BENCH | {"subset": "Math"}, {"completions": ["2", "3", "4", "5"], "best": 0, "subset": "Math"}),
        (BENCH | {"prompt": CHAT, "rejected": ["3"]}, {"completions": [assistant("2"), assistant("3")], "best": 0}),
    ],
)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_one_row_of_each_form(row, expected, as_dataset):
    [found] = to_preference_table(Dataset.from_list([row]) if as_dataset else [row]).to_list()
    assert {name: found[name] for name in expected} == expected


def test_the_safer_response_can_be_preferred():
    row = SAFE | {"better_response_id": 0, "safer_response_id": 1}
    assert from_safe_rlhf([row], preference="safer")["label"][:] == [0.0]
    with pytest.raises(ValueError, match='`preference` must be "better" or "safer"'):
        from_safe_rlhf([row], preference="kinder")


def test_each_right_answer_beats_all_wrong_ones_and_no_other_right_one():
    rows = [BENCH | {"chosen": ["2", "two"], "rejected": ["3", "4"]}, BENCH | {"prompt": "2 + 2?", "chosen": ["4"]}]
    table = to_preference_table([rows[0], rows[1] | {"rejected": ["3"]}])
    assert (table["best"][:], table["row"][:]) == ([0, 0, 0], [0, 0, 1])
    pairs = compared_pairs(table)
    assert set(map(tuple, pairs["completions"])) == {("2", "3"), ("2", "4"), ("two", "3"), ("two", "4"), ("4", "3")}
    assert set(pairs["label"]) == {1.0}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (THREE | {"overall_preference": "-3"}, "`overall_preference` is none of the strengths"),
        (THREE | {"overall_preference": None}, "`overall_preference` is none of the strengths"),
        (THREE | {"overall_preference": True}, "`overall_preference` is none of the strengths"),
        (THREE | {"overall_preference": 4}, "`overall_preference` is none of the strengths"),
        (SAFE | {"better_response_id": 2}, "`better_response_id` is neither 0 nor 1"),
        (SAFE | {"better_response_id": "1"}, "`better_response_id` is neither 0 nor 1"),
        (SAFE | {"better_response_id": True}, "`better_response_id` is neither 0 nor 1"),
        (SAFE | {"better_response_id": None}, "`better_response_id` is neither 0 nor 1"),
        ({"prompt": "Hi", "answers": answers(("a", "1"), ("b", 2))}, "`answers` has a `rank` that is not a number"),
        ({"prompt": "Hi", "answers": answers(("a", None), ("b", 2))}, "`answers` has a `rank` that is not a number"),
        ({"prompt": "Hi", "answers": ["a", "b"]}, "`answers` is not a list of objects with `answer` and `rank`"),
        ({"prompt": "Hi", "answers": answers(("a", 1))}, "`ranks` compares completions, but there is only one"),
        ({"prompt": "Hi", "answers": answers(("a", 1), ("", 2))}, "empty `completion`"),
        (BENCH | {"chosen": []}, "`chosen` and `rejected` are not lists of texts"),
        (BENCH | {"chosen": "2"}, "`chosen` and `rejected` are not lists of texts"),
        (BENCH | {"rejected": None}, "`chosen` and `rejected` are not lists of texts"),
        (BENCH | {"rejected": ["2"]}, "equal completions are ranked or rated differently"),
    ],
)
def test_bad_rows_of_each_form_are_refused_with_the_row(row, reason):
    with pytest.raises(ValueError, match=r"\(first: row 0\)") as caught:
        to_preference_table([row])
    assert reason in str(caught.value)


def test_columns_of_two_known_sets_are_refused():
    with pytest.raises(ValueError, match="Expected the columns of one kind of preferences; found"):
        to_preference_table([steer("p", "x") | {"answers": answers(("a", 1), ("b", 2))}])


def test_names_of_known_sets_may_be_other_columns_of_pairs():
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    others = {"helpfulness": 3, "verbosity": 1, "response": "c", "answers": ["d"], "context": "e"}
    [found] = to_preference_table([pair | others]).to_list()
    assert found["completions"] == ["a", "b"]
    assert {name: found[name] for name in others} == others
