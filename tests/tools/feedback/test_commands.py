"""`rlhf-recipes judge` and `rlhf-recipes revise`, from the command line to the files."""

import json
import math

import httpx
import pytest

from rlhf_recipes.data import load_rows, to_completions
from rlhf_recipes.data.preferences import load_preferences
from rlhf_recipes.evaluation.judges import EndpointModel
from rlhf_recipes.reward_modeling.config import PreferenceConfig
from rlhf_recipes.reward_modeling.table import check_rows
from rlhf_recipes.tools.cli import main

PAIRS = [
    {"prompt": "Hi", "response_a": "Hello there!", "response_b": "No."},
    {"prompt": "Bye", "response_a": "x", "response_b": "Good bye."},
    {"prompt": "Why?", "response_a": "So.", "response_b": "It is."},
]
URL = ["--endpoint", "http://judge.test/v1", "--model", "a-model"]


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; return its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def served(monkeypatch):
    """Answer all requests to endpoints; return what was asked."""
    asked, answers = [], {"answer": None}

    def handler(request):
        body = json.loads(request.content)
        asked.append((request, body))
        return answers["answer"](body)

    def connect(self, url, model, **options):
        original(self, url, model, **options, backoff=0, transport=httpx.MockTransport(handler))

    original = EndpointModel.__init__
    monkeypatch.setattr(EndpointModel, "__init__", connect)
    asked_of = type("Served", (), {"asked": asked})

    def answer_with(function):
        answers["answer"] = function
        return asked_of

    return answer_with


