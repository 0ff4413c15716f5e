"""Support for models with quantized weights: gradients that stay right on a CPU, and no merging into their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

_SHARE_OF_FREE_MEMORY = 0.5  # that unpacked weights may take


def keep_4bit_differentiable(model: torch.nn.Module) -> None:
    """Keep the 4-bit layers of a model, whoever loaded it, in the form that has gradients.

    On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit layer at its first forward in evaluation mode and computes
    from then on, in training too, with a kernel that has no backward: LoRA's gradients become wrong after one
    evaluation or generation, with no more than a warning. The flag is per layer, and must be off before that. Other
    models, and other processors, are left as they are.

    Args:
        model: Any model.

    Raises:
        ValueError: If a layer is repacked already.

    Example:
        >>> keep_4bit_differentiable(torch.nn.Linear(2, 2))
    """
    module: Any
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit layer {name!r} was repacked by bitsandbytes when the model was first evaluated or sampled "
                "from. It has no gradient in that form, so that LoRA's would be wrong, and its output has shifted. "
                "Load the model again and give it here before its first forward, or load it with "
                "`rlhf_recipes.models.load_causal_lm` or `load_sequence_classifier`, which keep it as it is."
            )
        module.support_avx512bf16_for_cpu = False


def merges_exactly(model: torch.nn.Module) -> bool:
    """Return whether an adapter can be merged into a model: not into weights that would round it away.

    Merged into 4 bits, a small adapter is lost as a whole, and the noise of a new quantization comes on top.

    Args:
        model: The base.

    Returns:
        Whether all weights are in float32 at least, and none is quantized.

    Example:
        >>> merges_exactly(torch.nn.Linear(2, 2)), merges_exactly(torch.nn.Linear(2, 2).bfloat16())
        (True, False)
    """
    wide = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    return wide and not getattr(model, "is_quantized", False)


def dequantized(model: Any) -> Any:
    """Make a new model in float32 of one whose weights are in 4 or 8 bits: what they stand for, not what they were.

    Args:
        model: The quantized model, which cannot be used any more.
    """
    weights = model.dequantize().float().state_dict()
    # A new model, because transformers cannot save one in float32 that it loaded from 4 bits
    plain = type(model)(model.config)
    plain.load_state_dict(weights)
    return plain


@contextmanager
def unpacked(model: torch.nn.Module) -> Iterator[None]:
    """Keep the 4-bit weights of a model unpacked inside the block, if they fit into half of the memory that is free.

    Each token that is sampled otherwise unpacks all of them again. The numbers are the same, to the last bit.

    Args:
        model: Any model, whose weights do not change inside the block.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    known = all(module.compute_type_is_set and module.compute_dtype is not None for _, module in layers)
    needed = sum(module.in_features * module.out_features * _itemsize(module) for _, module in layers)
    if not (layers and known) or needed > _SHARE_OF_FREE_MEMORY * _free_memory(layers[0][1].weight.device):
        yield
        return
    for name, module in layers:
        model.set_submodule(name, _Unpacked(module))
    try:
        yield
    finally:
        for name, module in layers:
            model.set_submodule(name, module)


def unpacked_weight(layer: Any) -> Tensor:
    """The weight of a 4-bit layer as numbers, shape `(out, in)`.

    Args:
        layer: A `Linear4bit` of bitsandbytes.
    """
    state = getattr(layer.weight, "quant_state", None)  # a bare weight that FSDP has gathered lacks it
    numbers: Tensor = dequantize_4bit(layer.weight.data, layer.quant_state if state is None else state)
    return numbers


def _itemsize(layer: Any) -> int:
    size: int = (layer.compute_dtype or torch.float32).itemsize
    return size


class _Unpacked(nn.Linear):
    """What a 4-bit layer computes, with its weights as numbers."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        weight = unpacked_weight(layer).to(layer.compute_dtype)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's format."""
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight, bias).to(x.dtype)


def _free_memory(device: torch.device) -> int:
    """Bytes that are free, with those that torch keeps for itself."""
    if device.type != "cuda":
        free: int = psutil.virtual_memory().available
        return free
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
