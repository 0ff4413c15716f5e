"""The rows of the reward stage, from files to what its trainer reads."""

import json

import pytest

from rlhf_recipes.config import DataArguments
from rlhf_recipes.reward_modeling import PreferenceConfig, load_reward_rows

PAIR = {"prompt": "p", "chosen": " good", "rejected": " bad"}


@pytest.fixture
def load(tmp_path):
    """Load rows, all of them for training and for evaluation."""

    def load_rows(rows, chat_template=None, **fields):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = PreferenceConfig(str(tmp_path / "out"), bf16=False, **fields)
        return load_reward_rows(DataArguments(str(path), dataset_test_split="train"), config, chat_template)

    return load_rows


def test_pairs_stay_pairs_and_are_numbered_after_ties_are_dropped(load):
    rows = load([PAIR | {"label": label} for label in (1.0, 0.5, 0.8)], ties="drop")
    assert rows["train"].to_list() == [PAIR | {"label": 1.0, "_row": 0}, PAIR | {"label": 0.8, "_row": 1}]
    assert rows["test"]["_row"][:] == [0, 1, 2], "ties stay in the evaluation"


@pytest.mark.parametrize("judged", [{"label": "tie"}, {"label": True}, {"strength": "better"}])
def test_pairs_judged_in_words_or_grades_become_the_table(load, judged):
    row = load([PAIR | judged])["train"][0]
    assert row["completions"] == [" good", " bad"]
    assert "_row" not in row


def test_rankings_are_compared_two_at_a_time_by_the_pairwise_objective_only(load):
    ranking = {"prompt": "p", "completions": [" a", " b", " c"], "ranks": [1, 2, 3]}
    pairs = load([ranking])["train"]
    assert sorted(map(sorted, pairs["completions"])) == [[" a", " b"], [" a", " c"], [" b", " c"]]
    assert load([ranking], objective="ranking")["train"]["completions"][:] == [[" a", " b", " c"]]


def test_pairs_that_the_objective_cannot_learn_from_are_refused(load):
    with pytest.raises(ValueError, match="`objective` is 'ranking', but the given rows have `chosen` and `rejected`"):
        load([PAIR], objective="ranking")


def test_instructions_are_read_as_chats(load):
    answers = [{"prompt": "Hi", "response": text, "helpfulness": grade} for text, grade in (("No.", 1), ("Hi!", 4))]
    row = load(answers, "{{ messages }}")["train"][0]
    assert row["prompt"] == [{"role": "user", "content": "Hi"}]
