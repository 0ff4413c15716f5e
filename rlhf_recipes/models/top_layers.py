"""The upper layers of a decoder alone: what lies below them does not change, so it is computed once and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def decoder_layers(model: Any) -> nn.ModuleList:
    """Find the list of layers of a causal model.

    Raises:
        ValueError: If the model's trunk has no list `layers`.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no list `layers` in its trunk, so its upper layers cannot be run alone. "
            "Leave `critic_layers` out."
        )
    return layers


def check_top_layers(model: Any, count: int) -> None:
    """Check that the upper layers of a causal model can be run alone.

    Raises:
        ValueError: If they cannot.
    """
    layers = len(decoder_layers(model))
    if count >= layers:
        raise ValueError(
            f"`critic_layers` is {count}, but the base has {layers} layers. Give fewer, or leave it out to train all."
        )
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    if kinds[-count:] != kinds[:count]:  # seen in the states of texts that are longer than a window only
        raise ValueError(
            f"`critic_layers` is {count}, but {type(model).__name__} chooses what a layer attends to by its number, "
            f"and its upper layers are of other kinds ({kinds[-count:]}) than its lowest ({kinds[:count]}). Leave it "
            "out."
        )


@contextmanager
def states_below(model: Any, count: int) -> Iterator[list[Tensor]]:
    """Keep, of every forward pass inside the block, the hidden states `(B, L, H)` that enter the upper layers.

    Args:
        model: The causal model.
        count: Number of upper layers.

    Yields:
        A list that gets them, once for each pass.
    """
    captured: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        captured.append(args[0] if args else kwargs["hidden_states"])

    handle = decoder_layers(model)[-count].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def only_top(model: Any, count: int) -> Iterator[None]:
    """Take the lower layers out of a model: what it gets as `inputs_embeds` goes into the upper ones.

    Args:
        model: The causal model.
        count: Number of upper layers.
    """
    trunk, layers = model.base_model, decoder_layers(model)
    trunk.layers = layers[-count:]
    try:
        yield
    finally:
        trunk.layers = layers
