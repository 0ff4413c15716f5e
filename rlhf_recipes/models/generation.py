"""Sampling from the model itself, at a temperature and without padding.

Prompts are read one after another, and rows that have ended leave the batch. Nothing but the temperature stands
between the model's logits and the tokens that are drawn, whatever a configuration says.

`B` rows, `P` prompt tokens (padded on the left), `T` completion tokens.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from tqdm import trange
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from rlhf_recipes.models.arguments import CACHE
from rlhf_recipes.models.image_embeddings import EmbeddedPrompt, pad_prompts
from rlhf_recipes.models.rows import Rows, pad_rows
from rlhf_recipes.models.sharding import is_sharded

logger = logging.getLogger(__name__)

_LONGEST_LINE = 200  # characters of settings, of which one may list thousands of tokens
_ROOM = 32  # tokens for which there is room, until all keys and values are copied
_ENDED = 0.25  # share of the rows that have ended at which they leave: copying the others' keys and values costs too

# Settings of a generation configuration that have no part in what is drawn: tokens by name, lengths, memory, outputs.
_WITHOUT_EFFECT = frozenset(
    "bos_token_id cache_config cache_implementation compile_config decoder_start_token_id disable_compile do_sample "
    "early_stopping eos_token_id length_penalty low_memory max_cache_len max_length max_new_tokens output_attentions "
    "output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size remove_invalid_values "
    "renormalize_logits return_dict_in_generate transformers_version use_cache".split()
)
# Values at which a setting leaves the model's distribution as it is
NEUTRAL: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "do_sample": True,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
}


def ignored_settings(model: Any) -> dict[str, Any]:
    """Return settings of a model's own `generation_config` by which `generate` would not draw from the model itself.

    Here they have no effect (`sample_with_transformers`); whoever is used to the model's texts should know.

    Args:
        model: The model, with or without adapters.

    Returns:
        The settings that are not neutral, by name.

    Example:
        >>> from types import SimpleNamespace
        >>> config = GenerationConfig(eos_token_id=1, do_sample=True, top_p=1.0, min_p=0.25, suppress_tokens=[7])
        >>> ignored_settings(SimpleNamespace(generation_config=config))
        {'min_p': 0.25, 'suppress_tokens': [7]}
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = base.generation_config.to_diff_dict()
    return {
        name: value
        for name, value in sorted(settings.items())
        if name not in _WITHOUT_EFFECT and not name.startswith("_") and value is not None
        if name not in NEUTRAL or value != NEUTRAL[name]
    }


def warn_of_ignored_settings(model: Any) -> None:
    """Warn in one line of the settings of a model's own `generation_config` that have no effect on sampling here."""
    if (ignored := ignored_settings(model)) and PartialState().is_main_process:
        shown = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
        logger.warning(
            "Completions are sampled from the policy itself, at the trainer's temperature: %s of the model's "
            "generation_config.json has no effect.",
            shown if len(shown) <= _LONGEST_LINE else f"{shown[:_LONGEST_LINE]} ...",
        )


@torch.no_grad()
def sample_with_transformers(
    model: Any, generation_config: GenerationConfig, temperature: float, **inputs: Any
) -> Tensor:
    """Call `model.generate` so that every token is drawn from the model itself at a temperature.

    Nothing is inherited from the model's own `generation_config`, and the logits processors that transformers builds
    for the call may hold nothing but the temperature.

    Args:
        model: A causal model, with or without adapters.
        generation_config: With `do_sample`, `max_new_tokens` and the ids of padding and end tokens.
        temperature: At which log-probabilities are computed.
        inputs: `input_ids` and `attention_mask`, each `(B, P)`, and what else `generate` takes.

    Returns:
        Prompts and completions, shape `(B, P + T)`.

    Raises:
        RuntimeError: If anything else would shape what is drawn.
    """
    calls: list[Any] = []
    # Of a sharded model, whose weights are gathered: FSDP's method around `generate` would let go of them
    generate = partial(type(model).generate, model) if is_sharded(model) else model.generate
    with inheriting_nothing(model):
        sequences: Tensor = generate(
            **inputs,
            generation_config=generation_config,
            custom_generate=partial(_sample_checked, temperature, calls),
            synced_gpus=False if is_sharded(model) else None,
        )
    if not calls:
        raise RuntimeError(
            f"{type(model).__name__} generates in a way of its own, and what it draws from cannot be seen. Use a "
            "model that generates with transformers' sampling loop."
        )
    return sequences


