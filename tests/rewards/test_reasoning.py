"""Rewards for reasoning in tags: the form by hand, and verifiers of reasoning-gym, real ones and made-up ones."""

import json
import sys
from types import SimpleNamespace

import pytest

from rlhf_recipes.rewards import check_verifier, format_reward, gym_accuracy, gym_rows, refuse_if_bought, tagged_answer

RIGHT = "<think>2 + 2 = 4</think><answer>4</answer>"


def test_the_form():
    forms = {
        RIGHT: 1.0,
        "\n<think>\nfirst,\nthen\n</think>\n<answer>\n4\n</answer>\n": 1.0,
        "<answer>4</answer>": 0.0,
        "<think>2 + 2</think>4": 0.0,
        f"So: {RIGHT}": 0.0,
        f"{RIGHT} Yes.": 0.0,
        f"{RIGHT}{RIGHT}": 0.0,
        "<think></think><answer>4</answer>": 0.0,
        "<think>2</think><answer></answer>": 0.0,
        "<think><answer>3</answer></think><answer>4</answer>": 0.0,
        "<answer>4</answer><think>2 + 2</think>": 0.0,
        "": 0.0,
    }
    assert format_reward(list(forms)) == list(forms.values())
    chats = [[{"role": "assistant", "content": text}] for text in forms]
    assert format_reward(chats, prompts=["?"] * len(chats)) == list(forms.values())


def test_the_answer_is_what_stands_in_the_only_tags():
    assert tagged_answer(RIGHT) == tagged_answer("<answer>\n 4 </answer> and so on") == "4"
    assert tagged_answer("<answer>3</answer><answer>4</answer>") is None, "a policy could name all answers"
    assert tagged_answer("<answer>4") is tagged_answer("4") is None


@pytest.fixture
def gym(monkeypatch):
    """A reasoning-gym with two tasks, of which one also pays a part."""

    def score(answer, entry):
        return 1.0 if answer == entry["answer"] else 0.75 if entry["answer"] in answer else 0.0

    def questions(task, size, seed, top=9):
        for number in range(seed, seed + size):
            half = number % (top + 1)
            metadata = {"source_dataset": task, "half": half}
            yield {"question": f"{half} + {half} =", "answer": str(2 * half), "metadata": metadata}

    tasks = {"doubles": score, "letters": score}
    fake = SimpleNamespace(
        factory=SimpleNamespace(DATASETS=tasks), get_score_answer_fn=tasks.__getitem__, create_dataset=questions
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    return fake


def test_rows_are_drawn_once_and_none_that_is_held_out(gym):
    held_out = gym_rows("doubles", 3, seed=0)
    assert [row["prompt"] for row in held_out] == ["0 + 0 =\n", "1 + 1 =\n", "2 + 2 =\n"]
    assert held_out[2]["answer"] == "4"
    assert json.loads(held_out[2]["metadata"]) == {"source_dataset": "doubles", "half": 2}
    others = gym_rows("doubles", 12, 0, "Q: {question} A:", ["Q: 2 + 2 = A:"], top=4)
    assert [row["prompt"] for row in others] == [f"Q: {n} + {n} = A:" for n in (0, 1, 3, 4)]


def test_only_full_pay_counts(gym):
    row = gym_rows("doubles", 1, seed=2)[0]
    texts = [RIGHT, "<answer> 4 </answer>", "<answer>-4</answer>", "<answer>44</answer>", "4", "<answer>5</answer>"]
    columns = {name: [row[name]] * len(texts) for name in ("answer", "metadata")}
    assert gym_accuracy(texts, **columns, prompts=[row["prompt"]] * len(texts)) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert gym_accuracy([[{"role": "assistant", "content": RIGHT}]], [row["answer"]], [row["metadata"]]) == [1.0]


def test_bad_input_is_named(gym, monkeypatch):
    with pytest.raises(ValueError, match="no task 'triples'. It has doubles, letters"):
        gym_rows("triples", 1, seed=0)
    for template in ("Q:", "{question} {half}"):  # no text, and one that is a number
        with pytest.raises(ValueError, match=r"must hold some of \{question\}, \{source_dataset\} and no others"):
            gym_rows("doubles", 1, 0, template)
    assert gym_rows("doubles", 1, 1, "{source_dataset}: {question}")[0]["prompt"] == "doubles: 1 + 1 ="
    with pytest.raises(ValueError, match="Row 0 is of the task 'sums', which reasoning-gym does not have"):
        gym_accuracy([RIGHT], ["4"], ['{"source_dataset": "sums"}'])
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs reasoning_gym.*pip install 'rlhf-recipes\[reasoning\]'"):
        gym_rows("doubles", 1, seed=0)


@pytest.mark.slow  # reasoning-gym takes seconds to import
def test_what_is_paid():
    rows = gym_rows("chain_sum", 40, seed=0, min_digits=1, max_digits=1)
    results = check_verifier(gym_accuracy, rows, template="<think>So.</think><answer>{answer}</answer>")
    refuse_if_bought(results, bound=0.0)
    paid = {entry.kind: entry.paid for entry in results}
    assert paid["true"] == paid["spaces"] == paid["sentence"] == 1.0
    assert paid["negated"] == paid["twice"] == paid["empty"] == 0.0
    for row in rows:
        asked = row["prompt"].partition("problem: ")[2].strip(" =\n")
        assert int(row["answer"]) == eval(asked)
