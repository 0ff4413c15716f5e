"""Texts of unlike length in one pass without padding: linear layers see all tokens in a row, only attention pads.

`N` tokens in all.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_recipes.models.image_embeddings import attends_within_pictures
from rlhf_recipes.models.rows import Rows, SequenceGroup

PACKED = "packed_sdpa"  # the attention implementation below, by its name in transformers
_TOLERANCE, _TOLERANCE_IN_16_BITS = 1e-3, 0.05  # of the norm of the states


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_groups: list[SequenceGroup] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of transformers' `sdpa`, which looks at each text alone in a pass that has `sequence_groups`.

    Padding lies behind the tokens of a text, where causal attention does not look, so that it needs no mask. A CPU
    computes it in float32, twice as fast as torch's kernel for 16 bits; not a single token's after a cache.
    """
    if query.device.type == "cpu" and query.element_size() == 2 and query.size(2) > 1:
        states = (query.float(), key.float(), value.float())
        with torch.autocast("cpu", enabled=False):
            return packed_sdpa(module, *states, attention_mask, sequence_groups, **kwargs)[0].to(query.dtype), None
    if sequence_groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    counts = [len(group.places) for group in sequence_groups]
    parts = zip(*(tensor.split(counts, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for group, (queries, keys, values) in zip(sequence_groups, parts, strict=True):
        padded = (group.pad(queries), group.pad(keys), group.pad(values))
        output, _ = sdpa_attention_forward(module, *padded, None, **kwargs)
        outputs.append(group.unpad(output))
    return torch.cat(outputs, dim=1), None


def packed_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask of transformers' `sdpa`, but none for a pass without padding.

    There, positions that start again would make it one of `(N, N)`, which `packed_sdpa` does not need.
    """
    if attention_mask is None and q_length == kv_length:
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )
    return mask


AttentionInterface.register(PACKED, packed_sdpa)
AttentionMaskInterface.register(PACKED, packed_mask)


def is_packed(model: Any) -> bool:
    """Return whether a model reads texts packed one after another."""
    packed: bool = model.config.get_text_config()._attn_implementation == PACKED
    return packed


@torch.no_grad()
def pack(model: Any) -> None:
    """Let a causal model read texts one after another, if it gives the same states then; else leave it as it is.

    It must be set to transformers' `sdpa`, and each of its layers must attend to the whole text before a token, and to
    nothing behind it. What its layers make of texts one after another is tried out on two short ones.
    """
    config, trunk = model.config.get_text_config(), model.base_model
    kinds = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None) or "full_attention"]
    takes_groups = any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(trunk.forward).parameters.values()
    )
    two_ways = attends_within_pictures(model)
    if config._attn_implementation != "sdpa" or set(kinds) != {"full_attention"} or not takes_groups or two_ways:
        return
    model.set_attn_implementation(PACKED)
    if not is_packed(model) or not _same_states(trunk, config.vocab_size):
        model.set_attn_implementation("sdpa")


def _same_states(trunk: Any, vocabulary: int) -> bool:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=trunk.device)
    ids = torch.arange(mask.numel(), device=trunk.device).view_as(mask) % vocabulary
    training, states = trunk.training, []
    trunk.eval()
    for packed in (False, True):
        rows = Rows(mask, packed)
        states.append(rows.split(trunk(input_ids=rows.join(ids), use_cache=False, **rows.arguments).last_hidden_state))
    trunk.train(training)
    difference, size = (states[1] - states[0]).norm(), states[0].norm()
    return bool(difference <= (_TOLERANCE if size.dtype == torch.float32 else _TOLERANCE_IN_16_BITS) * size)
