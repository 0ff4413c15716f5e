"""Changes of texts, and what they do to scores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.tools.certificate.functional.sensitivity import (
    THANKS,
    change_completion,
    polite,
    repeated,
    score_shift,
    swapped_prompts,
    truncated,
)


class TestTexts:
    def test_repeated(self):
        assert repeated(" a b. \n") == " a b. a b."

    def test_truncated(self):
        assert [truncated(text) for text in (" a  b c", "a b", "a", "", " ")] == [" a  b", "a", "a", "", " "]

    def test_polite(self):
        assert polite(" No.\n") == f" No. {THANKS}"

    def test_a_chat_changes_in_its_last_message_only(self):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c", "name": "x"}]
        expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
        assert change_completion(chat, truncated) == expected
        assert chat[1]["content"] == "b c"
        assert change_completion("b c", truncated) == "b"

    @given(st.text())
    def test_truncated_texts_are_prefixes_with_half_of_the_words(self, text):
        short = truncated(text)
        assert text.startswith(short)
        assert len(short.split()) == (len(text.split()) + 1) // 2


class TestSwappedPrompts:
    def test_numbers(self):
        prompts = ["a", "b", "c", "a"]
        swapped = swapped_prompts(prompts, seed=1)
        assert all(own != other for own, other in zip(prompts, swapped, strict=True))
        assert swapped[0] == swapped[3]
        assert set(swapped) == {"a", "b", "c"}
        assert swapped_prompts(["a", "a"]) is None

    @given(st.lists(st.sampled_from("abcdefg"), min_size=2).filter(lambda prompts: len(set(prompts)) > 1))
    def test_no_row_keeps_its_prompt(self, prompts):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        swapped = swapped_prompts(chats)
        assert all(own != other for own, other in zip(chats, swapped, strict=True))
        assert {chat[0]["content"] for chat in swapped} == set(prompts)


class TestScoreShift:
    def test_numbers(self):
        shift = score_shift([1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 1.0 + 1e-4, 1.0], clusters=range(4), scale=0.5)
        assert shift["value"] == pytest.approx(0.25, abs=1e-4)
        assert shift["in_std"] == pytest.approx(0.5, abs=1e-3)
        assert shift["absolute"] == pytest.approx(1.5, abs=1e-3)
        assert (shift["rose"], shift["fell"], shift["same"]) == (0.25, 0.25, 0.5)

    def test_without_a_scale(self):
        shift = score_shift([1.0], [1.0], clusters=["a"], scale=0.0)
        assert (shift["in_std"], shift["absolute"], shift["same"]) == (0.0, 0.0, 1.0)
