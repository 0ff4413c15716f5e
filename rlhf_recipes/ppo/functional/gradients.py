"""Gradients that are known before the whole loss is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def backward_now(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Give a scalar with the same value and the same gradient, and free what the loss kept for its backward pass.

    The gradient is computed at once and handed over whenever the result is differentiated, scaled as the result is
    then. Two networks that share no parameters so take the memory of the larger one alone.

    Args:
        loss: A scalar.
        parameters: Everything that it is to be differentiated by.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> loss = backward_now((weight**2).sum(), [weight])
        >>> (0.5 * loss).backward()
        >>> loss.item(), weight.grad.tolist()
        (10.0, [1.0, 3.0])
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    result: Tensor = _KnownGradient.apply(loss.detach(), gradients, *trained)
    return result


class _KnownGradient(torch.autograd.Function):
    """A number whose gradient by some parameters is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor | None, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> Any:
        return None, None, *(None if gradient is None else scale[0] * gradient for gradient in ctx.gradients)
