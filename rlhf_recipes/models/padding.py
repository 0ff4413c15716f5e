"""Let a causal model go on from two short prompts: does it sample from the distributions that it computes of texts?

`T` tokens of two texts, `V` vocabulary. Distances are in nats per token.
"""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from rlhf_recipes.data.context import context_length
from rlhf_recipes.models.generation import inheriting_nothing
from rlhf_recipes.models.rows import Texts

_LENGTHS, _TOKENS = (4, 9), 3  # of the prompts, of which the first one is padded; taken after each
TOLERANCE, TOLERANCE_IN_16_BITS = 2e-4, 0.1


def prompts_of_unlike_length(model: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids of two prompts of unlike length, padded on the left, and their mask, each `(2, P)`."""
    longest = (context_length(model) or sys.maxsize) - _TOKENS
    lengths = [max(min(length, longest), 1) for length in _LENGTHS]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = list(islice((token for token in range(len(tokenizer)) if token not in special), 2 * max(lengths)))
    columns = torch.arange(max(lengths), device=model.device)
    mask = (columns >= max(lengths) - columns.new_tensor(lengths)[:, None]).long()
    places = torch.arange(mask.numel(), device=mask.device).view_as(mask) % len(words)
    return mask.new_tensor(words)[places].where(mask.bool(), tokenizer.pad_token_id), mask


@torch.no_grad()
def likeliest(
    model: Any, ids: Tensor, mask: Tensor, pad_token_id: int, cache_implementation: str | None = None
) -> tuple[Texts, Tensor]:
    """Go on with the likeliest tokens, and give the texts and the logits `(B, T, V)` that these were taken from."""
    config = GenerationConfig(
        max_new_tokens=_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_token_id,
        cache_implementation=cache_implementation,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with inheriting_nothing(model):
        outputs = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    completion_ids = outputs.sequences[:, ids.size(1) :]
    texts = Texts(
        prompt_ids=ids,
        prompt_mask=mask,
        completion_ids=completion_ids,
        completion_mask=torch.ones_like(completion_ids),
    )
    return texts, torch.stack(outputs.logits, dim=1).float()


def read_texts(model: Any, texts: Texts, **more: Any) -> Any:
    """What a model makes of whole texts, padded on the right."""
    rows = texts.rows(packed=False)
    return model(input_ids=rows.join(texts.ids), **rows.arguments, use_cache=False, **more)


def logits_of(model: Any, texts: Texts) -> Tensor:
    """A model's logits `(B, T, V)` of the completions' tokens, of whole texts."""
    logits = read_texts(model, texts).logits[:, -int(texts.lengths.max()) :]  # prompt learning puts tokens in front
    return texts.rows(packed=False).gather(logits, texts.positions_before).float()


def distance(logits: Tensor, others: Tensor) -> float:
    """Mean of `|log p - log q|` under `p`."""
    logps, others = logits.float().log_softmax(dim=-1), others.log_softmax(dim=-1)
    return (logps.exp() * (logps - others).abs()).sum(dim=-1).mean().item()


@torch.no_grad()
def keeps_padding_out(model: Any, tokenizer: Any, half_precision: bool) -> bool:
    """Tell whether a model draws from the distributions that it computes of whole texts, after padded prompts too.

    Args:
        model: A causal model in evaluation mode, with or without adapters.
        tokenizer: Its tokenizer.
        half_precision: Whether it computes in 16 bits, where rounding is larger.
    """
    ids, mask = prompts_of_unlike_length(model, tokenizer)
    texts, sampled = likeliest(model, ids, mask, tokenizer.pad_token_id)
    tolerance = TOLERANCE_IN_16_BITS if half_precision or getattr(model, "is_quantized", False) else TOLERANCE
    return distance(sampled, logits_of(model, texts)) <= tolerance
