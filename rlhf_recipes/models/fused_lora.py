"""LoRA layers that add their update to the base layer's output within one matrix product.

PEFT computes `base(x) + scaling * B(A(x))` with the update, its scaling and the sum each as a tensor as large as the
output; in 4 bits it copies the base's output besides. `torch.addmm` does the same in one pass over the output.
"""

import re
from typing import Any, NamedTuple, TypeVar

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    check_target_module_exists,
)
from torch import Tensor, nn

Config = TypeVar("Config", bound=PeftConfig)


def fuse_lora(config: Config, model: nn.Module | None = None) -> Config:
    """Make a LoRA configuration build the layers of this module, on linear layers as they are and in 4 bits.

    The adapters are PEFT's in everything else: names of parameters, saving, merging. What has no fused form (DoRA,
    dropout in training, several adapters at a time) is computed as PEFT does.

    Args:
        config: Configuration of new adapters; only LoRA's is changed.
        model: The model that they are for. `all-linear` then leaves out what LoRA cannot adapt: linear layers that
            give more than their product, as some routers of experts do, and those of Mamba that PEFT refuses.

    Returns:
        The same object.

    Raises:
        ValueError: If it names such a layer.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(4, 3))
        >>> model = get_peft_model(base, fuse_lora(LoraConfig(target_modules=["0"])))
        >>> type(model.base_model.model[0]).__name__
        'FusedLinear'
    """
    if isinstance(config, LoraConfig):
        if model is not None:
            _leave_out(config, model)
        config._register_custom_module({nn.Linear: _fused_layer})  # type: ignore[dict-item]  # called, never compared
    return config


def _leave_out(config: LoraConfig, model: nn.Module) -> None:
    names = [name for name, module in model.named_modules() if _is_no_product(module)]
    if config.target_modules == "all-linear":
        last = {name.rpartition(".")[2] for name in names} | _refused_by_peft(config, model)
        excluded = config.exclude_modules or []
        if isinstance(excluded, str):
            config.exclude_modules = "|".join(
                [f"({excluded})", *(rf"(.*\.)?{re.escape(name)}" for name in sorted(last))]
            )
        elif last:
            # By their ends, so that a saved adapter leaves them out
            config.exclude_modules = sorted({*excluded, *last})
    elif named := [name for name in names if check_target_module_exists(config, name)]:
        raise ValueError(
            f"`target_modules` names {named[0]!r}, a layer that gives more than one tensor, which LoRA cannot adapt. "
            "Take it out."
        )


def _refused_by_peft(config: LoraConfig, model: nn.Module) -> set[str]:
    """Linear layers of state-space models whose weights fused kernels read without asking the layer."""
    refused = set()
    for last in {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}:
        try:
            _check_lora_target_modules_mamba(config, model, last)
        except ValueError:
            refused.add(last)
    return refused


def _is_no_product(module: nn.Module) -> bool:
    """Return whether a module that is a kind of linear layer gives something else than a product with its weight."""
    weight: Any = getattr(module, "weight", None)
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    # Weights in 8 bits are integers, and those in 4 bits may be stored as anything
    if not own or isinstance(module, BaseTunerLayer | Linear4bit) or not weight.is_floating_point():
        return False
    with torch.no_grad():
        output = module(weight.new_zeros(1, weight.size(1)))
    return not isinstance(output, Tensor) or output.shape != (1, weight.size(0))


class _Fused(nn.Module):
    """Shared parts of the fused layers; the class behind it computes what has no fused form."""

    base_layer: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapter's update: (..., in) -> (..., out)."""
        update = None if args or kwargs else fusable_update(self, x)
        return super().forward(x, *args, **kwargs) if update is None else _forward(self.base_layer, update, x)


class FusedLinear(_Fused, lora.Linear):
    """LoRA on a linear layer."""


class FusedLinear4bit(_Fused, lora.Linear4bit):  # type: ignore[misc]  # PEFT makes it only with bitsandbytes
    """LoRA on a linear layer in 4 bits."""


class _Update(NamedTuple):
    """Update of an adapter: `scaling * x @ down.t() @ up.t()`, with `down` (r, in) and `up` (out, r)."""

    down: Tensor
    up: Tensor
    scaling: float


# A step of generation calls each layer for a few tokens, so that every lookup of an attribute here counts.
def fusable_update(layer: Any, x: Tensor) -> _Update | None:
    """The update in use, if it is of one adapter alone, plain LoRA without dropout, and no narrower than the input."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    [name] = layer.active_adapters
    downs = layer.lora_A
    if name not in downs or name in layer.lora_variant:
        return None
    dropout, up, down = layer.lora_dropout[name], layer.lora_B[name], downs[name].weight
    if up.bias is not None or (dropout.training and not isinstance(dropout, nn.Identity)):
        return None
    if x.dtype != down.dtype and torch.promote_types(x.dtype, down.dtype) != down.dtype and not _autocast(x):
        return None
    return _Update(down, up.weight, layer.scaling[name])


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _forward(base_layer: nn.Module, update: _Update, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.size(-1))  # in two dimensions from the start: the base's output is no view then
    output: Tensor = base_layer(rows)
    down, up, alpha = update.down, update.up.t(), update.scaling
    if _autocast(x):
        output = torch.addmm(output, nn.functional.linear(rows, down), up, alpha=alpha)
    else:
        dtype, wide = output.dtype, output.to(down.dtype)  # float32 on 16-bit layers, rounded once, at the end
        small = nn.functional.linear(rows.to(down.dtype), down)
        if isinstance(base_layer, Linear4bit):
            wide = torch.addmm(wide, small, up, alpha=alpha)
        else:
            wide.addmm_(small, up, alpha=alpha)  # nothing else needs the base's output alone
        output = wide.to(dtype)
    return output.view(*x.shape[:-1], output.shape[-1])  # of no rows, too


def _fused_layer(target: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The fused layer for a module, or `None` for PEFT's own choice (other quantizations, subclasses, parameters)."""
    if kwargs.get("parameter_name") is not None:  # PEFT adapts weights of experts and routers as such
        return None
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    layers: dict[type, Any] = {nn.Linear: FusedLinear, Linear4bit: FusedLinear4bit}
    layer = layers.get(type(base))
    return None if layer is None else layer(target, adapter_name, config=config, **kwargs)
