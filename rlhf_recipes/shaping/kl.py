"""The KL penalty to the reference: estimators per token, and controllers of its weight.

`B` completions, `T` completion tokens. KL is in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate KL(policy || reference) at each token from the one that the policy sampled.

    With `r = p_reference / p_policy`: `k1 = -log r`, `k2 = (log r)^2 / 2`, `k3 = (r - 1) - log r`. Averaged over
    samples of the policy, k1 and k3 are the KL; k2 is biased, little while the two are close. k1 may be negative and
    must stay so: clamped at 0 it would be biased upwards. k2 and k3 are never negative and vary less.

    Source: John Schulman, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html.

    Args:
        logps: Log-probability of each sampled token under the policy, in nats, shape `(B, T)`.
        ref_logps: The same under the reference, at the same temperature, shape `(B, T)`.
        estimator: `"k1"`, `"k2"` or `"k3"`.

    Returns:
        The estimates in nats, shape `(B, T)`, padding included: mask them before summing.

    Raises:
        ValueError: If the shapes differ, or the estimator is unknown.

    Example:
        >>> import torch
        >>> logps, ref_logps = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
        >>> kl_estimate(logps, ref_logps, "k1").tolist(), kl_estimate(logps, ref_logps, "k2").tolist()
        ([[0.5, -1.0]], [[0.125, 0.5]])
    """
    if logps.shape != ref_logps.shape:
        raise ValueError(
            f"`logps` has shape {tuple(logps.shape)}, but `ref_logps` has shape {tuple(ref_logps.shape)}. "
            "Give both one entry per token, shape (B, T)."
        )
    log_ratio = ref_logps - logps
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.expm1() - log_ratio  # `exp() - 1` would round small estimates to 0 or below
    raise ValueError(f"`estimator` must be 'k1', 'k2' or 'k3', got {estimator!r}.")


@dataclass(frozen=True)
class FixedKLController:
    """A KL coefficient that stays what it is.

    Args:
        value: Weight of the KL penalty, in units of reward per nat.

    Example:
        >>> controller = FixedKLController(0.05)
        >>> controller.update(kl=12.0, n=512)
        >>> controller.value
        0.05
    """

    value: float

    def update(self, kl: float, n: int) -> None:
        """Take note of a rollout, which changes nothing here.

        Args:
            kl: Mean KL of the rollout's completions, in nats per sequence.
            n: Number of completions in the rollout.
        """
