"""Budgets, answers on disk, and questions that may fail."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.evaluation.judges.asking import ask_each
from rlhf_recipes.evaluation.judges.budget import Budget, BudgetSpentError, Usage
from rlhf_recipes.evaluation.judges.cache import AnswerCache, key_of


def is_text(value):
    return isinstance(value, str)


class TestCache:
    def test_a_torn_line_does_not_spoil_the_next(self, tmp_path):
        path = tmp_path / "cache.jsonl"
        AnswerCache(path, is_text).put("a", "one")
        with path.open("a") as file:
            file.write('{"key": "b", "ans')  # killed here
        AnswerCache(path, is_text).put("c", "three\u2028")
        kept = AnswerCache(path, is_text)
        assert [kept.get(key) for key in "abc"] == ["one", None, "three\u2028"]
        assert kept.hits == 2

    def test_keys_hold_no_text_and_tell_all_parts_apart(self, tmp_path):
        keys = {key_of("a", "b"), key_of("ab"), key_of("a", ["b"]), key_of("a", "b", None), key_of("b", "a")}
        assert len(keys) == 5
        AnswerCache(tmp_path / "cache.jsonl", is_text).put(key_of("secret prompt"), "yes")
        assert "secret" not in (tmp_path / "cache.jsonl").read_text()

    def test_threads_write_whole_lines(self, tmp_path):
        cache = AnswerCache(tmp_path / "cache.jsonl", is_text)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: cache.put(str(number), "x" * 50), range(200)))
        rows = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()]
        assert {row["key"] for row in rows} == set(map(str, range(200)))


class TestBudget:
    def test_tokens(self):
        budget = Budget(tokens=100)
        for _ in range(2):
            budget.begin()
            budget.add(40, 10, 0.5)
        with pytest.raises(BudgetSpentError, match="100 tokens"):
            budget.begin()
        assert budget.usage == Usage(2, 80, 20, 1.0)
        assert budget.usage.cost(prompt_price=1e6, completion_price=2e6) == 80 + 40
        with pytest.raises(ValueError, match="at least 0"):
            Budget(calls=-1)

    def test_threads_never_make_more_calls(self):
        budget, made = Budget(calls=50), []

        def ask(number):
            budget.begin()
            made.append(number)
            return number

        asked = ask_each(range(200), ask, name="it", workers=8)
        assert len(made) == budget.usage.calls == 50
        assert sorted(answer for answer in asked.answers if answer is not None) == sorted(made)
        assert len(asked.not_asked) == 150
        assert asked.stopped == "the budget of 50 calls is spent"


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
def test_it_stops_after_so_many_failures_in_a_row(works, give_up_after):
    def ask(number):
        tried.append(number)
        if not works[number]:
            raise OSError("down")
        return number

    tried = []
    asked = ask_each(range(len(works)), ask, name="it", give_up_after=give_up_after)
    row, expected = 0, []
    for number, fine in enumerate(works):
        expected.append(number)
        row = 0 if fine else row + 1
        if row == give_up_after:
            break
    assert tried == expected
    assert asked.not_asked == set(range(len(works))) - set(expected)
    assert [answer is not None for answer in asked.answers] == [n in expected and works[n] for n in range(len(works))]


def test_what_is_known_is_not_asked_even_after_it_stopped():
    def down(question):
        raise OSError

    asked = ask_each(list("abab"), down, name="it", known={"b": 1}.get, give_up_after=1)
    assert (asked.answers, asked.not_asked) == ([None, 1, None, 1], {2})
