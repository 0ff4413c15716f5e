"""Arguments of a causal model's forward pass that the engines of TRL and transformers leave out, or get wrong."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationMixin

# The name by which a forward pass is given its cache of keys and values: it changed with transformers 5.24.
_NAMES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"


def complete_arguments(model: torch.nn.Module) -> None:
    """Let a causal model complete its arguments: positions, and no router logits unless asked for.

    TRL, which computes the routers' loss, reads the number of experts by one name, which some configurations lack.

    Router logits come with a loss of their own, which transformers computes with a mask that does not fit the one
    token of a step of generation. A model whose configuration has `output_router_logits` (or got it from TRL's SFT)
    could not go on from prompts of unlike length.

    Raises:
        ValueError: As `positions_follow_mask` does, and if the model has no trunk without its output layer.
    """
    inner: Any = model.base_model
    if inner is model:
        raise ValueError(
            f"{type(model).__name__} does not say which of its modules is its trunk (`base_model_prefix`), whose last "
            "hidden states TRL's log-probabilities and values are computed from. Take another base model."
        )
    positions_follow_mask(model)
    config: Any = model.config
    config = config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return
    if not hasattr(config, "num_experts") and hasattr(config, "num_local_experts"):
        config.num_experts = config.num_local_experts
    if _no_router_logits not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_no_router_logits, with_kwargs=True)


def positions_follow_mask(model: torch.nn.Module) -> None:
    """Make a model with absolute positions count them from the first token that is not padding.

    TRL's engine passes no `position_ids`, so such a model (GPT-2, OPT) would read shifted positions on a left-padded
    prompt, and its log-probabilities would be wrong without any sign. Other models are left as they are.

    Raises:
        ValueError: If the model has absolute positions and takes no `position_ids`.
    """
    inner: Any = model.base_model
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    absolute = [name for name in names if "position" in name.rsplit(".", 1)[-1] or name.endswith((".wpe", "pos_emb"))]
    if not absolute or _position_ids in inner._forward_pre_hooks.values():
        return
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} has absolute position embeddings ({absolute[0]}) and takes no `position_ids`. "
            "Prompts are padded on the left, so its log-probabilities would be wrong. Use a model with rotary or "
            "relative positions (Llama, Qwen, Mistral, Gemma, GPT-NeoX, ...)."
        )
    inner.register_forward_pre_hook(_position_ids, with_kwargs=True)


def _position_ids(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    mask = kwargs.get("attention_mask")
    has_positions = kwargs.get("position_ids") is not None or kwargs.get(CACHE) is not None
    if not has_positions and mask is not None and mask.dim() == 2:
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return args, kwargs


def _no_router_logits(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {"output_router_logits": False, **kwargs}
