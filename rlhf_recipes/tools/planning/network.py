"""Shapes of models and adapters from their configurations: models are built without weights, on a meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.models.gated_mlp import PARTS
from rlhf_recipes.tools.planning.sizes import AdapterSizes, NetworkSizes


def empty_model(path: str, **options: Any) -> PreTrainedModel:
    """Build a causal language model without weights.

    Args:
        path: Hub id or local folder with a `config.json`.
        **options: `revision`, `trust_remote_code`, `attn_implementation`.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is no decoder, or a mixture of experts, which this arithmetic does not cover.
    """
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        place = "folder" if Path(path).is_dir() else "model"
        raise FileNotFoundError(
            f"No configuration of the {place} {path!r} was found. Give a hub id, or a folder with a config.json: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError(f"{path!r} is a mixture of experts, for which memory is not planned. Take a dense model.")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"{path!r} ({config.model_type}) is no causal language model: {str(error).splitlines()[0]}"
        ) from error
    return model


def network_sizes(model: PreTrainedModel) -> NetworkSizes:
    """Read the shape of a decoder from its modules; weights are not looked at.

    Args:
        model: A causal language model, on any device, without adapters.

    Returns:
        The shape. The width of the MLP is that of the widest linear layer beside the output layer.
    """
    config: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    linears: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    sizes = [linear.weight.numel() for linear in linears]
    parameters = [parameter.numel() for parameter in model.parameters()]
    intermediate = max(max(linear.weight.shape) for linear in linears)
    into_mlp = [linear for linear in linears if _widths(linear)[1] == intermediate]
    heads = config.num_attention_heads
    return NetworkSizes(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=intermediate,
        vocabulary=config.vocab_size,
        gated=len(into_mlp) > config.num_hidden_layers,
        linears=len(linears),
        linear_parameters=sum(sizes),
        other_parameters=sum(parameters) - sum(sizes),
        largest_linear=max(sizes),
        largest_parameter=max(parameters),
        embedding=head.weight.numel(),
        tied=head.weight is model.get_input_embeddings().weight,
    )


def adapter_sizes(model: PreTrainedModel, config: LoraConfig, in_parts: bool = True) -> AdapterSizes:
    """Put an adapter on a model without weights and read its shape.

    In a block of linear layers (attention, MLP) all but the last read the block's input; the last has its own.

    Args:
        model: From `empty_model`; it is changed.
        config: The adapter's configuration.
        in_parts: Whether gated MLPs are computed in parts.
    """
    peft = get_peft_model(model, fuse_lora(config, model), low_cpu_mem_usage=True)
    layers = model.config.get_text_config().num_hidden_layers
    blocks: dict[str, dict[str, Any]] = {}
    for name, module in peft.named_modules():
        if isinstance(module, LoraLayer):
            block, _, last = name.rpartition(".")
            blocks.setdefault(block, {})[last] = module
    inputs, shared, ranks, in_mlps = 0, 0, 0, 0
    for block in blocks.values():
        ranks += sum(rank for module in block.values() for rank in module.r.values())
        if in_parts and block.keys() <= set(PARTS):
            numbers = [
                p.numel() for module in block.values() for name, p in module.named_parameters() if "lora_" in name
            ]
            in_mlps += sum(numbers)
            continue
        widths = [module.in_features for module in block.values()]
        inputs += sum(widths)
        shared += widths[-1] + (widths[0] if len(widths) > 1 else 0)
    return AdapterSizes(
        parameters=sum(p.numel() for name, p in peft.named_parameters() if "lora_" in name),
        ranks=ranks // layers,
        inputs=inputs // layers,
        shared_inputs=shared // layers,
        in_parts=in_parts,
        in_mlps=in_mlps,
    )


def whole_model_sizes(model: PreTrainedModel) -> AdapterSizes:
    """A model that is trained as a whole, in place of an adapter: it keeps the inputs of all linear layers."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules="all-linear")
    copy = adapter_sizes(model, lora, in_parts=False)
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    return AdapterSizes(total, 0, copy.inputs, copy.shared_inputs, in_parts=False)


def _widths(linear: Any) -> tuple[int, int]:
    """Input and output width."""
    shape = tuple(linear.weight.shape)
    return shape if isinstance(linear, Conv1D) else shape[::-1]
