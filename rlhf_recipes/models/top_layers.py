"""The upper layers of a decoder alone: what lies below them does not change, so it is computed once and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf_recipes.models.gated_mlp import GatedMLP
from rlhf_recipes.models.rows import scatter_tokens


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


@contextmanager
def only_read_in_last_layer(model: Any, places: Tensor) -> Iterator[None]:
    """Let the last layer of a decoder compute what is read of it, in every forward pass inside the block.

    Of a token whose last state nobody reads, the others need the last layer's keys and values alone. Its query, the
    output of attention and the MLP, most of the layer, are left out; what the layer then gives for it has no meaning.
    With activation checkpointing, which computes layers again after the block, nothing is left out.

    Args:
        model: The causal model, without PEFT's wrapper.
        places: Of the tokens whose states are read, each once, among all of a pass, shape `(n,)`.
    """
    layers = getattr(model.base_model, "layers", None)
    with ExitStack() as hooks:
        again = torch.is_grad_enabled() and getattr(model, "is_activation_checkpointing", False)
        if isinstance(layers, nn.ModuleList) and not again:
            for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
                module = _submodule(layers[-1], name)
                if isinstance(module, nn.Linear | LoraLayer | GatedMLP):
                    _compute_only(module, places, hooks)
        yield


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return module


def _compute_only(module: nn.Module, places: Tensor, hooks: ExitStack) -> None:
    """Hand a module, which computes each token alone, some of the tokens; the others get zeros."""
    shapes: list[torch.Size] = []

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        shapes.append(args[0].shape[:-1])
        return args[0].flatten(0, 1).index_select(0, places)[None]

    def put_back(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return scatter_tokens(output[0], places, *shapes.pop())

    hooks.enter_context(_removed(module.register_forward_pre_hook(choose)))
    hooks.enter_context(_removed(module.register_forward_hook(put_back)))


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
