"""Fields of a PPO configuration about vLLM, beside TRL's, and which of them have an effect."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args
from urllib.parse import urlsplit

from rlhf_recipes.ppo.functional.losses import Correction

_CORRECTION = ("correction", "mode", "clip_max", "clip_min")
_OF_BOTH = {"vllm_mode", "vllm_tolerance", *(f"vllm_importance_sampling_{name}" for name in _CORRECTION)}
# Fields of one mode, each with what to do in the other one.
_OF_A_SERVER = {
    "vllm_server_base_url": "there is no server. Set `vllm_mode: server`, or remove it",
    "vllm_server_timeout": "there is no server to wait for. Set `vllm_mode: server`, or remove it",
}
_OF_COLOCATE = {
    "vllm_gpu_memory_utilization": "start the server with `--gpu-memory-utilization`, and remove it",
    "vllm_max_model_length": "start the server with `--max-model-len`, and remove it",
    "vllm_model_impl": "start the server with `--model-impl`, and remove it",
}

_WORDS = {  # of fields that TRL types as text
    "vllm_mode": ("server", "colocate"),
    "vllm_model_impl": ("vllm", "transformers"),
    "vllm_importance_sampling_mode": get_args(Correction),
}


@dataclass
class VLLMSettings:
    """What `PPOConfig` has about vLLM beside TRL's fields, and where their defaults differ."""

    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "How completions are weighted by `p_policy / p_vLLM`, of each token or of the whole completion: "
            "beyond the bounds the weight is the bound (`truncate`), or 0 (`mask`)."
        },
    )
    vllm_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "How far vLLM's log-probabilities of a text may be from the trainer's after its adapter was sent, "
            "in nats per token. null: 1e-4 in float32, 0.05 in 16 or 4 bits."
        },
    )


def check_vllm(config: Any) -> None:
    """Refuse fields about vLLM that have no effect, contradict each other, or ask for what vLLM would do otherwise.

    Args:
        config: A PPO configuration.

    Raises:
        ValueError: With the field's name and the fix.
    """
    changed = [
        each.name
        for each in fields(config)
        if each.name.startswith("vllm_") and getattr(config, each.name) != each.default
    ]
    if not config.use_vllm:
        for name in changed:
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but `use_vllm` is false. Set `use_vllm: true`, or remove it."
            )
        return
    for name, words in _WORDS.items():
        if getattr(config, name) not in words:
            raise ValueError(f"`{name}` must be one of {', '.join(words)}, got {getattr(config, name)!r}.")
    others = _OF_COLOCATE if config.vllm_mode == "server" else _OF_A_SERVER
    for name in changed:
        if name in others:
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but `vllm_mode` is {config.vllm_mode!r}: {others[name]}."
            )
        assert name in _OF_BOTH | _OF_A_SERVER.keys() | _OF_COLOCATE.keys(), name  # the others are refused before
    if config.vllm_mode == "server":
        _check_address(config.vllm_server_base_url)
    _check_numbers(config)
    for name in ("generation_kwargs", "cache_implementation"):
        if getattr(config, name):
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but it is about generation by transformers, and `use_vllm` "
                "is true. Remove one of the two."
            )


def _check_address(url: str | None) -> None:
    parts = urlsplit(url or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"`vllm_server_base_url` must be the address of the server, such as 'http://127.0.0.1:8000', got {url!r}: "
            "`vllm_mode` is 'server'."
        )


def _check_numbers(config: Any) -> None:
    positive = ("vllm_tolerance", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min")
    for name in (*positive, "vllm_server_timeout", "vllm_max_model_length"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if not 0 < config.vllm_gpu_memory_utilization <= 1:
        raise ValueError(
            f"`vllm_gpu_memory_utilization` must lie in (0, 1], got {config.vllm_gpu_memory_utilization}."
        )