@contextmanager
def inheriting_nothing(model: Any) -> Iterator[None]:
    """Let a model generate without the settings of its own `generation_config`, which comes back after the block."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _sample_checked(
    temperature: float,
    calls: list[Any],
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Any:
    """The sampling loop of transformers, after a check of its logits processors; `calls` records that it ran."""
    calls.append(generation_config)
    strange = [
        type(processor).__name__
        for processor in logits_processor
        if not isinstance(processor, TemperatureLogitsWarper)
    ]
    if strange:
        raise RuntimeError(
            f"Completions must be sampled from the policy itself, but {strange} would change what is drawn. Only "
            "`temperature` may: remove the setting of the generation configuration that asks for it."
        )
    temperatures = [processor.temperature for processor in logits_processor] or [1.0]
    if not generation_config.do_sample or generation_config.num_beams != 1 or temperatures != [temperature]:
        raise RuntimeError(
            f"Completions must be sampled at the temperature {temperature} of their log-probabilities, but the "
            f"generation configuration has do_sample={generation_config.do_sample}, num_beams="
            f"{generation_config.num_beams} and temperature={generation_config.temperature}. Set the trainer's "
            "`temperature` alone."
        )
    return model._sample(input_ids, logits_processor=logits_processor, generation_config=generation_config, **kwargs)


class EnoughEnded(StoppingCriteria):
    """Interrupt transformers' loop as soon as a quarter of the rows have ended.

    Args:
        ends: Ids of end tokens.
        start: Columns before the first token that may end a row.
    """

    def __init__(self, ends: Tensor, start: int) -> None:
        self.ends, self.start = ends, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for all rows alike, shape `(B,)`, whether to stop."""
        share = _ended(input_ids[:, self.start :], self.ends).float().mean()
        return (share >= _ENDED).expand(len(input_ids))


def _ended(completion_ids: Tensor, ends: Tensor) -> Tensor:
    return torch.isin(completion_ids, ends).any(dim=1)


def sample_after(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    temperature: float,
    ends: Sequence[int],
    packed: bool = False,
    embedded: Sequence[EmbeddedPrompt] | None = None,
) -> list[list[int]]:
    """Sample one completion after each prompt.

    Args:
        model: A causal model, with or without adapters.
        prompt_ids: Token ids of the prompts.
        generation_config: With `do_sample`, `max_new_tokens` and a padding token.
        temperature: At which log-probabilities are computed.
        ends: Ids of tokens that end a completion.
        packed: Whether to spend no time on padding, with a model that reads texts one after another.
        embedded: The prompts as embeddings, to be read in place of their ids.

    Returns:
        Token ids of the completions, with the end token where it was sampled.
    """
    ids, mask = pad_rows(prompt_ids, generation_config.pad_token_id, model.device, side="left")
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if embedded is not None:
        more = read_embedded(inner, pad_prompts(embedded), mask)
        sequences = sample_with_transformers(
            model, generation_config, temperature, input_ids=ids, attention_mask=mask, **more
        )
    elif packed:
        sequences = sample(inner, ids, mask, generation_config, temperature, ends)
    else:
        sequences = sample_with_transformers(model, generation_config, temperature, input_ids=ids, attention_mask=mask)
    rows = sequences[:, ids.size(1) :].tolist()
    first_ends = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, first_ends, strict=True)]


