"""LoRA layers that add their update to the base layer's output within one matrix product.

PEFT computes `base(x) + scaling * B(A(x))` with the update, its scaling and the sum each as a tensor as large as the
output; in 4 bits it copies the base's output besides. `torch.addmm` does the same in one pass over the output.
"""

from typing import Any, TypeVar

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftConfig
from peft.tuners import lora
from torch import Tensor, nn

Config = TypeVar("Config", bound=PeftConfig)


def fuse_lora(config: Config) -> Config:
    """Make a LoRA configuration build the layers of this module, on linear layers as they are and in 4 bits.

    The adapters are PEFT's in everything else: names of parameters, saving, merging. What has no fused form (DoRA,
    dropout in training, several adapters at a time) is computed as PEFT does.

    Args:
        config: Configuration of new adapters; only LoRA's is changed.

    Returns:
        The same object.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(4, 3))
        >>> model = get_peft_model(base, fuse_lora(LoraConfig(target_modules=["0"])))
        >>> type(model.base_model.model[0]).__name__
        'FusedLinear'
    """
    if isinstance(config, LoraConfig):
        config._register_custom_module({nn.Linear: _fused_layer})  # type: ignore[dict-item]  # called, never compared
    return config


class FusedLinear(lora.Linear):
    """LoRA on a linear layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapter's update: (..., in) -> (..., out)."""
        adapter = None if args or kwargs else _fusable_adapter(self, x)
        return super().forward(x, *args, **kwargs) if adapter is None else _forward(self, adapter, x)


class FusedLinear4bit(lora.Linear4bit):  # type: ignore[misc]  # PEFT makes it only with bitsandbytes
    """LoRA on a linear layer in 4 bits."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapter's update: (..., in) -> (..., out)."""
        adapter = None if args or kwargs else _fusable_adapter(self, x)
        return super().forward(x, *args, **kwargs) if adapter is None else _forward(self, adapter, x)


def _fusable_adapter(layer: Any, x: Tensor) -> str | None:
    """The adapter in use, where it is one alone, plain LoRA without dropout, and no narrower than the input."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    dropout, down, up = (each[active[0]] for each in (layer.lora_dropout, layer.lora_A, layer.lora_B))
    plain = up.bias is None and (isinstance(dropout, nn.Identity) or not dropout.training)
    wide = torch.promote_types(x.dtype, down.weight.dtype) == down.weight.dtype
    return active[0] if plain and (wide or torch.is_autocast_enabled(x.device.type)) else None


def _forward(layer: Any, adapter: str, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.size(-1))  # in two dimensions from the start: the base's output is no view then
    output: Tensor = layer.base_layer(rows)
    down, up, alpha = layer.lora_A[adapter], layer.lora_B[adapter].weight.t(), layer.scaling[adapter]
    if torch.is_autocast_enabled(x.device.type):
        output = torch.addmm(output, down(rows), up, alpha=alpha)
    else:
        dtype, wide = output.dtype, output.to(down.weight.dtype)  # float32 on 16-bit layers, rounded once, at the end
        update = down(rows.to(down.weight.dtype))
        if isinstance(layer.base_layer, Linear4bit):
            wide = torch.addmm(wide, update, up, alpha=alpha)
        else:
            wide.addmm_(update, up, alpha=alpha)  # nothing else needs the base's output alone
        output = wide.to(dtype)
    return output.view(*x.shape[:-1], -1)


def _fused_layer(target: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The fused layer for a module, or `None` for PEFT's own choice (other quantizations, subclasses)."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    layers: dict[type, Any] = {nn.Linear: FusedLinear, Linear4bit: FusedLinear4bit}
    layer = layers.get(type(base))
    return None if layer is None else layer(target, adapter_name, config=config, **kwargs)
