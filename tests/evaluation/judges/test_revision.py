"""Critique and revision: who is asked what, in which order, and never twice."""

import pytest

from rlhf_recipes.evaluation.judges.cache import AnswerCache
from rlhf_recipes.evaluation.judges.questions import principle_of
from rlhf_recipes.evaluation.judges.revision import Writer, as_messages, revise

PRINCIPLES = ["Be kind.", "Be brief.", "Be right."]


class Model:
    """Answers, critiques and revisions that say which they are."""

    def __init__(self):
        self.asked = []

    def write(self, messages, max_tokens, temperature, seed):
        self.asked.append((messages, max_tokens, temperature, seed))
        return f" text {len(self.asked)} "


def is_text(value):
    return isinstance(value, str)


def test_each_round_criticises_the_latest_answer_by_its_own_principle(tmp_path):
    model = Model()
    write = Writer(model, "model", AnswerCache(tmp_path / "cache.jsonl", is_text))
    done = revise(write, "Say hello.", PRINCIPLES, rounds=2, max_tokens=9, seed=4)
    assert done.first == "text 1"
    assert [(round_.critique, round_.revision) for round_ in done.rounds] == [
        ("text 2", "text 3"),
        ("text 4", "text 5"),
    ]
    expected = [principle_of(PRINCIPLES, 4, "Say hello.", str(number)) for number in range(2)]
    assert [round_.principle for round_ in done.rounds] == expected
    contents = [messages[-1]["content"] for messages, *_ in model.asked]
    assert contents[0] == "Say hello."
    for critique, revision, answer, principle in ((1, 2, "text 1", 0), (3, 4, "text 3", 1)):
        for asked in (contents[critique], contents[revision]):
            assert f"<answer>\n{answer}\n</answer>" in asked
            assert done.rounds[principle].principle in asked
        assert f"<critique>\ntext {critique + 1}\n</critique>" in contents[revision]
    assert {rest for _, *rest in map(tuple, model.asked) for rest in [tuple(rest)]} == {(9, 1.0, 4)}

    again = Writer(model, "model", AnswerCache(tmp_path / "cache.jsonl", is_text))
    assert revise(again, "Say hello.", PRINCIPLES, rounds=2, max_tokens=9, seed=4) == done
    assert len(model.asked) == 5, "all texts were known"
    assert revise(again, "Say hello.", PRINCIPLES, rounds=3, max_tokens=9, seed=4).rounds[:2] == done.rounds
    assert len(model.asked) == 7, "only the third round was asked for"


def test_blank_texts_and_no_principles_are_errors():
    class Mute:
        def write(self, *args):
            return " \n"

    write = Writer(Mute(), "mute", AnswerCache(None, is_text))
    with pytest.raises(ValueError, match="the model wrote nothing"):
        revise(write, "p", PRINCIPLES)
    with pytest.raises(ValueError, match="at least one principle"):
        revise(write, "p", [])
    with pytest.raises(ValueError, match="one round"):
        revise(write, "p", PRINCIPLES, rounds=0)


def test_prompts_become_messages():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert as_messages(chat) == chat
    assert as_messages("Hi\n\nHuman: x") == [{"role": "user", "content": "Hi\n\nHuman: x"}]
    turns = as_messages("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: a\n\nb\n\nAssistant:")
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[-1]["content"] == "a\n\nb"
