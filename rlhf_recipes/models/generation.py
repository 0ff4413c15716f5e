"""Sampling without padding: prompts are read one after another, and rows that have ended leave the batch.

`B` rows, `P` prompt tokens (padded on the left), `T` completion tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rlhf_recipes.models.rows import Rows

_ENDED = 0.25  # share of the rows that have ended at which they leave: copying the others' keys and values costs too


class EnoughEnded(StoppingCriteria):
    """Interrupt transformers' loop as soon as a quarter of the rows have ended.

    Args:
        ends: Ids of end tokens.
        start: Columns before the first token that may end a row.
    """

    def __init__(self, ends: Tensor, start: int) -> None:
        self.ends, self.start = ends, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say for all rows alike, shape `(B,)`, whether to stop."""
        share = _ended(input_ids[:, self.start :], self.ends).float().mean()
        return (share >= _ENDED).expand(len(input_ids))


def _ended(completion_ids: Tensor, ends: Tensor) -> Tensor:
    return torch.isin(completion_ids, ends).any(dim=1)


@torch.no_grad()
def sample(
    model: Any, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig, ends: list[int]
) -> Tensor:
    """Generate as `model.generate` does, but spend no time on padding and on rows that have ended.

    Args:
        model: A causal model that reads texts one after another (`rlhf_recipes.models.packing`).
        input_ids: Prompts, shape `(B, P)`.
        attention_mask: 1 where they have a token, shape `(B, P)`.
        generation_config: With `max_new_tokens` and a padding token. Settings that count tokens from the start, such
            as `min_new_tokens`, would count from where the batch last got smaller.
        ends: Ids of tokens that end a row.

    Returns:
        Prompts and completions, shape `(B, P + T)`, with padding behind the end.
    """
    start, config = input_ids.size(1), copy.deepcopy(generation_config)
    assert config.max_new_tokens is not None  # the trainer's configuration sets it
    length, cache = start + config.max_new_tokens, read_prompts(model, input_ids, attention_mask)
    found = input_ids.new_full((len(input_ids), length), config.pad_token_id)
    end_ids, rows = input_ids.new_tensor(ends), torch.arange(len(input_ids), device=input_ids.device)
    while len(rows) and input_ids.size(1) < length:
        config.max_new_tokens = length - input_ids.size(1)
        input_ids = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([EnoughEnded(end_ids, start)]),
        )
        found[rows, : input_ids.size(1)] = input_ids
        going = (~_ended(input_ids[:, start:], end_ids)).nonzero().squeeze(1)
        more = attention_mask.new_ones(len(input_ids), input_ids.size(1) - attention_mask.size(1))
        attention_mask = torch.cat([attention_mask, more], dim=1)[going]
        cache.batch_select_indices(going)
        input_ids, rows = input_ids[going], rows[going]
    return found[:, : input_ids.size(1)]


def read_prompts(model: Any, input_ids: Tensor, attention_mask: Tensor) -> DynamicCache:
    """Keys and values of all but the last token of prompts `(B, P)`, with zeros on padding, for `model.generate`."""
    cache = DynamicCache(config=model.config)
    if input_ids.size(1) > 1 and not attention_mask.all():
        rows = Rows(attention_mask[:, :-1], packed=True)
        ids = rows.join(input_ids[:, :-1])
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True, **rows.arguments)
        layer: Any
        for layer in cache.layers:
            layer.keys, layer.values = (
                rows.split(states.transpose(1, 2)).transpose(1, 2) for states in (layer.keys, layer.values)
            )
    return cache
