"""A model whose weights FSDP2 spreads over processes: computed with from the side, and read and written as a whole.

Between two passes each process holds a part of every weight. FSDP gathers the parts of a layer when the model's own
`forward` runs. PPO does more than that: it samples, runs the trunk under other adapters, and saves single adapters.
Every function here leaves a model that is not sharded as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import convert_outputs_to_fp32, get_mixed_precision_context_manager
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")
_ENTRY = "call_inside"  # the method of a sharded model that FSDP takes for one like `forward`


def is_sharded(model: Any) -> bool:
    """Return whether FSDP2 has spread a model's weights over processes.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    return isinstance(model, FSDPModule)


def call_inside(model: Any, function: Callable[[], Result]) -> Result:
    """Call a function that computes with parts of a model, such as its trunk, as the model's `forward` is called.

    FSDP gathers weights, and averages the gradients of what the function returns, only for what runs within the
    outermost module. All processes call it together.

    Args:
        model: The model that is trained.
        function: Computes tensors with modules of the model.

    Returns:
        What the function returns.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> call_inside(layer, lambda: layer.weight.shape)
        torch.Size([2, 2])
    """
    if not is_sharded(model):
        return function()
    if not hasattr(model, _ENTRY):
        setattr(model, _ENTRY, lambda function: function())
        register_fsdp_forward_method(model, _ENTRY)
    result: Result = getattr(model, _ENTRY)(function)
    return result


def compute_by_autocast(trainer: Any) -> None:
    """Let one of TRL's trainers compute in bfloat16 under FSDP2 as it does without: by autocast, on its own weights.

    accelerate takes FSDP's mixed precision in its place, which rounds the weights themselves: those of 4 bits that are
    stored as float32 become others, and scores, a new head and the sums of gradients keep three digits.

    Args:
        trainer: The trainer, before it trains. Without FSDP or `bf16` nothing is changed.
    """
    accelerator, model = trainer.accelerator, trainer.model
    if not trainer.is_fsdp_enabled or accelerator.mixed_precision != "bf16":
        return
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    # As `Accelerator.prepare_model` does it for a model that is not sharded
    context = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
    model.forward = convert_outputs_to_fp32(context(model.forward))


@contextmanager
def gathered(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Let every process hold all weights of a model within the block, as if it were not sharded.

    It is for passes without gradients, of any number and length on each process, and for reading weights (of
    `parameters()`; `state_dict()` would shard them again). All processes enter and leave it together. What is written
    into weights is lost.

    Args:
        accelerator: The accelerator, whose settings say how the model is sharded.
        model: The model.
    """
    if not is_sharded(model) or not any(isinstance(weight, DTensor) for weight in model.parameters()):
        yield  # or the block around this one has gathered them
        return
    call_inside(model, lambda: None)  # whatever runs first becomes the outermost module, and must be this one
    plugin: Any = accelerator.state.fsdp_plugin
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # The outermost one's own weights are needed again at once, in the backward pass
            unit.set_reshard_after_forward(bool(plugin.reshard_after_forward) and unit is not model, recurse=False)


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The weights of a model that `gathered` holds, or of a part of it, by name.

    Args:
        model: The model, or one of its modules.

    Returns:
        The weights; `None` if the model is not sharded: then PEFT and transformers take its `state_dict()`.

    Example:
        >>> whole_weights(nn.Linear(2, 2)) is None
        True
    """
    return dict(model.named_parameters(remove_duplicate=False)) if _has_shards(model) else None


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole weights as `load_state_dict` does, outside of `gathered`; every process has them all.

    Args:
        model: The model, or one of its modules.
        weights: Its weights by name.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> load_whole(layer, {"weight": torch.ones(1, 1)})
        >>> layer.weight.item()
        1.0
    """
    if not _has_shards(model):
        model.load_state_dict(weights)
        return
    for name, weight in model.state_dict().items():
        write(weight, weights[name])


def _has_shards(model: nn.Module) -> bool:
    parts = any(isinstance(weight, DTensor) for weight in model.parameters())
    return parts or any(isinstance(module, FSDPModule) for module in model.modules())  # whose weights are gathered


@torch.no_grad()
def write(weight: Tensor, value: Tensor) -> None:
    """Write a whole value into a weight, of which this process may hold a part.

    Args:
        weight: The weight, outside of `gathered`.
        value: The new value, of the same shape, the same on every process.

    Example:
        >>> weight = torch.zeros(2)
        >>> write(weight, torch.ones(2))
        >>> weight
        tensor([1., 1.])
    """
    weight.copy_(part_like(weight, value))


def part_like(weight: Tensor, value: Tensor) -> Tensor:
    """Spread a whole tensor over the processes as a weight is spread.

    Args:
        weight: The weight.
        value: A tensor of its shape, the same on every process.

    Returns:
        The part of this process, as FSDP has it; of a weight that is not sharded the value itself.

    Example:
        >>> part_like(torch.zeros(2), torch.ones(2))
        tensor([1., 1.])
    """
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part; all processes ask together.

    Example:
        >>> whole(torch.ones(1))
        tensor([1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
