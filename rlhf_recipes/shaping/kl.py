"""The KL penalty to the reference: per token, estimated or exact, and controllers of its weight.

`B` completions, `T` completion tokens, `V` vocabulary. KL is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Compute KL(p || q) between two next-token distributions exactly: `sum_v p_v (log p_v - log q_v)`.

    `logits` gives p and `ref_logits` gives q. KL(policy || reference) is `full_kl(policy, reference)`; the other
    direction, `full_kl(reference, policy)`, is a different number. Gradients flow into both arguments.

    Args:
        logits: Unnormalised log-probabilities of p, shape `(..., V)`; `-inf` excludes a token.
        ref_logits: The same for q, at the same temperature, shape `(..., V)`.

    Returns:
        The KL in nats, shape `(...)`, in float32 at least; `inf` if p has a token that q excludes. Rounding may leave
        tiny negative numbers for almost equal distributions; for equal ones it is exactly 0.

    Raises:
        ValueError: If the shapes differ, or there is no dimension of tokens.

    Example:
        >>> policy, reference = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
        >>> round(full_kl(policy, reference).item(), 5), round(full_kl(reference, policy).item(), 5)
        (0.36806, 0.51083)
    """
    if logits.shape != ref_logits.shape or not logits.dim():
        raise ValueError(
            f"`logits` has shape {tuple(logits.shape)}, but `ref_logits` has shape {tuple(ref_logits.shape)}. "
            "Give both one entry per token of the vocabulary, shape (..., V)."
        )
    logps, ref_logps = _float32_at_least(logits).log_softmax(-1), _float32_at_least(ref_logits).log_softmax(-1)
    probabilities = logps.exp()
    # A token without probability adds 0, not `0 * inf`, to the sum and to the gradient.
    never = probabilities == 0
    return (probabilities * (logps.masked_fill(never, 0.0) - ref_logps.masked_fill(never, 0.0))).sum(-1)


