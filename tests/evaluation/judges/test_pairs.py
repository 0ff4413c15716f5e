"""Judges: what they are asked, what they may answer, and that nothing they do raises."""

import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.evaluation.judges import (
    Budget,
    EndpointJudge,
    LanguageJudge,
    ModelJudge,
    PairJudge,
    parse_choice,
)


def longer(prompt, first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def reply(text):
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def endpoint(handler, **options):
    transport = httpx.MockTransport(handler)
    return EndpointJudge(
        "http://judge.test/v1/", "a-model", api_key="secret", transport=transport, backoff=0, **options
    )


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("[[A]]", "first"),
        ("The second is more helpful.\n\n[[B]]", "second"),
        ("[[C]] since [[C]]", "tie"),
        ("[[A]] or [[B]]", None),
        ("A", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_parse_choice(text, choice):
    assert parse_choice(text) == choice


class TestPairJudge:
    def test_both_orders_are_asked_and_a_disagreement_counts_half(self):
        asked = []

        def first_one(prompt, first, second):
            asked.append((prompt, first, second))
            return "first"

        verdicts = PairJudge(first_one, "first").compare(["p"], [("x", "yy")])
        assert asked == [("p", "x", "yy"), ("p", "yy", "x")]
        metrics = verdicts.metrics([0])
        assert metrics == {"failure_rate": 0.0, "win_rate": 0.5, "agreement": 0.0, "position_bias": 1.0}

    def test_wins_only_have_the_interval_of_as_many_prompts(self):
        """Wilson's for three prompts, `3 / (3 + z^2)` to 1."""
        verdicts = PairJudge(longer, "longer").compare(["q"] * 6, [("aaa", "a")] * 6)
        metrics = verdicts.metrics([0, 0, 1, 1, 2, 2])
        assert (metrics["win_rate"], metrics["win_rate_high"]) == (1.0, 1.0)
        assert metrics["win_rate_low"] == pytest.approx(3 / (3 + 1.959964**2), abs=1e-6)

    def test_failures_are_counted_and_left_out(self):
        answers = {"a": "first", "b": "nonsense", "c": None, "d": 3}

        def odd(prompt, first, second):
            if prompt == "e":
                raise TimeoutError
            return longer(prompt, first, second) if answers[prompt] == "first" else answers[prompt]

        verdicts = PairJudge(odd, "odd", give_up_after=99).compare(list("abcde"), [("xx", "x")] * 5)
        assert (verdicts.rows, verdicts.failures) == ([0], 4)
        assert verdicts.metrics(range(5)) == {
            "failure_rate": 0.8,
            "win_rate": 1.0,
            "agreement": 1.0,
            "position_bias": 0.0,
        }
        assert PairJudge(lambda *texts: None, "mute").compare(["p"], [("x", "y")]).metrics([0]) == {
            "failure_rate": 1.0
        }

    def test_it_gives_up_on_a_judge_that_is_down_and_asks_again_the_next_time(self):
        asked = []

        def down(prompt, first, second):
            asked.append(prompt)
            raise ConnectionError

        judge = PairJudge(down, "down", give_up_after=3)
        for _ in range(2):
            assert judge.compare([str(i) for i in range(50)], [("x", "y")] * 50).failures == 50
        assert len(asked) == 6

    def test_answers_are_kept_on_disk_and_failures_are_not(self, tmp_path):
        asked = []

        def counted(prompt, first, second):
            asked.append(prompt)
            return None if prompt == "bad" else longer(prompt, first, second)

        cache, pairs = tmp_path / "deep" / "cache.jsonl", [("xx", "x"), ("é\u2028", "<script>"), ("x", "y")]
        prompts = ["one", "two\n", "bad"]
        first = PairJudge(counted, "counted", cache).compare(prompts, pairs)
        with cache.open("a") as file:
            file.write('{"key": "half\n[1]\n{"key": "x", "answer": "maybe"}\n')
        second = PairJudge(counted, "counted", cache).compare(prompts, pairs)
        assert second == first
        assert asked == ["one", "one", "two\n", "two\n", "bad", "bad", "bad", "bad"]
        PairJudge(counted, "another name", cache).compare(["one"], [("xx", "x")])
        assert asked[8:] == ["one", "one"]
        assert {key for line in cache.read_text().splitlines()[:4] for key in json.loads(line)} == {"key", "answer"}

    def test_chats_are_shown_as_text(self):
        seen = []
        prompt = [{"role": "user", "content": "Hi"}]
        answers = ([{"role": "assistant", "content": "Hello"}], [{"role": "assistant", "content": "Go"}])
        PairJudge(lambda *texts: seen.append(texts), "seen").compare([prompt], [answers])
        assert seen[0] == ("user: Hi", "assistant: Hello", "assistant: Go")

    @given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=8))
    def test_swapped_pairs_give_the_other_win_rate(self, pairs):
        prompts = ["p"] * len(pairs)
        one = PairJudge(longer, "longer").compare(prompts, pairs).judgement.labels
        other = PairJudge(longer, "longer").compare(prompts, [pair[::-1] for pair in pairs]).judgement.labels
        assert [1 - label for label in other] == one

    def test_questions_at_the_same_time_keep_their_order(self):
        judge = PairJudge(longer, "longer", workers=4)
        pairs = [("x" * (i % 3), "x" * (i % 5)) for i in range(40)]
        expected = [1.0 if i % 3 > i % 5 else 0.0 if i % 3 < i % 5 else 0.5 for i in range(40)]
        assert judge.compare([str(i) for i in range(40)], pairs).judgement.labels == expected

    def test_probabilities_are_kept_and_junk_is_not(self, tmp_path):
        answers = iter([0.75, 0.5, float("nan"), 2.0, True, "A"])
        cache = tmp_path / "cache.jsonl"
        verdicts = PairJudge(lambda *texts: next(answers), "soft", cache).compare(list("abc"), [("x", "y")] * 3)
        assert (verdicts.rows, verdicts.answers, verdicts.judgement.labels) == ([0], [(0.75, 0.5)], [0.625])
        again = PairJudge(None, "soft", cache).compare(["a"], [("x", "y")])
        assert (again.judgement.labels, again.cached) == ([0.625], 2)

    def test_a_spent_budget_keeps_what_was_got(self):
        budget = Budget(calls=3)

        def paid(prompt, first, second):
            budget.begin()
            return longer(prompt, first, second)

        verdicts = PairJudge(paid, "paid").compare(list("abcd"), [("xx", "x")] * 4)
        assert (verdicts.rows, verdicts.failures, verdicts.not_asked) == ([0], 3, 3)
        assert verdicts.stopped == "the budget of 3 calls is spent"
        assert verdicts.problems == {}

    @given(
        st.lists(
            st.sampled_from(
                ["first", "second", "tie", 0.3, 1, None, "A", -1, float("nan"), float("inf"), [], OSError()]
            ),
            min_size=2,
            max_size=12,
        )
    )
    def test_only_answers_become_labels(self, said):
        said = said[: len(said) // 2 * 2]
        left = iter(said)

        def odd(*texts):
            answer = next(left)
            if isinstance(answer, Exception):
                raise answer
            return answer

        pairs = len(said) // 2
        verdicts = PairJudge(odd, "odd", give_up_after=99).compare(
            [str(row) for row in range(pairs)], [("x", "y")] * pairs
        )
        good = {"first", "second", "tie", 0.3, 1}
        usable = [isinstance(answer, str | float | int) and answer in good for answer in said]
        assert verdicts.rows == [row for row in range(pairs) if usable[2 * row] and usable[2 * row + 1]]
        assert verdicts.failures == pairs - len(verdicts.rows)
        assert sum(verdicts.problems.values()) == usable.count(False)
        labels = [] if verdicts.judgement is None else verdicts.judgement.labels
        assert all(0 <= label <= 1 for label in labels)
        assert len(labels) == len(verdicts.rows)


class Model:
    """A language model that gives these probabilities, and keeps what it was asked."""

    def __init__(self, weights=None, text="[[A]]"):
        self.weights, self.text, self.asked = weights, text, []

    def write(self, messages, max_tokens, temperature=0.0, seed=0):
        self.asked.append((list(messages), max_tokens))
        return self.text

    def weigh(self, messages, options):
        self.asked.append((list(messages), tuple(options)))
        return dict(zip(options, self.weights, strict=True))


class TestLanguageJudge:
    def test_a_soft_answer_is_the_share_of_the_first_letter(self):
        model = Model((0.6, 0.2))
        assert LanguageJudge(model, soft=True)("p", "x", "y") == pytest.approx(0.75)
        [(messages, options)] = model.asked
        assert options == ("A", "B")
        assert messages[0]["content"].endswith("Reply with nothing but the letter A or B.")

    def test_a_judge_with_something_else_to_say_gives_no_answer(self):
        for weights in ((0.3, 0.1), (0.0, 0.0)):
            assert LanguageJudge(Model(weights), soft=True)("p", "x", "y") is None
        assert LanguageJudge(Model((0.3, 0.1)), soft=True, least_mass=0.1)("p", "x", "y") == pytest.approx(0.75)
        assert LanguageJudge(Model((0.0, 0.0)), soft=True, least_mass=0.0)("p", "x", "y") is None

    @pytest.mark.parametrize("soft", [True, False])
    def test_reasons_come_first_and_the_form_of_the_reply_after_them(self, soft):
        model = Model((0.9, 0.1))
        LanguageJudge(model, soft=soft, reasoning_tokens=50)("p", "x", "y")
        (first, length), (second, _) = model.asked
        assert length == 50
        assert [message["role"] for message in second] == ["user", "assistant", "user"]
        assert second[:1] == first
        assert second[1]["content"] == model.text
        assert "letter A or B" not in first[0]["content"]
        assert "[[C]] for a tie" not in first[0]["content"]
        assert second[2]["content"].startswith("Which answer" if soft else "Reply with nothing but [[A]]")

    def test_both_orders_have_the_principle_of_the_pair(self):
        principles = [f"Principle {number}." for number in range(8)]
        model = Model((0.9, 0.1))
        judge = LanguageJudge(model, soft=True, principles=principles, seed=3)
        PairJudge(judge, "judge").compare(["p", "q"], [("x", "y"), ("x", "z")])
        shown = [next(p for p in principles if p in messages[0]["content"]) for messages, _ in model.asked]
        expected = [judge.principle("p", "x", "y"), judge.principle("q", "z", "x")]
        assert shown == [expected[0], expected[0], expected[1], expected[1]]

    def test_bad_numbers_and_questions(self):
        with pytest.raises(ValueError, match="`least_mass` from 0 to 1"):
            LanguageJudge(Model(), least_mass=1.5)
        with pytest.raises(ValueError, match="no place for them"):
            LanguageJudge(Model(), "{prompt}", principles=["Be kind."])


class TestEndpointJudge:
    def test_what_is_asked(self):
        requests = []

        def handler(request):
            requests.append(request)
            return reply("[[B]]")

        assert endpoint(handler)("How?", "like {second}", "so") == "second"
        [request] = requests
        assert str(request.url) == "http://judge.test/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer secret"
        body = json.loads(request.content)
        assert (body["model"], body["temperature"]) == ("a-model", 0)
        content = body["messages"][0]["content"]
        assert "<prompt>\nHow?\n</prompt>" in content
        assert "<answer_a>\nlike {second}\n</answer_a>" in content, "texts are put in at once"
        assert "<answer_b>\nso\n</answer_b>" in content

    @pytest.mark.parametrize("failure", [httpx.ReadTimeout("slow"), 429, 503])
    def test_it_tries_again(self, failure):
        tries = []

        def handler(request):
            tries.append(1)
            if len(tries) < 3:
                if isinstance(failure, int):
                    return httpx.Response(failure)
                raise failure
            return reply("[[A]]")

        assert endpoint(handler)("p", "x", "y") == "first"
        assert len(tries) == 3

    def test_errors_that_stay_are_raised_and_the_pair_judge_counts_them(self):
        def refused(request):
            return httpx.Response(401)

        def slow(request):
            raise httpx.ReadTimeout("slow")

        for handler in (
            refused,
            slow,
            lambda request: reply("no idea"),
            lambda request: httpx.Response(200, text="<h1>"),
        ):
            judge = PairJudge(endpoint(handler, retries=1), "endpoint")
            assert judge.compare(["p"], [("x", "y")]).failures == 1
        with pytest.raises(httpx.HTTPStatusError):
            endpoint(refused)("p", "x", "y")
        with pytest.raises(ValueError, match="answered no chat completion: it is no JSON: '<h1>'"):
            endpoint(lambda request: httpx.Response(200, text="<h1>"))("p", "x", "y")


def test_a_local_model_is_asked_with_its_chat_template(tiny_model_path):
    from transformers import pipeline

    generator = pipeline("text-generation", model=tiny_model_path)
    seen = []

    class Spy:
        tokenizer, model = generator.tokenizer, generator.model

        def __call__(self, asked, **options):
            seen.append((asked, options))
            return [{"generated_text": "[[A]]"}]

    assert ModelJudge(Spy())("p", "x", "y") == "first"
    asked, options = seen[0]
    assert asked[0]["role"] == "user"
    assert (options["do_sample"], options["return_full_text"]) == (False, False)
    small = ModelJudge(generator, question="the {prompt} {first} {second}")
    assert PairJudge(small, "tiny").compare(["film"], [("good", "bad")]).failures == 1  # a random model says nothing
