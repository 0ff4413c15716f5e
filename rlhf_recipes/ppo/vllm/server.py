"""A vLLM server, spoken to over HTTP: its completions endpoint, and those that load and unload adapters."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_recipes.extras import from_extra
from rlhf_recipes.ppo.vllm.engine import (
    Adapter,
    Completion,
    Drawing,
    SamplingStopped,
    check_log_probs,
    checked_completion,
)
from rlhf_recipes.statistics.numbers import value_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)

_REQUESTS = 64  # at a time, as TRL sends them
_LARGEST_ANSWER = 64 * 2**20  # bytes
_TRIES = 3  # to load an adapter that the server says it does not know
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds between two tries


class VLLMServer:
    """The server at an address, asked again while it is away.

    A request is repeated, with the seed that it had, until the server has answered none for `timeout` seconds. A
    server that was restarted does not know the adapter any more and gets it again.

    Args:
        url: Its address, such as `http://127.0.0.1:8000`. Requests go nowhere else.
        timeout: Seconds without any answer after which it counts as lost.
        launch: The command that starts it, for the messages.

    Raises:
        SamplingStopped: If it does not answer, or refuses, also from every method.
        ModuleNotFoundError: Without the extra `vllm`, which brings httpx.
    """

    def __init__(self, url: str, timeout: float, launch: str) -> None:
        with from_extra("vllm", needed_by="`vllm_mode: server`"):
            import httpx

        self._url = str(httpx.URL(url).copy_with(username=None, password=None, query=None)).rstrip("/")
        self._timeout, self._launch = timeout, launch
        limits = httpx.Limits(max_connections=_REQUESTS)
        # A try has half of the time, so that a request that was lost on the way is sent again
        verify = httpx.create_ssl_context() if url.startswith("https") else False  # it takes longer than a request
        self._client = httpx.Client(base_url=url, timeout=timeout / 2, limits=limits, verify=verify)
        self._answered, self._lock, self.loads = 0.0, threading.Lock(), 0
        status, answer = self._ask("GET", "/v1/models")
        if status != 200:
            raise self._refused("to say what it serves", answer)
        context = value_at(answer, "data", 0, "max_model_len")
        self.context: int | None = context if isinstance(context, int) else None

    def load(self, adapter: Adapter) -> None:
        """Load an adapter; one that is there stays."""
        request = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
        status, answer = self._ask("POST", "/v1/load_lora_adapter", request, answers=(500,))
        if status == 500:  # an adapter that it cannot serve, or its engine died with the request
            self._ask("GET", "/health")
            status, answer = self._ask("POST", "/v1/load_lora_adapter", request, answers=(500,))
        if status != 200 and "already been loaded" not in _message(answer):
            if status == 404 and value_at(answer, "detail") is not None:  # there is no such endpoint
                answer = "adapters cannot be loaded at run time"
            raise self._refused(
                f"to load the adapter in {str(adapter.folder)!r}, which it must be able to read", answer
            )
        self.loads += 1

    def unload(self, adapter: Adapter) -> None:
        """Forget an adapter, if it is there."""
        self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": adapter.name})

    def sample(
        self, adapter: Adapter, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawing: Drawing
    ) -> list[Completion]:
        """Sample one completion after each prompt, each with a seed of its own."""
        requests = (drawing.parameters(seed) for seed in seeds)  # one for each row: a server has one seed for each
        with ThreadPoolExecutor(_REQUESTS) as pool:
            choices = list(pool.map(partial(self._complete, adapter), prompts, requests))
        return [
            checked_completion(choice.get("token_ids"), value_at(choice, "logprobs", "token_logprobs"), drawing)
            for choice in choices
        ]

    def score(self, adapter: Adapter, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of the tokens of a text but the first, at temperature 1, in nats."""
        choice = self._complete(adapter, ids, {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0})
        found: Any = choice.get("prompt_logprobs")
        places = found[1:] if isinstance(found, list) else []
        values = [value_at(place, str(token), "logprob") for place, token in zip(places, ids[1:], strict=False)]
        check_log_probs(values, len(ids) - 1)
        return values

    def _complete(self, adapter: Adapter, prompt: Sequence[int], parameters: dict[str, Any]) -> dict[str, Any]:
        request = {"model": adapter.name, "prompt": list(prompt), "return_token_ids": True, **parameters}
        for _ in range(_TRIES):
            loads = self.loads
            status, answer = self._ask("POST", "/v1/completions", request)
            if status == 200 and isinstance(choice := value_at(answer, "choices", 0), dict):
                return choice
            if status != 404:
                break
            with self._lock:  # it was restarted: one of the requests loads the adapter for all
                if self.loads == loads:
                    logger.warning("The vLLM server at %s was restarted: it gets the adapter again.", self._url)
                    self.load(adapter)
        raise self._refused("a completion", answer)

    def _ask(
        self, method: str, path: str, payload: dict[str, Any] | None = None, answers: tuple[int, ...] = ()
    ) -> tuple[int, Any]:
        """Send a request until it is answered; of errors of the server itself only `answers` are."""
        import httpx

        started = time.monotonic()
        for wait in _waits():
            try:
                status, body = self._send(method, path, payload)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if (status < 500 and status != 429) or status in answers:
                    self._answered = time.monotonic()
                    return status, _parsed(body)
                problem = f"status {status}, {_message(_parsed(body))}"
            silent = time.monotonic() - max(started, self._answered)
            if silent + wait > self._timeout:
                raise SamplingStopped(
                    f"The vLLM server at {self._url} has not answered for {silent:.3g} seconds "
                    f"(`vllm_server_timeout`: {self._timeout:g}); the last try: {problem}. Raise the timeout if it is "
                    f"slow, or start it: {self._launch}"
                )
            if wait == _FIRST_WAIT:
                logger.warning("The vLLM server at %s does not answer (%s): trying again.", self._url, problem)
            time.sleep(wait)
        raise AssertionError  # the waits do not end

    def _send(self, method: str, path: str, payload: dict[str, Any] | None) -> tuple[int, bytes]:
        with self._client.stream(method, path, json=payload) as response:
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if len(body) > _LARGEST_ANSWER:
                    raise SamplingStopped(f"An answer of {self._url} is longer than {_LARGEST_ANSWER} bytes.")
        return response.status_code, bytes(body)

    def _refused(self, what: str, answer: Any) -> SamplingStopped:
        return SamplingStopped(
            f"The vLLM server at {self._url} refused {what}: {_message(answer)}. Start it with: {self._launch}"
        )


def _waits() -> Iterator[float]:
    yield from (min(_FIRST_WAIT * 2**number, _LONGEST_WAIT) for number in itertools.count())


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body[:200].decode("utf-8", errors="replace")


def _message(answer: Any) -> str:
    """What an answer says, in one line of plain characters."""
    found = value_at(answer, "error", "message")
    text = found if isinstance(found, str) else answer if isinstance(answer, str) else json.dumps(answer)
    return ascii(text[:300])
