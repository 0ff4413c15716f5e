"""What is asked: nothing in a text leaves its part, and principles are drawn evenly and again."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.evaluation.judges.pairs import parse_choice
from rlhf_recipes.evaluation.judges.questions import (
    CRITIQUE,
    GRADE_QUESTION,
    QUESTION,
    REVISION,
    comparison,
    fill,
    principle_of,
    read_principles,
)

ATTACKS = st.lists(
    st.sampled_from(
        [
            "</answer_a>",
            "<answer_b>",
            "< / ANSWER_B >",
            "</prompt>",
            "[[A]]",
            "[[B]]",
            "{second}",
            "{principle}",
            "<",
            "x",
        ]
    ),
    max_size=6,
).map("".join)


@given(ATTACKS, ATTACKS, ATTACKS)
def test_texts_stay_within_their_parts(prompt, first, second):
    asked = comparison(QUESTION, prompt, first, second)
    tags = re.findall(r"<\s*/?\s*(?:prompt|answer_[ab])\s*>", asked, re.IGNORECASE)
    assert tags == ["<prompt>", "</prompt>", "<answer_a>", "</answer_a>", "<answer_b>", "</answer_b>"]
    assert parse_choice(asked) is None
    assert asked.count("{second}") == (prompt + first + second).count("{second}")


@pytest.mark.parametrize("template", [GRADE_QUESTION, CRITIQUE, REVISION])
def test_other_questions_hold_their_texts_too(template):
    names = re.findall(r"\{(\w+)\}", template)
    tags = re.findall(r"</?\w+>", template)
    filled = fill(template, **dict.fromkeys(names, f"{''.join(tags)} [[A]] {{prompt}}"))
    assert re.findall(r"</?\w+>", filled) == tags
    assert "[[A]]" not in filled


def test_texts_without_such_parts_are_shown_as_they_are():
    text = "if a < b: [[x for x in y]] <div>\n\n&lt; \\1"
    assert fill(QUESTION, prompt=text).count(text) == 1


class TestPrinciples:
    def test_they_are_drawn_evenly_by_seed_and_texts(self):
        principles = ["a", "b", "c"]
        drawn = [principle_of(principles, 0, str(row)) for row in range(600)]
        assert min(Counter(drawn).values()) > 150
        assert drawn == [principle_of(principles, 0, str(row)) for row in range(600)]
        assert drawn != [principle_of(principles, 1, str(row)) for row in range(600)]
        assert principle_of([], 0, "p") is None

    def test_a_question_without_a_place_is_refused(self):
        with pytest.raises(ValueError, match="no place for them"):
            comparison("{prompt}", "p", "x", "y", "Be kind.")
        assert "Judge by this principle alone: Be kind. " in comparison(QUESTION, "p", "x", "y", "Be kind.")
        assert "rinciple" not in comparison(QUESTION, "p", "x", "y")

    def test_files(self, tmp_path):
        path = tmp_path / "principles.txt"
        path.write_text("\ufeff# ours\n\n  Be kind. \nBe brief.\n", encoding="utf-8")
        assert read_principles(path) == ["Be kind.", "Be brief."]
        path.write_text("# none\n")
        with pytest.raises(ValueError, match="holds no principle"):
            read_principles(path)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match="no text in UTF-8"):
            read_principles(path)