def sample_after_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Sample one completion after each prompt, where there is no trainer: for rows that people or judges compare.

    Args:
        model: A causal model, with or without adapters.
        tokenizer: Its tokenizer, with a padding and an end token.
        prompts: Texts.
        max_new_tokens: Length at which completions are cut off.
        batch_size: Completions that are sampled at a time, with a progress bar on a terminal; `None`: all.

    Returns:
        Token ids of the completions, with the end token where it was sampled.
    """
    ends = [tokenizer.eos_token_id]
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    size, completions = batch_size or max(len(prompts), 1), list[list[int]]()
    for start in trange(0, len(prompts), size, desc="sampling", disable=True if batch_size is None else None):
        prompt_ids = tokenizer(list(prompts[start : start + size]))["input_ids"]
        completions += sample_after(model, prompt_ids, config, temperature=1.0, ends=ends)
    return completions


@torch.no_grad()
def sample(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: GenerationConfig,
    temperature: float,
    ends: Sequence[int],
) -> Tensor:
    """Sample as `sample_with_transformers` does, but spend no time on padding and on rows that have ended.

    Args:
        model: A causal model that reads texts one after another (`rlhf_recipes.models.packing`).
        input_ids: Prompts, shape `(B, P)`.
        attention_mask: 1 where they have a token, shape `(B, P)`.
        generation_config: With `do_sample`, `max_new_tokens` and a padding token.
        temperature: At which log-probabilities are computed.
        ends: Ids of tokens that end a row.

    Returns:
        Prompts and completions, shape `(B, P + T)`, with padding behind the end.
    """
    start, config = input_ids.size(1), copy.deepcopy(generation_config)
    assert config.max_new_tokens is not None  # the trainer's configuration sets it
    length, cache = start + config.max_new_tokens, read_prompts(model, input_ids, attention_mask)
    sequences = input_ids.new_full((len(input_ids), length), config.pad_token_id)
    end_ids, rows = input_ids.new_tensor(ends), torch.arange(len(input_ids), device=input_ids.device)
    while len(rows) and input_ids.size(1) < length:
        config.max_new_tokens = length - input_ids.size(1)
        input_ids = sample_with_transformers(
            model,
            config,
            temperature,
            input_ids=input_ids,
            attention_mask=attention_mask,
            stopping_criteria=StoppingCriteriaList([EnoughEnded(end_ids, start)]),
            **{CACHE: cache},
        )
        sequences[rows, : input_ids.size(1)] = input_ids
        unfinished = (~_ended(input_ids[:, start:], end_ids)).nonzero().squeeze(1)
        more = attention_mask.new_ones(len(input_ids), input_ids.size(1) - attention_mask.size(1))
        attention_mask = torch.cat([attention_mask, more], dim=1)[unfinished]
        cache.batch_select_indices(unfinished)
        input_ids, rows = input_ids[unfinished], rows[unfinished]
    return sequences[:, : input_ids.size(1)]


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer with room for further tokens, where transformers' copies them all for each token."""

    _keys: Tensor | None = None
    _values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `(B, heads, t, D)` of `t` tokens, and return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys, self.keys = _append(self._keys, self.keys, key_states)
        self._values, self.values = _append(self._values, self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows, in tensors of their own."""
        self._keys = self._values = None
        super().batch_select_indices(indices)


def _append(room: Tensor | None, states: Any, more: Tensor) -> tuple[Tensor, Tensor]:
    """Put `more` `(B, heads, t, D)` behind `states`, which may lie in a tensor with room; that one, and both."""
    length = states.size(-2) if states.dim() == more.dim() else 0  # an empty one has no dimensions yet
    total = length + more.size(-2)
    if room is None or room.data_ptr() != states.data_ptr() or room.size(-2) < total:
        room = more.new_empty(*more.shape[:-2], total + _ROOM, more.size(-1))
        room[..., :length, :] = states if length else 0
    room[..., length:total, :] = more
    return room, room[..., :total, :]


def empty_cache(model: Any) -> DynamicCache:
    """Make a cache for `model.generate` whose layers of full attention have room."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def read_prompts(model: Any, input_ids: Tensor, attention_mask: Tensor) -> DynamicCache:
    """Cache keys and values of all but the last token of prompts `(B, P)`, zeros on padding, for `model.generate`."""
    cache = empty_cache(model)
    if input_ids.size(1) > 1 and not attention_mask.all():
        rows = Rows(attention_mask[:, :-1], packed=True)
        ids = rows.join(input_ids[:, :-1])
        model.base_model(input_ids=ids, use_cache=True, **{CACHE: cache}, **rows.arguments)
        layer: Any
        for layer in cache.layers:
            layer.keys, layer.values = (
                rows.split(states.transpose(1, 2)).transpose(1, 2) for states in (layer.keys, layer.values)
            )
    return cache


@torch.no_grad()
def read_embedded(model: Any, prompts: dict[str, Tensor], attention_mask: Tensor) -> dict[str, Any]:
    """Let a model read prompts as embeddings, so that `model.generate` goes on from their keys and values.

    Not every family's `generate` takes embeddings itself. The last token of a prompt, which is none of a picture's, is
    left for it.

    Args:
        model: The model without PEFT's wrapper.
        prompts: What `pad_prompts` gives.
        attention_mask: 1 where prompts have a token, shape `(B, P)`.

    Returns:
        Arguments of `model.generate`: the cache, and positions where the model has its own.
    """
    counted = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    positions = prompts["prompt_positions"].movedim(-1, 0) if "prompt_positions" in prompts else counted
    types = {"token_type_ids": prompts["prompt_types"][:, :-1]} if "prompt_types" in prompts else {}
    cache = empty_cache(model)
    model.base_model(
        inputs_embeds=prompts["prompt_embeds"][:, :-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=positions[..., :-1],
        use_cache=True,
        **types,
        **{CACHE: cache},
    )
    return {CACHE: cache, "position_ids": positions}
