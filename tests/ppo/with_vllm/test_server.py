"""What is made of a server's answers: asked again, refused, or not believed."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlhf_recipes.ppo.vllm.engine import Adapter, Drawing, SamplingStopped
from rlhf_recipes.ppo.vllm.server import VLLMServer

ADAPTER, DRAWING = Adapter("policy-1", Path("/adapters/policy-1")), Drawing(1.0, max_tokens=3, ends=(1,))
MODELS = (200, '{"data": [{"id": "base", "max_model_len": 64}]}')
COMPLETION = (200, '{"choices": [{"token_ids": [5, 1], "logprobs": {"token_logprobs": [-0.5, -2]}}]}')
UNKNOWN = (404, '{"error": {"message": "The model `policy-1` does not exist."}}')


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply()

    def reply(self):
        with self.server.lock:
            self.server.seen.append(self.path)
            answers = self.server.answers.get(self.path, [(404, '{"detail": "Not Found"}')])
            status, text = answers.pop(0) if len(answers) > 1 else answers[0]
        if status is None:  # no answer for a while
            time.sleep(text)
            return
        self.send_response(status)
        if status == 307:
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@contextmanager
def answering(timeout=2.0, **paths):
    """A client of a server that gives these answers in turn, the last one for ever; and the paths that were asked."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    names = {"models": "/v1/models", "completions": "/v1/completions", "health": "/health"}
    names |= {"load": "/v1/load_lora_adapter", "unload": "/v1/unload_lora_adapter"}
    known = {
        "models": [MODELS],
        "load": [(200, "Success")],
        "health": [(200, "")],
        "completions": [COMPLETION],
    } | paths
    http.answers, http.seen, http.lock = (
        {names[name]: list(each) for name, each in known.items()},
        [],
        threading.Lock(),
    )
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield VLLMServer(f"http://127.0.0.1:{http.server_port}", timeout, "vllm serve base"), http.seen
    finally:
        http.shutdown()
        http.server_close()


def test_completions_and_scores():
    score = (200, '{"choices": [{"prompt_logprobs": [null, {"6": {"logprob": -1.5}, "9": {"logprob": -0.1}}]}]}')
    with answering(completions=[COMPLETION, score]) as (server, seen):
        assert server.context == 64
        [completion] = server.sample(ADAPTER, [[5, 6]], [3], DRAWING)
        assert (completion.ids, completion.logps) == ([5, 1], [-0.5, -2.0])
        assert server.score(ADAPTER, [5, 6]) == [-1.5]
        server.load(ADAPTER)
        server.unload(ADAPTER)
    assert seen[-2:] == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]


def test_it_is_asked_again_while_it_is_away():
    busy = [(503, "loading"), (429, "later"), (500, "{}")]
    with answering(completions=[*busy, UNKNOWN, COMPLETION]) as (server, seen):
        assert server.sample(ADAPTER, [[5]], [3], DRAWING)[0].ids == [5, 1]
        assert seen[1:] == ["/v1/completions"] * 4 + ["/v1/load_lora_adapter", "/v1/completions"]
        assert server.loads == 1


def test_one_that_does_not_answer_or_is_too_slow_is_given_up():
    with answering(completions=[(503, "x" * 500)], timeout=0.3) as (server, _):
        message = (
            r"has not answered for [\d.]+ seconds \(`vllm_server_timeout`: 0.3\); the last try: status 503, 'x+'\."
        )
        with pytest.raises(
            SamplingStopped, match=f"{message} Raise the timeout if it is slow, or start it: vllm serve"
        ):
            server.sample(ADAPTER, [[5]], [3], DRAWING)
    with (
        answering(completions=[(None, 0.4)], timeout=0.3) as (server, seen),
        pytest.raises(SamplingStopped, match="the last try: ReadTimeout"),
    ):
        server.sample(ADAPTER, [[5]], [3], DRAWING)
    assert seen.count("/v1/completions") >= 1
    with pytest.raises(SamplingStopped, match="ConnectError"):
        VLLMServer("http://127.0.0.1:9", 0.1, "vllm serve base")


