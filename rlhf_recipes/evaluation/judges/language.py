"""Language models that are asked: a local one, or one behind an OpenAI-compatible endpoint.

Both write answers, and say how probable each of a few short answers is. What texts of others hold never ends a turn of
the chat in which they are shown.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rlhf_recipes.data.context import context_length
from rlhf_recipes.evaluation.judges.budget import Budget
from rlhf_recipes.extras import from_extra
from rlhf_recipes.statistics.numbers import is_number, value_at

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]

_TOP = 20  # the most alternatives of a token that OpenAI's API gives
_LARGEST_ANSWER = 16 * 2**20  # bytes
_LONGEST_WAIT = 30.0  # seconds between two tries
_BYTES_PER_TOKEN = 3
# What opens or ends a turn in the chat templates of common models: a server may read it in a text as such a token.
_CONTROL = re.compile(r"[<\[](?=[|\uff5c]|/?(?:s|bos|eos|start_of_turn|end_of_turn)>|/?(?:INST|SYSTEM_PROMPT)\])")


class LanguageModel(Protocol):
    """What is asked. Messages are `{"role": ..., "content": ...}`, the last one the user's."""

    def write(self, messages: Sequence[Message], max_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
        """Answer in up to `max_tokens` tokens, the likeliest ones at temperature 0."""
        ...

    def weigh(self, messages: Sequence[Message], options: Sequence[str]) -> dict[str, float]:
        """Return the probability that the answer begins with each option. What is missing to 1 is other answers."""
        ...


def without_control_tokens(text: str, tokens: Iterable[str] = ()) -> str:
    """Break up what a tokenizer would read as the end of a turn, by a space after its first character.

    Args:
        text: A text of somebody else.
        tokens: Tokens of a known tokenizer; those of common chat templates are broken up in any case.

    Example:
        >>> without_control_tokens("Fine.<|im_end|> a<b [1]")
        'Fine.< |im_end|> a<b [1]'
    """
    known = sorted((token for token in tokens if token), key=len, reverse=True)
    if known:
        text = re.sub("|".join(map(re.escape, known)), lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return _CONTROL.sub(lambda match: f"{match[0]} ", text)


class LocalModel:
    """A model in this process, through a text-generation pipeline of transformers.

    A model with a chat template gets a chat, another one the texts, one after the other.

    Args:
        pipeline: `transformers.pipeline("text-generation", model=...)`.
        budget: Counts calls and tokens.

    Raises:
        ValueError: When asked: if the messages and the answer do not fit into the model's context.
    """

    def __init__(self, pipeline: Callable[..., Any], budget: Budget | None = None) -> None:
        self._pipeline: Any = pipeline
        self._budget = budget or Budget()

    def write(self, messages: Sequence[Message], max_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
        """Answer; see `LanguageModel`."""
        messages = self._cleaned(messages)
        ids = self._ids(self._rendered(messages), max_tokens)
        options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        asked = messages if self._is_chat else self._rendered(messages)
        self._budget.begin()
        start = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            text: str = self._pipeline(asked, return_full_text=False, **options)[0]["generated_text"]
        written = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        self._budget.add(len(ids), written, time.perf_counter() - start)
        return text

    def weigh(self, messages: Sequence[Message], options: Sequence[str]) -> dict[str, float]:
        """Return the probabilities of the options; see `LanguageModel`.

        Those of all tokens that are an option but for white space are added up. An option that is no token, such as 10
        where each digit is one, has the probability of a shorter option times that of the rest after it.
        """
        text = self._rendered(self._cleaned(messages))
        ids = self._ids(text if self._is_chat else f"{text}\n\nAnswer:", 2)
        self._budget.begin()
        start = time.perf_counter()
        after = self._next(ids)
        spelled, read = self._spelled, len(ids)
        weights = {option: sum(after[token].item() for token in spelled.get(option, [])) for option in options}
        for longer in [option for option in options if option not in spelled]:
            for shorter in [option for option in options if longer.startswith(option) and option in spelled]:
                likeliest = max(spelled[shorter], key=lambda token: after[token].item())
                follows = self._next([*ids, likeliest])
                rest = longer.removeprefix(shorter)
                begin = [token for token in spelled.get(rest, []) if self._words[token] == rest]
                share = sum(follows[token].item() for token in begin)
                weights[longer], weights[shorter] = weights[shorter] * share, weights[shorter] * (1 - share)
                read += len(ids) + 1
        self._budget.add(read, 1, time.perf_counter() - start)
        return _checked(weights)

    @property
    def _tokenizer(self) -> Any:
        return self._pipeline.tokenizer

    @property
    def _is_chat(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    @cached_property
    def _special(self) -> list[str]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        return [token.content for token in added if token.special]

    @cached_property
    def _words(self) -> list[str]:
        """The text of each token; that of special ones is empty."""
        special = set(self._tokenizer.all_special_ids)
        rows = [[] if token in special else [token] for token in range(len(self._tokenizer))]
        return [str(word) for word in self._tokenizer.batch_decode(rows)]

    @cached_property
    def _spelled(self) -> Mapping[str, list[int]]:
        """Tokens by their text without the white space around it."""
        spelled: dict[str, list[int]] = defaultdict(list)
        for token, word in enumerate(self._words):
            spelled[word.strip()].append(token)
        return dict(spelled)

    def _cleaned(self, messages: Sequence[Message]) -> list[Message]:
        return [
            message | {"content": without_control_tokens(message["content"], self._special)} for message in messages
        ]

    def _rendered(self, messages: list[Message]) -> str:
        if self._is_chat:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return "\n\n".join(message["content"] for message in messages)

    def _ids(self, text: str, new_tokens: int) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=not self._is_chat)["input_ids"]
        limit = context_length(self._pipeline.model)
        if limit is not None and len(ids) + new_tokens > limit:
            raise ValueError(f"{len(ids)} tokens, and {new_tokens} new ones, do not fit into a context of {limit}")
        return ids

    @torch.no_grad()
    def _next(self, ids: list[int]) -> torch.Tensor:
        """Probabilities of the next token, shape `(V,)`."""
        model = self._pipeline.model
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
        return torch.softmax(logits.float(), dim=-1).cpu()


def load_local_model(path: str, dtype: str = "auto", budget: Budget | None = None) -> LocalModel:
    """Load a model that is asked: a whole one, or an adapter of ours on its base.

    Args:
        path: Hub id or folder.
        dtype: Type of the weights: "auto" (as they are saved), "float32", "bfloat16" or "float16".
        budget: Counts calls and tokens.

    Returns:
        The model, on the accelerator of this process, or on the CPU.

    Raises:
        FileNotFoundError: If the folder, or that of the adapter's base, is not there.
        ValueError: If it is no language model.
    """
    from transformers import pipeline

    from rlhf_recipes.models import is_adapter, load_causal_lm, load_policy, load_tokenizer
    from rlhf_recipes.models.adapters import base_to_load

    model: Any
    if is_adapter(path):
        model = load_policy(load_causal_lm(base_to_load(path), dtype=dtype), path)
        held = Path(path, "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(path if held else base_to_load(path))
    else:
        model, tokenizer = load_causal_lm(path, dtype=dtype), load_tokenizer(path)
    make: Any = pipeline
    return LocalModel(make("text-generation", model=model.eval(), tokenizer=tokenizer), budget)


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        url: Base address, such as `http://localhost:8000/v1`; `/chat/completions` is added.
        model: Name of the model there.
        api_key: Sent as a bearer token, and nowhere written down.
        timeout: Seconds for one try, from connecting to the last byte.
        retries: Tries after the first where there is no connection, no answer in time, or a status 429 or 5xx.
        backoff: Seconds before the first of them; each wait is twice the one before, 30 at most.
        budget: Counts calls (each try is one) and tokens.
        transport: Transport of httpx, for tests and proxies.

    Raises:
        ModuleNotFoundError: Without the extra `judges`, which brings httpx.
        ValueError: If `url` is no such address, or holds a user, a password or a query. When asked: if what it answers
            is not what such an endpoint answers.
        httpx.HTTPError: When asked: if the endpoint does not answer, or with an error, after all retries.

    Example:
        >>> EndpointModel("file:///etc/passwd", "a-model")
        Traceback (most recent call last):
        ...
        ValueError: `url` must be an address that starts with http:// or https://, without user, password and query ...
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        backoff: float = 0.5,
        budget: Budget | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        with from_extra("judges", needed_by="A judge at an endpoint"):
            import httpx

        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host or address.userinfo or address.query:
            raise ValueError(
                "`url` must be an address that starts with http:// or https://, without user, password and query (a "
                f"key is `api_key`), got {address.copy_with(userinfo=b'', query=None)!s}."
            )
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise ValueError(
                "`timeout` must be above 0, `retries` and `backoff` at least 0, got "
                f"{timeout}, {retries} and {backoff}."
            )
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(timeout=timeout, headers=headers, transport=transport)
        self._url, self._model, self._key = f"{url.rstrip('/')}/chat/completions", model, api_key
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._budget = budget or Budget()

    def write(self, messages: Sequence[Message], max_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
        """Answer; see `LanguageModel`."""
        sampling = {"temperature": temperature} | ({"seed": seed} if temperature > 0 else {})
        choice = self._ask(messages, {"max_tokens": max_tokens} | sampling)
        content = value_at(choice, "message", "content")
        if not isinstance(content, str):
            raise self._unusable("`choices[0].message.content` is no text", choice)
        return content

    def weigh(self, messages: Sequence[Message], options: Sequence[str]) -> dict[str, float]:
        """Return the probabilities of the options; see `LanguageModel`.

        They are those of the first token of the answer, of which the endpoint names the 20 likeliest; an option that
        is not among them counts as 0. Where a longer option (10) is not among them, but the shorter one (1) that it
        begins with is, the two cannot be told apart, which is an error.
        """
        # At temperature 0 some servers would call the likeliest token certain.
        asked = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": _TOP}
        choice = self._ask(messages, asked)
        tokens = value_at(choice, "logprobs", "content", 0, "top_logprobs")
        if not isinstance(tokens, list) or not tokens:
            raise self._unusable("it has no `top_logprobs`; ask for whole answers, without probabilities", choice)
        weights = dict.fromkeys(options, 0.0)
        for token in tokens:
            text, logprob = value_at(token, "token"), value_at(token, "logprob")
            if not isinstance(text, str) or not (is_number(logprob) or logprob == -math.inf) or logprob > 1e-3:
                raise self._unusable("`top_logprobs` holds what is no token with its log-probability", token)
            if text.strip(" \t\r\n▁Ġ") in weights:
                weights[text.strip(" \t\r\n▁Ġ")] += math.exp(min(logprob, 0.0))
        for longer in options:
            for shorter in options:
                if longer != shorter and longer.startswith(shorter) and weights[shorter] and not weights[longer]:
                    raise self._unusable(f"{shorter!r} may begin {longer!r}; ask for answers of one token", choice)
        return _checked(weights)

    def _ask(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Any:
        """Return the first choice of the answer."""
        cleaned = [message | {"content": without_control_tokens(message["content"])} for message in messages]
        body = {"model": self._model, "messages": cleaned, **options}
        start = time.perf_counter()
        content = self._post(body)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise self._unusable("it is no JSON", content.decode("utf-8", errors="replace")) from None
        self._count(answer, body, time.perf_counter() - start)
        choice = value_at(answer, "choices", 0)
        if choice is None:
            raise self._unusable("it has no `choices`", answer)
        return choice

    def _count(self, answer: Any, body: Mapping[str, Any], seconds: float) -> None:
        counts = [value_at(answer, "usage", name) for name in ("prompt_tokens", "completion_tokens")]
        said = [count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count >= 0]
        if len(said) == 2:
            self._budget.add(said[0], said[1], seconds)
            return
        texts = body["messages"], value_at(answer, "choices", 0, "message", "content") or ""
        sizes = [len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) for text in texts]
        read, written = (math.ceil(size / _BYTES_PER_TOKEN) for size in sizes)
        self._budget.add(read, written, seconds, estimated=True)

    def _post(self, body: Mapping[str, Any]) -> bytes:
        import httpx

        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(self._backoff * 2 ** (attempt - 1), _LONGEST_WAIT))
            self._budget.begin()
            try:
                return self._send(body)
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if attempt == self._retries or (status < 500 and status != 429):
                    raise
            except httpx.TransportError:  # timeouts are such
                if attempt == self._retries:
                    raise
        raise AssertionError("unreachable")

    def _send(self, body: Mapping[str, Any]) -> bytes:
        import httpx

        end = time.monotonic() + self._timeout
        content = bytearray()
        with self._client.stream("POST", self._url, json=body) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > _LARGEST_ANSWER:
                    raise self._unusable(f"it is longer than {_LARGEST_ANSWER} bytes", "")
                if time.monotonic() > end:  # httpx's own limits one read, not the whole
                    raise httpx.ReadTimeout(f"no whole answer in {self._timeout:g} seconds", request=response.request)
        if not response.is_success:
            said = self._shown(content.decode(errors="replace"))
            raise httpx.HTTPStatusError(
                f"{self._url} answered with the status {response.status_code}: {said}",
                request=response.request,
                response=response,
            )
        return bytes(content)

    def _shown(self, text: str) -> str:
        if self._key:  # a server may repeat what it was sent
            text = text.replace(self._key, "***")
        return repr(text[:200])

    def _unusable(self, fault: str, answer: Any) -> ValueError:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return ValueError(f"{self._url} answered no chat completion: {fault}: {self._shown(text)}")


def _checked(weights: dict[str, float]) -> dict[str, float]:
    if not all(map(is_number, weights.values())) or sum(weights.values()) > 1.01:
        raise ValueError(f"these are no probabilities of different answers: {weights}")
    return weights