def chunked_full_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float,
    chunk_size: int,
    swap: bool = False,
    ref_head: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute the exact KL to the reference from hidden states, a few positions at a time.

    Logits of shape `(N, V)` never exist, in the forward pass or in the backward pass: those of a chunk are computed
    again when its gradient is needed. The output layer must therefore still compute the same by then.

    Args:
        hidden: Hidden states of the policy at the positions that count, shape `(N, H)`.
        ref_hidden: Those of the reference at the same positions, shape `(N, H)`. They get no gradient.
        head: The policy's output layer, from `(n, H)` to logits `(n, V)`.
        temperature: Divides the logits of both.
        chunk_size: Positions at a time: memory grows with it, the number of calls of `head` shrinks.
        swap: Compute KL(reference || policy) in place of KL(policy || reference).
        ref_head: The reference's output layer, where it is not the policy's.

    Returns:
        The KL at each position in nats, shape `(N,)`, in float32 at least, with gradient towards `hidden`.

    Raises:
        ValueError: If the shapes differ, or `temperature` or `chunk_size` is not positive.

    Example:
        >>> hidden, ref_hidden = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> chunked_full_kl(hidden, ref_hidden, torch.nn.Identity(), temperature=1.0, chunk_size=1)
        tensor([0.3681])
    """
    if hidden.dim() != 2 or hidden.shape != ref_hidden.shape:
        raise ValueError(
            f"`hidden` has shape {tuple(hidden.shape)}, but `ref_hidden` has shape {tuple(ref_hidden.shape)}. "
            "Give both one row per position that counts, shape (N, H)."
        )
    if not temperature > 0 or chunk_size < 1:
        raise ValueError(f"Give `temperature` above 0 and `chunk_size` from 1, got {temperature} and {chunk_size}.")

    def kl_of_chunk(hidden: Tensor, ref_hidden: Tensor) -> Tensor:
        logits = _float32_at_least(head(hidden)) / temperature
        with torch.no_grad():
            ref_logits = _float32_at_least((ref_head or head)(ref_hidden)) / temperature
        return full_kl(ref_logits, logits) if swap else full_kl(logits, ref_logits)

    chunks = zip(hidden.split(chunk_size), ref_hidden.split(chunk_size), strict=True)
    return torch.cat([checkpoint(kl_of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def steered_kl(kl: Tensor, mask: Tensor, per: Literal["completion", "token"] = "completion") -> Tensor:
    """Sum up the KL of each completion in the unit in which a controller compares its mean with its target.

    Args:
        kl: KL to the reference per token in nats, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        per: `"completion"`: the sum over its tokens. `"token"`: their mean, so that each completion weighs the same.

    Returns:
        Nats per completion, or per token of each, shape `(B,)`; 0 for a completion without a counted token.

    Example:
        >>> import torch
        >>> kl, mask = torch.tensor([[0.5, 0.25], [1.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> steered_kl(kl, mask).tolist(), steered_kl(kl, mask, per="token").tolist()
        ([0.75, 1.0], [0.375, 1.0])
    """
    sums = kl.masked_fill(~mask.bool(), 0.0).sum(dim=1)
    return sums if per == "completion" else sums / mask.bool().sum(dim=1).clamp(min=1)


def looks_like_per_token(target: float, per_completion: float, per_token: float) -> bool:
    """Return whether a target for the KL of a completion is far below it, and close to the KL of a token.

    Args:
        target: In nats per completion.
        per_completion: Mean KL of a rollout's completions, in nats.
        per_token: Mean KL of its tokens, in nats.

    Returns:
        True if the KL of a completion is more than five times the target, and that of a token within half and twice.

    Example:
        >>> looks_like_per_token(0.1, per_completion=3.6, per_token=0.12), looks_like_per_token(6.0, 3.6, 0.12)
        (True, False)
    """
    return per_completion > 5 * target and target / 2 < per_token < 2 * target


@dataclass(frozen=True)
class FixedKLController:
    """A KL coefficient that stays what it is.

    Args:
        value: Weight of the KL penalty, in units of reward per nat; not negative.

    Example:
        >>> controller = FixedKLController(0.05)
        >>> controller.update(kl=12.0, n=512)
        >>> controller.value
        0.05
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < math.inf:
            raise ValueError(
                f"The KL coefficient must be 0 or above, got {self.value}. Below 0 it would reward drift."
            )

    def update(self, kl: float, n: int) -> None:
        """Take note of a rollout, which changes nothing here.

        Args:
            kl: Mean KL of the rollout's completions, in nats per sequence.
            n: Number of completions in the rollout.
        """

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from a checkpoint, which changes nothing here: a fixed coefficient is what the configuration says.

        Args:
            state: What `state_dict` of a controller returned.
        """


@dataclass
class AdaptiveKLController:
    """A KL coefficient that grows while the KL is above a target, and shrinks while it is below.

    `value *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon` after each rollout of `n` completions.

    Source: https://huggingface.co/papers/1909.08593, section 2.2; the horizon in completions is from its code, with a
    start of 0.15, a target of 6 nats and a horizon of 10,000.

    Args:
        init: Weight of the KL penalty at the start, in units of reward per nat; above 0, because 0 would stay 0.
        target: The KL to hold, in the unit of the KL that `update` gets: nats per sequence, or per token (verl's unit,
            `kl_target_per: token`). A target in the other unit is wrong by the length of the texts.
        horizon: In this many completions the weight changes by about 20 % at most. Must be more than a fifth of a
            rollout.

    Raises:
        ValueError: If one of them is not positive and finite.

    Example:
        >>> controller = AdaptiveKLController(init=0.15, target=6.0, horizon=10_000)
        >>> controller.update(kl=12.0, n=512)
        >>> round(controller.value, 6)
        0.151536
    """

    init: float
    target: float
    horizon: float
    value: float = field(init=False)

    def __post_init__(self) -> None:
        for name in ("init", "target", "horizon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be above 0 and finite, got {getattr(self, name)}.")
        self.value = self.init

    def update(self, kl: float, n: int) -> None:
        """Move the coefficient after a rollout.

        Args:
            kl: Mean of the rollout's `steered_kl`, in the target's unit.
            n: Number of completions in the rollout, over all processes.

        Raises:
            ValueError: If `kl` is `nan`, or the horizon is so short that the coefficient could reach 0.
        """
        if math.isnan(kl):
            raise ValueError("The KL of the rollout is nan, so there is no telling which way its weight should go.")
        if n >= 5 * self.horizon:
            raise ValueError(
                f"The horizon is {self.horizon} completions, but a rollout has {n}: a single step could make the KL "
                f"coefficient 0 or negative. Give a horizon above {n / 5:g}, 10,000 for example."
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps: the coefficient as it is now."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from a checkpoint; target and horizon stay those of the configuration.

        Args:
            state: What `state_dict` of a controller returned.
        """
        self.value = float(state["value"])


def _float32_at_least(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