def test_other_requests_that_are_answered_show_that_it_is_alive():
    with answering(completions=[(503, ""), (503, ""), COMPLETION, (503, ""), COMPLETION], timeout=0.5) as (server, _):
        rows = server.sample(ADAPTER, [[5], [6]], [3, 4], DRAWING)
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"load": [(400, '{"error": {"message": "It has already been loaded."}}')]}, None),
        (
            {"load": [(404, '{"detail": "Not Found"}')]},
            "to load the adapter .*cannot be loaded at run time.*vllm serve",
        ),
        ({"load": [(404, '{"error": {"message": "No adapter found"}}')]}, "must be able to read: 'No adapter found'"),
        ({"load": [(500, '{"error": {"message": "LoRA rank 32 is greater"}}')]}, "'LoRA rank 32 is greater'"),
        ({"load": [(500, '{"error": {"message": "Dead"}}'), (200, "Success")]}, None),
    ],
)
def test_an_adapter_that_it_does_not_load(answers, message):
    with answering(**answers) as (server, _):
        if message is None:
            server.load(ADAPTER)
            return
        with pytest.raises(SamplingStopped, match=message):
            server.load(ADAPTER)


def completion(ids, logps):
    return (200, f'{{"choices": [{{"token_ids": {ids}, "logprobs": {{"token_logprobs": {logps}}}}}]}}')


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (400, '{"error": {"message": "too\\n long \\u001b[31m"}}'),
            r"refused a completion: 'too\\n long \\x1b\[31m'",
        ),
        (UNKNOWN, "refused a completion: 'The model `policy-1` does not exist.'"),
        ((307, "http://elsewhere.invalid/"), "refused a completion"),
        ((200, "not JSON"), "refused a completion: 'not JSON'"),
        ((200, "[" * 100_000), "refused a completion"),
        (completion("null", "[-1]"), "without token ids"),
        (completion("[]", "[]"), "without token ids"),
        (completion('["a"]', "[-1]"), "without token ids"),
        (completion("[5, 1]", "[-1]"), "where 2 log-probabilities were expected"),
        (completion("[5, 1]", "[-1, null]"), "where 2 log-probabilities were expected"),
        (completion("[5, 1]", "[-1, NaN]"), "where 2 log-probabilities were expected"),
        (completion("[5, 1]", "[-1, 0.5]"), "where 2 log-probabilities were expected"),
        (completion("[5, 6]", "[-1, -1]"), "cut a completion off after 2 tokens, where 3 were allowed"),
        (completion("[5, 6, 7, 8]", "[-1, -1, -1, -1]"), r"went on after the end of a completion: it gave 4 tokens"),
        (completion("[1, 6, 7]", "[-1, -1, -1]"), r"with end tokens at \[0\]"),
    ],
)
def test_answers_that_are_not_believed(answer, message):
    with answering(completions=[answer]) as (server, _), pytest.raises(SamplingStopped, match=message):
        server.sample(ADAPTER, [[5]], [3], DRAWING)


def test_an_answer_without_end_and_scores_of_other_tokens_are_not_believed(monkeypatch):
    monkeypatch.setattr("rlhf_recipes.ppo.vllm.server._LARGEST_ANSWER", 10)
    with (
        answering(completions=[(200, " " * 100)], models=[(200, "{}")]) as (server, _),
        pytest.raises(SamplingStopped, match="is longer than 10 bytes"),
    ):
        server.sample(ADAPTER, [[5]], [3], DRAWING)
    monkeypatch.undo()
    other = (200, '{"choices": [{"prompt_logprobs": [null, {"7": {"logprob": -1.5}}]}]}')
    with (
        answering(completions=[other]) as (server, _),
        pytest.raises(SamplingStopped, match="1 log-probabilities were"),
    ):
        server.score(ADAPTER, [5, 6])
