"""Judges: what they are asked, what they may answer, and that nothing they do raises."""

import json
import random

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlhf_recipes.evaluation.judges import EndpointJudge, ModelJudge, PairJudge, judge_in_both_orders, parse_choice
from rlhf_recipes.reward_modeling.losses import pairwise_loss


def longer(prompt, first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def reply(text):
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def endpoint(handler, **options):
    transport = httpx.MockTransport(handler)
    return EndpointJudge("http://judge.test/v1/", "a-model", api_key="secret", transport=transport, **options)


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
        with pytest.raises(ValueError, match="answered no chat completion: '<h1>'"):
            endpoint(lambda request: httpx.Response(200, text="<h1>"))("p", "x", "y")


def test_a_local_model_is_asked_with_its_chat_template(tiny_model_path):
    from transformers import pipeline

    generator = pipeline("text-generation", model=tiny_model_path)
    seen = []

    class Spy:
        tokenizer = generator.tokenizer

        def __call__(self, asked, **options):
            seen.append((asked, options))
            return [{"generated_text": "[[A]]"}]

    assert ModelJudge(Spy())("p", "x", "y") == "first"
    asked, options = seen[0]
    assert asked[0]["role"] == "user"
    assert (options["do_sample"], options["return_full_text"]) == (False, False)
    small = ModelJudge(generator, question="the {prompt} {first} {second}")
    assert PairJudge(small, "tiny").compare(["film"], [("good", "bad")]).failures == 1  # a random model says nothing


PAIRS = [("good", "bad"), ("bad", "good"), ("same", "same"), ("bad", "bad")]


PROMPTS = ["q"] * len(PAIRS)


ORDER = ["bad", "same", "good"]


def honest(prompt, first, second):
    difference = ORDER.index(first) - ORDER.index(second)
    return "first" if difference > 0 else "second" if difference < 0 else "tie"


class TestJudgeInBothOrders:
    def test_numbers(self):
        # Answers by (order, swapped): agree on the first, agree on the second, first twice, second twice, first twice,
        # two ties, and a tie against a choice, which is a disagreement.
        answers = {
            "1": ("first", "second"),
            "2": ("second", "first"),
            "3": ("first", "first"),
            "4": ("second", "second"),
            "5": ("first", "first"),
            "6": ("tie", "tie"),
            "7": ("tie", "second"),
        }
        judged = judge_in_both_orders(
            lambda prompt, first, second: answers[prompt][first == "b"], list(answers), [("a", "b")] * 7
        )
        assert judged.labels == [1.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5]
        assert judged.agreement == 3 / 7
        assert (judged.shown_first, judged.shown_second) == (2, 1)
        assert judged.position_bias == 1 / 7
        assert judged.position_bias_p_value == 1.0

    def test_labels_feed_the_pairwise_loss(self):
        # C27 at a lead of 1: .313262 where the judge agrees, 1.313262 where it says the opposite, .813262 for a tie.
        judged = judge_in_both_orders(honest, PROMPTS, PAIRS)
        loss = pairwise_loss(torch.ones(4), torch.zeros(4), label=torch.tensor(judged.labels))
        assert loss.item() == pytest.approx((0.313262 + 1.313262 + 2 * 0.813262) / 4, abs=1e-6)

    def test_honest_judge(self):
        judged = judge_in_both_orders(honest, PROMPTS, PAIRS)
        assert judged.labels == [1.0, 0.0, 0.5, 0.5]
        assert (judged.agreement, judged.position_bias, judged.position_bias_p_value) == (1.0, 0.0, 1.0)

    def test_judge_that_takes_the_first(self):
        # C56: it disagrees with itself everywhere, so that it says nothing, and its bias is plain to see.
        judged = judge_in_both_orders(lambda prompt, first, second: "first", ["q"] * 20, [("a", "b")] * 20)
        assert judged.labels == [0.5] * 20
        assert (judged.agreement, judged.position_bias) == (0.0, 1.0)
        assert judged.position_bias_p_value == pytest.approx(2 * 0.5**20)
        judged = judge_in_both_orders(lambda prompt, first, second: "second", ["q"] * 20, [("a", "b")] * 20)
        assert (judged.shown_first, judged.shown_second, judged.position_bias) == (0, 20, -1.0)

    def test_coin_flips_are_no_bias(self):
        rng = random.Random(0)
        judged = judge_in_both_orders(
            lambda prompt, first, second: rng.choice(["first", "second"]), ["q"] * 400, [("a", "b")] * 400
        )
        assert judged.agreement == pytest.approx(0.5, abs=0.1)
        assert abs(judged.position_bias) < 0.1
        both = judged.shown_first + judged.shown_second
        assert judged.position_bias_p_value == pytest.approx(binomtest(judged.shown_first, both).pvalue)
        assert judged.position_bias_p_value > 0.01

    def test_swapping_all_pairs_mirrors_labels(self):
        judged = judge_in_both_orders(honest, PROMPTS, PAIRS)
        swapped = judge_in_both_orders(honest, PROMPTS, [(second, first) for first, second in PAIRS])
        assert swapped.labels == [1 - label for label in judged.labels]

    @pytest.mark.parametrize(
        ("prompts", "pairs", "message"),
        [
            ([], [], "got 0 prompts"),
            (["q"], PAIRS[:2], "got 1 prompts and 2 pairs"),
            (["q", "q"], [PAIRS[0], ("bad", "bad", "bad")], "row 1 has"),
            (["q"], ["ab"], "row 0 has 'ab'"),
        ],
    )
    def test_bad_rows(self, prompts, pairs, message):
        with pytest.raises(ValueError, match=message):
            judge_in_both_orders(honest, prompts, pairs)

    def test_bad_answers(self):
        with pytest.raises(ValueError, match="got 'A' for row 0"):
            judge_in_both_orders(lambda prompt, first, second: "A", ["q"], [("a", "b")])
