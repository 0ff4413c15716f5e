"""Adam as in TensorFlow, to compare numbers with OpenAI's RLHF code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class TensorFlowAdamW(torch.optim.Optimizer):
    """AdamW with TensorFlow's epsilon, which is added before the second moment is corrected for its bias.

    `p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)`. `torch.optim.AdamW` divides by
    `sqrt(v) / sqrt(1 - beta2^t) + eps` instead, so that here `eps` is `1 / sqrt(1 - beta2^t)` times as large: 32 times
    at the first step, and alike after some thousand. Where gradients are not far above `eps`, the first steps are much
    smaller than torch's, and the policy moves less.

    Use it to reproduce runs of OpenAI's lm-human-preferences or another TensorFlow code, whose learning rates were
    tuned with it; they have `eps=1e-5`. Otherwise `torch.optim.AdamW` with a warm-up does the same.

    Source: https://huggingface.co/papers/1412.6980, the last paragraph of section 2 (there "epsilon hat");
    https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo. Weight decay is decoupled:
    https://huggingface.co/papers/1711.05101.

    Args:
        params: Parameters, or groups of them as dictionaries.
        lr: Learning rate.
        betas: Decay rates of the first and the second moment, in [0, 1).
        eps: Added to the root of the second moment, above 0 unless no gradient is ever 0.
        weight_decay: Share of a parameter, times `lr`, that is taken from it at each step.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        >>> optimizer = TensorFlowAdamW([weight], lr=1.0)
        >>> weight.grad = torch.full_like(weight, 1e-5)
        >>> optimizer.step()
        >>> round(weight.item(), 5)  # torch.optim.AdamW with the same `eps`: -0.5
        -0.03065
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must lie in [0, 1), got {betas}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and its gradients anew, where one is needed.

        Returns:
            The loss of `closure`, or `None` without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        mean_square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        corrected_lr = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, mean_square.sqrt().add_(group["eps"]), value=-corrected_lr)
