"""Prompts with pictures as rows of embeddings. Apart from `images.py`, whose reading of rows is slow to import."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def embed_prompts(model: Any, prompt_ids: Sequence[Sequence[int]], pixels: Sequence[Tensor | None]) -> list[Tensor]:
    """Embed prompts, with the features of their pictures in the places of the image tokens.

    Args:
        model: The model without adapters.
        prompt_ids: Token ids of `B` prompts.
        pixels: The pixels of their pictures.

    Returns:
        For each prompt its embeddings, shape `(P, H)`.

    Raises:
        ValueError: If a prompt has more or fewer image tokens than its pictures have features.
    """
    trunk, device = model.base_model, model.device
    ids = [torch.tensor(row, device=device) for row in prompt_ids]
    embeddings: list[Tensor] = [trunk.get_input_embeddings()(row) for row in ids]
    given = [row for row in pixels if row is not None]
    if not given:
        return embeddings
    values = torch.cat(given).to(device, model.dtype)
    features = iter(trunk.get_image_features(pixel_values=values, return_dict=True).pooler_output)
    for row, (own, tokens) in enumerate(zip(pixels, ids, strict=True)):
        pictures = list(islice(features, 0 if own is None else len(own)))
        places, wanted = tokens == model.config.image_token_id, sum(map(len, pictures))
        if int(places.sum()) != wanted:
            raise ValueError(
                f"Prompt {row} has {int(places.sum())} image tokens, and its pictures {wanted} features. Take the "
                "image token out of the text, and use the model's own processor."
            )
        if pictures:
            embeddings[row][places] = torch.cat(pictures).to(embeddings[row])
    return embeddings
