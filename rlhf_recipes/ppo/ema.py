"""An exponential moving average of the policy's weights, kept beside those that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from rlhf_recipes.models.roles import is_critic_parameter

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class PolicyAverage(TrainerCallback):
    """Exponential moving average of a policy's trained weights, of its updates so far.

    `average <- decay * average + (1 - decay) * weights` after each optimizer step that trains the policy: neither a
    dropped update counts nor one of the critic alone. It starts at the weights at hand, of which `decay ** n` is left
    after `n` updates. One copy of the trained weights is all that it takes, the same on every process.

    Source: https://huggingface.co/papers/2203.02155, appendix C.4 (decay 0.992).

    Args:
        policy: The network that is trained. Its parameters that need a gradient count, but for the critic's.
        decay: In (0, 1).

    Raises:
        ValueError: If a weight is in 16 bits, in which small changes of an average are rounded away.

    Example:
        >>> policy = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(policy.weight)
        >>> average = PolicyAverage(policy, decay=0.75)
        >>> policy.weight.data += 8.0
        >>> policy.weight.grad = torch.ones_like(policy.weight)
        >>> average.on_optimizer_step(None, None, None)
        >>> with average.in_place():
        ...     policy.weight.item()
        2.0
        >>> policy.weight.item()
        8.0
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        self._weights = [parameter for name, parameter in named if not is_critic_parameter(name)]
        if narrow := [weight.dtype for weight in self._weights if torch.finfo(weight.dtype).bits < 32]:
            raise ValueError(
                f"`ema_decay` needs trained weights in float32, but the policy's are in {narrow[0]}, in which the "
                "small steps of an average are rounded away. Load the model in float32 (`bf16: true` still computes "
                "in 16 bits), or train an adapter, which is in float32; or leave `ema_decay` out."
            )
        self._average = [weight.detach().clone() for weight in self._weights]
        self._move = get_ema_multi_avg_fn(decay)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the weights after an optimizer step, if it was one of the policy."""
        if any(weight.grad is not None for weight in self._weights):  # none in an update that was dropped
            self._move(self._average, [weight.detach() for weight in self._weights], 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the policy have the average's weights within the block: to sample, to be saved, or to be loaded."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for index, weight in enumerate(self._weights):  # the storages change places, so that nothing is copied
            weight.data, self._average[index] = self._average[index], weight.data
