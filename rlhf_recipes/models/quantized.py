"""Support for models with quantized weights: gradients that stay right on a CPU, and no merging into their weights."""

from __future__ import annotations

from typing import Any

import torch


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
