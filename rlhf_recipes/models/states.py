"""The hidden states that a causal model draws tokens from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


@contextmanager
def states_at(model: nn.Module, places: Tensor) -> Iterator[list[Tensor]]:
    """Keep, of every forward pass of a causal model inside the block, the states that tokens are drawn from.

    The output layer then sees these states only, and the last one of each row once more: what it would say of the
    prompt is not computed.

    Args:
        model: The model, with or without adapters.
        places: Columns of the states in each row, shape `(B, T)`.

    Yields:
        A list that gets the last hidden states `(B, T, H)` at these places, once for each pass.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    captured: list[Tensor] = []
    columns = torch.cat([places, places[:, -1:]], dim=1)[..., None]

    def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
        states = output.last_hidden_state
        output.last_hidden_state = states.gather(1, columns.expand(-1, -1, states.size(-1)))
        captured.append(output.last_hidden_state[:, :-1])
        return output

    handle = base.base_model.register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()
