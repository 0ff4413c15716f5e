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

    The output layer then sees these states only, as one row, and one more, which TRL's leaves out: the logits
    of prompts and padding are not computed.

    Args:
        model: The model, with or without adapters.
        places: Places among all states of a pass, shape `(n,)`.

    Yields:
        A list that gets the last hidden states `(1, n, H)` at these places, once for each pass.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    captured: list[Tensor] = []
    places = torch.cat([places, places.new_zeros(1)])

    def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, places)[None]
        captured.append(output.last_hidden_state[:, :-1])
        return output

    handle = base.base_model.register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()