def weigh_by_length(body):
    """Prefer the longer answer, a bit more where it is shown first."""
    text = body["messages"][0]["content"]
    first, second = (text.split(f"<answer_{name}>\n")[1].split("\n</answer")[0] for name in "ab")
    probability = 0.8 if len(first) > len(second) else 0.3
    top = [{"token": "A", "logprob": probability - 1}, {"token": " B", "logprob": -5.0}]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": top}]}}
    return httpx.Response(200, json={"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 1}})


class TestJudge:
    def test_labels_for_the_reward_stage_and_a_summary(self, run, served, tmp_path, monkeypatch):
        monkeypatch.setenv("JUDGE_KEY", "s3cret")
        data = write_lines(tmp_path / "pairs.jsonl", PAIRS)
        principles = tmp_path / "principles.txt"
        principles.write_text("Be kind.\nBe brief.\n")
        asked = served(weigh_by_length).asked
        words = ["judge", "--data", data, "--output", "prefs.jsonl", *URL, "--principles", principles, "--workers", 1]
        words += ["--key_variable", "JUDGE_KEY", "--least_mass", "0.1"]
        status, text = run(*words, "--prices", 10, 20)
        assert status == 0, text
        rows = read_lines(tmp_path / "prefs.jsonl")
        high, low = (1 / (1 + math.exp(1 - p - 5)) for p in (0.8, 0.3))
        labels = [(high + 1 - low) / 2, (low + 1 - high) / 2, (low + 1 - high) / 2]
        assert [row["label"] for row in rows] == pytest.approx(labels)
        assert rows[0]["in_both_orders"] == pytest.approx([high, low])
        assert {row["judge"] for row in rows} == {"a-model"}
        shown = [body["messages"][0]["content"] for _, body in asked]
        stated = [[row["principle"] in text for text in shown[2 * number :][:2]] for number, row in enumerate(rows)]
        assert stated == [[True, True]] * 3
        assert all(request.headers["authorization"] == "Bearer s3cret" for request, _ in asked)
        assert "cost: 6 calls, 300 tokens read, 6 written, 0 answers known, 0 failed" in text
        assert "price 0.00312" in text
        summary = json.loads((tmp_path / "prefs.summary.json").read_text())
        assert summary["cost"]["price"] == pytest.approx(300 * 10e-6 + 6 * 20e-6)
        assert summary["settings"]["judge"]["principles"] == ["Be kind.", "Be brief."]
        assert not any("s3cret" in path.read_text() for path in tmp_path.iterdir())
        table = check_rows(load_preferences("prefs.jsonl"), PreferenceConfig(use_cpu=True, bf16=False), "train")
        assert table["label"][:] == [row["label"] for row in rows]

        status, text = run(*words)
        assert (status, len(asked)) == (0, 6), "the same command goes on where it was, and all is known"
        assert read_lines(tmp_path / "prefs.jsonl") == rows
        status, text = run(*words, "--seed", 1)
        assert status == 2
        assert "other settings or rows wrote it" in text
        assert read_lines(tmp_path / "prefs.jsonl") == rows

    def test_a_spent_budget_keeps_its_rows_and_a_later_call_the_rest(self, run, served, tmp_path):
        data = write_lines(tmp_path / "pairs.jsonl", PAIRS)
        asked = served(weigh_by_length).asked
        words = ["judge", "--data", data, "--output", "prefs.jsonl", *URL, "--workers", 1, "--least_mass", "0.1"]
        status, text = run(*words, "--max_calls", 3)
        assert status == 0
        assert "0 pairs failed, 2 not asked about; stopped: the budget of 3 calls is spent" in text
        assert len(read_lines(tmp_path / "prefs.jsonl")) == 1
        assert run(*words, "--max_tokens", 1)[0] == 0
        assert len(asked) == 4, "one more until the tokens are spent"
        assert run(*words)[0] == 0
        assert len(asked) == 6
        assert len(read_lines(tmp_path / "prefs.jsonl")) == 3
        (tmp_path / "prefs.cache.jsonl").unlink()
        status, text = run(*words, "--max_calls", 2)
        assert status == 2
        assert "holds 3 rows, and this call got 1" in text
        assert len(read_lines(tmp_path / "prefs.jsonl")) == 3

    def test_labels_of_people_are_compared_and_never_shown(self, run, tmp_path):
        (tmp_path / "longer.py").write_text(
            "def longer(prompt, first, second):\n"
            "    if prompt == 'Odd':\n        return float('nan')\n"
            "    return 'first' if len(first) > len(second) else 'second'\n"
        )
        chosen = {"p0": "aa", "p1": "aaa", "p2": "aaaa", "p3": "aa", "Odd": "x"}
        rows = [{"prompt": p, "chosen": text, "rejected": "bbb", "margin": 0.5} for p, text in chosen.items()]
        data = write_lines(tmp_path / "human.jsonl", rows)
        status, text = run("judge", "--data", data, "--output", "out/prefs.jsonl", "--function", "longer.py:longer")
        assert status == 0, text
        written = read_lines(tmp_path / "out" / "prefs.jsonl")
        assert [row["label"] for row in written] == [0.0, 0.5, 1.0, 0.0]  # of equal lengths the second is named
        assert {row["human_label"] for row in written} == {1.0}
        assert not any("margin" in row for row in written)
        people = json.loads((tmp_path / "out" / "prefs.summary.json").read_text())["people"]
        assert (people["judge"]["accuracy"], people["longer"]["accuracy"]) == (0.375, 0.375)
        assert "people, 4 pairs: right are judge 0.375" in text
        assert "1 pairs failed" in text
        assert "neither first, second, tie nor a probability" in text
        assert "human_label" not in (tmp_path / "out" / "prefs.cache.jsonl").read_text()

    def test_reasons_are_clamped_and_rankings_become_pairs(self, run, served, tmp_path):
        data = write_lines(
            tmp_path / "ranks.jsonl", [{"prompt": "Hi", "completions": ["aaa", "bb", "c"], "ranks": [1, 2, 3]}]
        )
        asked = served(weigh_by_length).asked
        words = ["judge", "--data", data, *URL, "--reasoning_tokens", 20, "--least_mass", "0.1", "--workers", 1]
        assert run(*words, "--output", "prefs.jsonl")[0] == 0
        rows = read_lines(tmp_path / "prefs.jsonl")
        assert len(rows) == 3
        assert len(asked) == 12, "reasons, then the answer, in both orders"
        assert all(0.4 <= row["label"] <= 0.6 for row in rows)
        assert rows[0]["label"] == pytest.approx(0.5, abs=0.1)
        assert run(*words, "--output", "wide.jsonl", "--clamp", 0, 1, "--cache", "prefs.cache.jsonl")[0] == 0
        assert len(asked) == 12, "the answers are known, whatever becomes of them"

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (lambda body: httpx.Response(500, text="down"), "answered with the status 500: 'down'"),
            (lambda body: httpx.Response(200, text="<h1>Hi</h1>"), "it is no JSON"),
            (lambda body: httpx.Response(200, json={"choices": [{"message": {"content": "A"}}]}), "no `top_logprobs`"),
        ],
    )
    def test_a_judge_that_fails_writes_nothing(self, run, served, tmp_path, answer, said):
        data = write_lines(tmp_path / "pairs.jsonl", PAIRS * 4)
        asked = served(answer).asked
        status, text = run("judge", "--data", data, "--output", "prefs.jsonl", *URL, "--workers", 1, "--retries", 0)
        assert status == 2
        assert "No pair got a label" in text
        assert said in text
        assert "stopped: 5 failures in a row" in text
        assert len(asked) == 5
        assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--endpoint", "http://a/v1"], "needs `--model`"),
            ([*URL, "--key_variable", "NO_SUCH_KEY"], "'NO_SUCH_KEY' (`--key_variable`) is not set"),
            ([*URL, "--workers", 0], "`--workers` must be at least 1"),
            ([*URL, "--clamp", "0.6", "0.4"], "both sides of 0.5"),
            ([*URL, "--max_calls", "-1"], "A budget must be at least 0"),
            ([*URL, "--principles", "none.txt"], "none.txt"),
            (["--function", "math:sqrt", "--reasoning_tokens", 5], "A function takes no"),
            (["--function", "math"], "Name the function as"),
            (["--endpoint", "file:///etc/passwd", "--model", "m"], "http:// or https://"),
            (["--local", "./nowhere"], "nowhere"),
        ],
    )
    def test_bad_arguments(self, run, tmp_path, words, message):
        data = write_lines(tmp_path / "pairs.jsonl", PAIRS)
        status, text = run("judge", "--data", data, "--output", "prefs.jsonl", *words)
        assert status == 2
        assert message in text
        assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "p", "response_a": "x", "response_b": "y", "judge": "z"}, "`judge` would stand beside"),
            ({"prompt": "p", "response_a": "x"}, "Expected two completions"),
            ({"prompt": "p", "response_a": "x", "response_b": ""}, "empty `response_b`"),
            ({"prompt": "p", "completions": ["x"]}, "there is only one"),
        ],
    )
    def test_bad_rows(self, run, tmp_path, row, message):
        data = write_lines(tmp_path / "pairs.jsonl", [row])
        status, text = run("judge", "--data", data, "--output", "prefs.jsonl", "--function", "math:sqrt")
        assert status == 2
        assert message in text

    def test_answers_that_nobody_has_judged_become_all_pairs(self, run, tmp_path):
        (tmp_path / "first.py").write_text("def first(prompt, first, second):\n    return 0.75\n")
        rows = [
            {"prompt": "p", "completions": ["a", "b", "c"]},
            {"prompt": "q", "completions": ["d", "e"], "note": "n"},
        ]
        data = write_lines(tmp_path / "answers.jsonl", rows)
        status, text = run("judge", "--data", data, "--output", "prefs.jsonl", "--function", "first.py:first")
        assert status == 0, text
        assert "people" not in text
        written = read_lines(tmp_path / "prefs.jsonl")
        assert [row["completions"] for row in written] == [["a", "b"], ["a", "c"], ["b", "c"], ["d", "e"]]
        assert {(row["label"], row.get("human_label")) for row in written} == {(0.5, None)}
        assert (written[3]["note"], written[3]["line"]) == ("n", 2)

    def test_a_local_model_judges_chats(self, run, tmp_path, tiny_model_path):
        chat = [{"role": "user", "content": "write about this film"}]
        row = {"prompt": chat, "response_a": "good film", "response_b": "bad film"}
        data = write_lines(tmp_path / "pairs.jsonl", [row])
        question = tmp_path / "question.txt"
        question.write_text("{prompt} : {first} or {second}")
        words = ["judge", "--data", data, "--output", "prefs.jsonl", "--local", tiny_model_path]
        status, text = run(*words, "--question", question)
        assert status == 2, "the tiny model has no token for A or B"
        assert "what was said is no answer" in text


