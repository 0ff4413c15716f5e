"""Prompts with pictures as rows of embeddings. Apart from `images.py`, whose reading of rows is slow to import.

`B` prompts, `P` prompt tokens, `H` hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

_TYPES = "token_type_ids"
Pixels = dict[str, Tensor]  # of the pictures of a prompt, and what a model asks for besides, such as their sizes


@dataclass(frozen=True)
class EmbeddedPrompt:
    """A prompt as a network reads it.

    Attributes:
        embeds: Embeddings of its tokens, shape `(P, H)`.
        positions: Where the model tells apart time, height and width: the position of each token on each of the
            three, shape `(P, 3)`. `None` where tokens are counted.
        types: Where the tokens of a picture attend to each other: 1 at these, shape `(P,)`; else `None`.
    """

    embeds: Tensor
    positions: Tensor | None = None
    types: Tensor | None = None


@torch.no_grad()
def embed_prompts(
    model: Any, prompt_ids: Sequence[Sequence[int]], pixels: Sequence[Pixels | None]
) -> list[EmbeddedPrompt]:
    """Embed prompts, with the features of their pictures in the places of the image tokens.

    Args:
        model: The model without adapters.
        prompt_ids: Token ids of `B` prompts.
        pixels: The pixels of their pictures.

    Raises:
        ValueError: If a prompt has more or fewer image tokens than its pictures have features.
    """
    trunk, device = model.base_model, model.device
    ids, image_token = [torch.tensor(row) for row in prompt_ids], model.config.image_token_id
    # Some have no embedding for the image token
    embeddings = [trunk.get_input_embeddings()(row.masked_fill(row == image_token, 0).to(device)) for row in ids]
    given = [row for row in pixels if row is not None]
    features = iter(_features(model, given) if given else ())
    for row, (own, tokens) in enumerate(zip(pixels, ids, strict=True)):
        pictures = list(islice(features, 0 if own is None else _count(own)))
        places, wanted = tokens == image_token, sum(map(len, pictures))
        if int(places.sum()) != wanted:
            raise ValueError(
                f"Prompt {row} has {int(places.sum())} image tokens, and its pictures {wanted} features. Take the "
                "image token out of the text, and use the model's own processor."
            )
        if pictures:
            embeddings[row][places.to(device)] = torch.cat(pictures).to(embeddings[row])
    positions = [_grid_positions(model, *each) for each in zip(ids, pixels, strict=True)]
    marked = attends_within_pictures(model)
    types = [(tokens == image_token).long().to(device) if marked else None for tokens in ids]
    return [EmbeddedPrompt(*each) for each in zip(embeddings, positions, types, strict=True)]


def token_types(model: Any) -> str | None:
    """The argument that tells a model which of its tokens are a picture's, as 1; `None` if it needs no such."""
    taken = inspect.signature(model.base_model.forward).parameters
    return next((name for name in ("mm_token_type_ids", _TYPES) if name in taken), None)


def attends_within_pictures(model: Any) -> bool:
    """Whether the tokens of a picture attend to each other in both directions, as Gemma 3's do."""
    return hasattr(model.base_model, "get_image_features") and token_types(model) == _TYPES  # GPT-2 has types of texts


def join_pixels(pixels: Sequence[Pixels]) -> Pixels:
    """The pictures of several prompts, one after another."""
    return {name: torch.cat([row[name] for row in pixels]) for name in pixels[0]}


def _features(model: Any, pixels: Sequence[Pixels]) -> Any:
    """What vision tower and projector make of each picture, `(tokens, H)`."""
    joined = {
        name: values.to(model.device, model.dtype if values.is_floating_point() else None)
        for name, values in join_pixels(pixels).items()
    }
    return model.base_model.get_image_features(**joined, return_dict=True).pooler_output


def _count(pixels: Pixels) -> int:
    """Number of pictures: Qwen's pixels lie patch after patch, and their sizes beside them picture after picture."""
    return min(map(len, pixels.values()))


def _grid_positions(model: Any, ids: Tensor, pixels: Pixels | None) -> Tensor | None:
    """Positions in time, height and width, `(P, 3)`, on the model's device; `None` for a model that counts tokens."""
    if not hasattr(model.base_model, "get_rope_index"):
        return None
    types = (ids == model.config.image_token_id).int()
    sizes = {} if pixels is None else {"image_grid_thw": pixels["image_grid_thw"].cpu()}
    positions, _ = model.base_model.get_rope_index(ids[None], mm_token_type_ids=types[None], **sizes)
    by_token: Tensor = positions[:, 0].T.to(model.device)
    return by_token


def positions_after(positions: Tensor, length: int) -> Tensor:
    """Positions of tokens that follow a prompt, `(..., length, 3)`: each axis goes on from the last token's.

    Args:
        positions: Those of the prompt, padded on the left, shape `(..., P, 3)`.
        length: Number of tokens.

    Example:
        >>> positions_after(torch.tensor([[0, 0, 0], [5, 5, 5]]), 2).tolist()
        [[6, 6, 6], [7, 7, 7]]
    """
    return positions[..., -1:, :] + 1 + torch.arange(length, device=positions.device)[:, None]


def pad_prompts(prompts: Sequence[EmbeddedPrompt] | None) -> dict[str, Tensor]:
    """Pad embedded prompts on the left with zeros: fields of `Texts`, and none for prompts that are read as ids.

    Returns:
        `prompt_embeds` `(B, P, H)`, and where the model has them `prompt_positions` `(B, P, 3)` and `prompt_types`
        `(B, P)`.
    """
    if prompts is None:
        return {}
    columns = {
        f"prompt_{each.name}": [getattr(prompt, each.name) for prompt in prompts] for each in fields(prompts[0])
    }
    given = {name: rows for name, rows in columns.items() if rows[0] is not None}
    return {name: nn.utils.rnn.pad_sequence(rows, True, 0.0, "left") for name, rows in given.items()}
