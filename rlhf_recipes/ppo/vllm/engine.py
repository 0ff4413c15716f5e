"""What a vLLM engine is asked for, the same of a server and of one in this process, and what it must answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_recipes.statistics.numbers import is_number

LARGEST_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM allows


class SamplingStopped(RuntimeError):
    """No more completions can be had, or none of this policy. What was trained so far is not affected."""


@dataclass(frozen=True)
class Adapter:
    """One version of the policy's adapter.

    Attributes:
        name: Its name at the engine. It depends on the weights, so that no two versions share one: the engine keeps
            adapters, and the keys and values of prompts, by name and folder.
        folder: Where it is saved, a folder of its own.
    """

    name: str
    folder: Path


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn: from the policy itself, as `models/generation.py` does it.

    Attributes:
        temperature: Divides the logits.
        max_tokens: Length at which a completion is cut off.
        ends: Ids of tokens that end a completion.
    """

    temperature: float
    max_tokens: int
    ends: tuple[int, ...]

    def parameters(self, seed: int) -> dict[str, Any]:
        """Fields of vLLM's `SamplingParams` and of its completions endpoint; nothing is left to a server's defaults.

        Example:
            >>> parameters = Drawing(temperature=0.7, max_tokens=8, ends=(1,)).parameters(seed=3)
            >>> parameters["top_p"], parameters["stop_token_ids"], parameters["ignore_eos"]
            (1.0, [1], True)
        """
        return {
            **{"n": 1, "seed": seed, "temperature": self.temperature, "max_tokens": self.max_tokens, "min_tokens": 0},
            **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
            **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            "ignore_eos": True,  # of what the engine takes for end tokens: `ends` are those of the trainer
            "stop_token_ids": list(self.ends),
            "skip_special_tokens": False,
            "logprobs": 0,  # of the sampled token alone
        }


@dataclass(frozen=True)
class Completion:
    """A completion as an engine gives it.

    Attributes:
        ids: Token ids, with the end token where it was sampled.
        logps: Their log-probabilities at the temperature, in nats.
    """

    ids: list[int]
    logps: list[float]


class Engine(Protocol):
    """vLLM, with the policy's base loaded."""

    context: int | None  # tokens of the longest text, where the engine says it
    loads: int  # how often an adapter was loaded: more often than asked for after a restart

    def load(self, adapter: Adapter) -> None:
        """Load an adapter; one that is there stays."""

    def unload(self, adapter: Adapter) -> None:
        """Forget an adapter, if it is there."""

    def sample(
        self, adapter: Adapter, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawing: Drawing
    ) -> list[Completion]:
        """Sample one completion after each prompt, each with a seed of its own."""

    def score(self, adapter: Adapter, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of the tokens of a text but the first, at temperature 1, in nats."""


def checked_completion(ids: Any, logps: Any, drawing: Drawing) -> Completion:
    """Check that an answer is a completion that the trainer itself could have drawn.

    Args:
        ids: Token ids.
        logps: Their log-probabilities.
        drawing: How it was to be drawn.

    Raises:
        SamplingStopped: If it is none.

    Example:
        >>> checked_completion([5, 1], [-0.5, -2.0], Drawing(temperature=1.0, max_tokens=8, ends=(1,)))
        Completion(ids=[5, 1], logps=[-0.5, -2.0])
        >>> checked_completion([5, 7], [-0.5, -2.0], Drawing(temperature=1.0, max_tokens=8, ends=(1,)))
        Traceback (most recent call last):
        ...
        rlhf_recipes.ppo.vllm.engine.SamplingStopped: vLLM cut a completion off after 2 tokens, where 8 were allowed...
    """
    if not (isinstance(ids, list) and ids and all(isinstance(each, int) and each >= 0 for each in ids)):
        raise SamplingStopped(f"vLLM gave a completion without token ids: {str(ids)[:80]!r}.")
    check_log_probs(logps, len(ids))
    ended = [place for place, token in enumerate(ids) if token in drawing.ends]
    if len(ids) > drawing.max_tokens or (ended and ended[0] != len(ids) - 1):
        raise SamplingStopped(
            f"vLLM went on after the end of a completion: it gave {len(ids)} tokens, with end tokens at {ended}, and "
            f"{drawing.max_tokens} were allowed."
        )
    if not ended and len(ids) < drawing.max_tokens:
        raise SamplingStopped(
            f"vLLM cut a completion off after {len(ids)} tokens, where {drawing.max_tokens} were allowed "
            "(`max_completion_length`). Its context is too short (`--max-model-len`), or the base's "
            "generation_config.json limits new tokens: start it with `--generation-config vllm`."
        )
    return Completion(ids, [float(value) for value in logps])


def check_log_probs(values: Any, expected: int) -> None:
    """Check that an engine gave so many log-probabilities.

    Raises:
        SamplingStopped: If it did not.
    """
    if not isinstance(values, list) or len(values) != expected or not all(map(_is_log_prob, values)):
        raise SamplingStopped(f"vLLM gave {str(values)[:80]!r} where {expected} log-probabilities were expected.")


def _is_log_prob(value: Any) -> bool:
    return is_number(value) and value <= 1e-3


def largest_rank(rank: int) -> int:
    """The least `max_lora_rank` of vLLM with which an adapter can be loaded.

    Example:
        >>> largest_rank(12)
        16
    """
    return next(each for each in LARGEST_RANKS if each >= rank)


def launch_command(base: str, rank: int, dtype: str) -> str:
    """The command that starts a server for a run.

    Example:
        >>> print(launch_command("outputs/model", rank=8, dtype="float32"))
        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve outputs/model --enable-lora --max-lora-rank 8 --dtype float32
        --logprobs-mode processed_logprobs --generation-config vllm
    """
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {base} --enable-lora --max-lora-rank {largest_rank(rank)} "
        f"--dtype {dtype} --logprobs-mode processed_logprobs --generation-config vllm"
    )
