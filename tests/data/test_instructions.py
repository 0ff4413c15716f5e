"""Prompts of known sets of instructions, read as chats."""

import pytest
from datasets import Dataset

from rlhf_recipes.data.instructions import instructions_as_chats

TEMPLATE = "{{ messages }}"
SETS = [
    {"response": "a", "helpfulness": 1},
    {"response_1": "a", "response_2": "b", "preference_strength": 1},
    {"response_0": "a", "response_1": "b", "better_response_id": 1},
    {"chosen": ["a"], "rejected": ["b"], "num_correct": 1},
]
OTHERS = [
    {"chosen": "a", "rejected": "b"},
    {"completion": "a"},
    {"response": "a"},
    {"completions": ["a", "b"], "ranks": [1, 2]},
]


@pytest.mark.parametrize("columns", SETS)
def test_prompts_of_instructions_are_what_the_user_said(columns):
    rows = Dataset.from_list([{"prompt": "Hi", "note": 1} | columns, {"prompt": None, "note": 2} | columns])
    found = instructions_as_chats(rows, TEMPLATE)
    assert found["prompt"][:] == [[{"role": "user", "content": "Hi"}], None]
    assert set(found.column_names) == set(rows.column_names)
    assert found["note"][:] == [1, 2]
    assert instructions_as_chats(rows, None) is rows, "without a template text stays text"
    assert instructions_as_chats(found, TEMPLATE) is found, "chats stay chats"


@pytest.mark.parametrize("columns", OTHERS)
def test_prompts_of_other_rows_stay_as_they_are(columns):
    rows = Dataset.from_list([{"prompt": "Hi"} | columns])
    assert instructions_as_chats(rows, TEMPLATE) is rows


def test_marks_of_turns_separate_messages():
    text = "Hi\n<extra_id_1>Assistant\nHello!\nHow are you?\n<extra_id_1>User\nFine."
    [chat] = instructions_as_chats(Dataset.from_list([{"prompt": text} | SETS[0]]), TEMPLATE)["prompt"]
    assert [(message["role"], message["content"]) for message in chat] == [
        ("user", "Hi"),
        ("assistant", "Hello!\nHow are you?"),
        ("user", "Fine."),
    ]
