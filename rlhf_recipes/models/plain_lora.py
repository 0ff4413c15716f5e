"""Adapters whose start took a part of the base with it (PiSSA, OLoRA), as plain LoRA on the base as it is.

PiSSA writes a weight as `W = R + s B0 A0`, leaves the residual `R` in the base and trains `A`, `B` from `A0`, `B0`. On
a base that several roles share, the other adapters would then read the residual. `R + s B A` is the same as
`W + s [B, -B0] [A; A0]`, which is LoRA of twice the rank, and the base stays what it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

_FROM_WEIGHTS = ("pissa", "olora")  # starts that depend on the base's weights alone
_FROM_MORE = ("pissa_niter", "corda", "loftq", "lora_ga")  # those that depend on chance, data or a quantization too
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def changes_base(config: Any) -> bool:
    """Return whether an adapter with this configuration takes a part of the base's weights out of it.

    Example:
        >>> changes_base(LoraConfig(init_lora_weights="pissa_niter_4")), changes_base(LoraConfig())
        (True, False)
    """
    start = getattr(config, "init_lora_weights", True)
    return isinstance(start, str) and start.lower().startswith((*_FROM_WEIGHTS, *_FROM_MORE))


@torch.no_grad()
def as_plain_lora(
    base: nn.Module, config: LoraConfig, weights: dict[str, Tensor], name: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Turn a saved PiSSA or OLoRA adapter into plain LoRA that computes the same on the unchanged base.

    Source: https://huggingface.co/papers/2404.02948, section 3, and https://huggingface.co/papers/2406.01775.

    Args:
        base: The base that the adapter was trained on, with or without other adapters. It is not changed.
        config: The adapter's configuration.
        weights: Its weights, as PEFT saves them.
        name: What the errors call the adapter.

    Returns:
        A configuration of twice the rank and the same scaling, and its weights.

    Raises:
        ValueError: If the start cannot be computed again: from data, from a quantized base, or with other weights.
    """
    start = str(config.init_lora_weights).lower()
    layers = [key.removeprefix(_PREFIX).removesuffix(_DOWN) for key in weights if key.endswith(_DOWN)]
    odd = [key for key in weights if ".lora_" in key and not key.endswith((_DOWN, _UP))]
    quantized = getattr(base, "is_quantized", False)
    if start not in _FROM_WEIGHTS or config.use_dora or odd or quantized:
        cause = (
            "the base is quantized"
            if quantized
            else f"it has weights such as {odd[0]!r}"
            if odd
            else "that start depends on more than the weights of the base, such as chance or data"
        )
        raise ValueError(
            f"The adapter {name} was started with `init_lora_weights: {config.init_lora_weights}`, which takes a part "
            f"of the base out of it, and the base is shared here. It cannot be told which part, because {cause}. Save "
            "the adapter as plain LoRA where it was trained (PEFT's `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)`), or train one with `init_lora_weights: true`."
        )
    changed = dict(weights)
    for layer in layers:
        rank = weights[_PREFIX + layer + _DOWN].size(0)
        down, up = _start_of(base, config, layer, rank)
        for key, first, sign, dim in ((_DOWN, down, 1.0, 0), (_UP, up, -1.0, 1)):
            trained = weights[_PREFIX + layer + key]
            changed[_PREFIX + layer + key] = torch.cat([trained, sign * first.to(trained)], dim=dim).contiguous()
    plain: Any = copy.deepcopy(config)
    growth = 2**0.5 if config.use_rslora else 2.0  # so that alpha / r, or alpha / sqrt(r), stays what it is
    plain.init_lora_weights = True
    plain.r, plain.lora_alpha = 2 * config.r, growth * config.lora_alpha
    plain.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: growth * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    return plain, changed


def _start_of(base: nn.Module, config: LoraConfig, layer: str, rank: int) -> tuple[Tensor, Tensor]:
    """`A0` (r, in) and `B0` (out, r) that PEFT makes of one layer, from a copy of it."""
    module: Any = base.get_submodule(layer)
    original = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    patterns = config.alpha_pattern or {}
    layer_config = LoraConfig(
        r=rank,
        lora_alpha=patterns.get(get_pattern_key(list(patterns), layer), config.lora_alpha),
        use_rslora=config.use_rslora,
        fan_in_fan_out=config.fan_in_fan_out,
        init_lora_weights=config.init_lora_weights,
        target_modules=["0"],
    )
    with torch.random.fork_rng():  # PEFT first draws a random start
        adapted: Any = inject_adapter_in_model(layer_config, nn.Sequential(copy.deepcopy(original))).get_submodule("0")
    return adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
