"""Prompts of known sets of instructions, read as chats."""

import pytest
from datasets import Dataset

from rlhf_recipes.data import to_completions, to_prompts
from rlhf_recipes.data.instructions import instructions_as_chats
from rlhf_recipes.data.preferences import to_preference_table

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


HI, ANSWER = {"role": "user", "content": "Hi"}, "Hello!"
RATED = [
    {"response": text, "annotations": {"honesty": {"Rating": rating}}} for text, rating in [("No.", 1), (ANSWER, 4)]
]
RANKED = [{"answer": "No.", "rank": 3.0, "model": "x"}, {"answer": ANSWER, "rank": 1.0, "model": "y"}]
# Each with the answer that wins; some name their prompt in another way
PREFERENCES = {
    "HelpSteer2": [
        {"prompt": "Hi", "response": text, "helpfulness": rate} for text, rate in [("No.", 1), (ANSWER, 4)]
    ],
    "HelpSteer2 preference": [{"prompt": "Hi", "response_1": "No.", "response_2": ANSWER, "preference_strength": 2}],
    "HelpSteer3": [{"context": [HI], "response1": "No.", "response2": ANSWER, "overall_preference": 2}],
    "PKU-SafeRLHF": [{"prompt": "Hi", "response_0": "No.", "response_1": ANSWER, "better_response_id": 1}],
    "Nectar": [{"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": RANKED}],
    "RewardBench 2": [{"prompt": "Hi", "chosen": [ANSWER], "rejected": ["No.", "What?"], "num_correct": 1}],
    "UltraFeedback": [{"instruction": "Hi", "completions": RATED}],
    "ranking": [{"prompt": "Hi", "completions": ["No.", ANSWER], "ranks": [2, 1]}],
    "best": [{"prompt": "Hi", "completions": ["No.", ANSWER, "What?"], "best": 1}],
    "tie": [{"prompt": "Hi", "response_a": ANSWER, "response_b": "No.", "label": 0.5}],
}


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["text", "chats"])
def test_all_stages_read_the_same_prompts_and_sft_imitates_the_winner(name, template):
    rows = instructions_as_chats(
        Dataset.from_list(PREFERENCES[name]).add_column("tag", [7] * len(PREFERENCES[name])), template
    )
    table, prompts, completions = to_preference_table(rows), to_prompts(rows), to_completions(rows)
    assert prompts["prompt"][0] == completions["prompt"][0] == table["prompt"][0]
    [completion] = completions["completion"]
    text = completion if isinstance(completion, str) else completion[0]["content"]
    assert text == (" Hello!" if name == "Nectar" else "Hello!")
    assert isinstance(completion, str) == isinstance(table["prompt"][0], str)
    assert prompts["tag"][0] == 7
    assert "tag" in completions.column_names


def test_several_right_answers_are_imitated_each():
    rows = [{"prompt": "Hi", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2}]
    assert to_completions(Dataset.from_list(rows))["completion"][:] == ["a", "b"]


def test_labels_of_steps_say_nothing_about_what_to_imitate():
    rows = [{"prompt": "Hi", "completions": ["ab"], "steps": [["a", "b"]], "step_labels": [[1.0, 0.0]]}]
    with pytest.raises(ValueError, match="Row 0 has labels of steps or tokens only.* `prompt` and `completion`"):
        to_completions(Dataset.from_list(rows))


def test_rows_of_no_kind_are_still_refused_by_their_columns():
    rows = Dataset.from_list([{"question": "Hi", "answer": "Hello!"}])
    for convert in (to_prompts, to_completions):
        with pytest.raises(ValueError, match="Expected the columns `prompt`.*found `question`, `answer`"):
            convert(rows)