class TestRevise:
    def served_texts(self, body):
        asked = body["messages"][-1]["content"]
        text = "Better." if "anew" in asked else "Too short." if "<answer>" in asked else "No."
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})

    def test_rows_for_sft_and_pairs_for_the_reward_stage(self, run, served, tmp_path):
        data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}, {"prompt": "Bye "}, {"prompt": "Why?"}])
        (tmp_path / "principles.txt").write_text("Be kind.\n")
        asked = served(self.served_texts).asked
        words = ["revise", "--data", data, "--output", "sft.jsonl", "--pairs", "pairs.jsonl", *URL]
        words += ["--principles", "principles.txt", "--rounds", 2, "--workers", 1]
        status, text = run(*words, "--max_calls", 7)
        assert status == 0, text
        assert "sft.jsonl: 1 rows of 3 prompts; 1 answers changed" in text
        assert "0 prompts failed, 2 not asked about; stopped: the budget of 7 calls is spent" in text
        status, text = run(*words)
        assert (status, len(asked)) == (0, 15), "five texts a row, none of them twice"
        rows = read_lines(tmp_path / "sft.jsonl")
        assert [(row["prompt"], row["completion"]) for row in rows] == [
            ("Hi", " Better."),
            ("Bye ", "Better."),
            ("Why?", " Better."),
        ]
        assert rows[0]["rounds"] == [{"principle": "Be kind.", "critique": "Too short.", "revision": "Better."}] * 2
        assert (rows[1]["first_answer"], rows[1]["row"], rows[1]["source"], rows[1]["model"]) == (
            "No.",
            1,
            data,
            "a-model",
        )
        assert len({body["seed"] for _, body in asked}) == 3
        assert "about" in text, "the endpoint says no tokens"
        kept = to_completions(load_rows("sft.jsonl"))
        assert kept["completion"][:] == [row["completion"] for row in rows]
        table = check_rows(load_preferences("pairs.jsonl"), PreferenceConfig(use_cpu=True, bf16=False), "train")
        assert table[0]["completions"] == [" Better.", " No."]
        assert set(table["label"]) == {1.0}
        status, text = run(*words, "--temperature", 0)
        assert status == 2
        assert "other settings or rows wrote it" in text

    def test_chats_get_messages_and_failures_are_left_out(self, run, served, tmp_path):
        def sometimes(body):
            if "Odd" in str(body["messages"]):
                return httpx.Response(200, json={"choices": [{"message": {"content": " "}}]})
            return self.served_texts(body)

        prompts = [[{"role": "user", "content": text}] for text in ("", "Hi", "Odd")]
        data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
        (tmp_path / "principles.txt").write_text("Be kind.\n")
        served(sometimes)
        status, text = run(
            "revise",
            "--data",
            data,
            "--output",
            "sft.jsonl",
            *URL,
            "--principles",
            "principles.txt",
            "--drop_bad_rows",
        )
        assert status == 0, text
        [row] = read_lines(tmp_path / "sft.jsonl")
        assert row["completion"] == [{"role": "assistant", "content": "Better."}]
        assert row["row"] == 1, "of the file, in which a row could not be used"
        assert "1 prompts failed" in text
        assert "the model wrote nothing" in text

    def test_bad_arguments(self, run, tmp_path):
        data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
        (tmp_path / "principles.txt").write_text("Be kind.\n")
        words = ["revise", "--data", data, "--output", "sft.jsonl", *URL, "--principles", "principles.txt"]
        status, text = run(*words, "--rounds", 0)
        assert status == 2
        assert "`--rounds` and `--max_new_tokens` must be at least 1" in text
