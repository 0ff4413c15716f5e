"""Moments of log-probabilities that show whether completions are the policy's own samples.

`B` completions, `T` completion tokens, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from rlhf_recipes.models.packing import is_packed
from rlhf_recipes.models.states import states_at
from rlhf_recipes.ppo.functional import importance_weights, masked_mean

if TYPE_CHECKING:
    from rlhf_recipes.models.rows import Texts
    from rlhf_recipes.ppo.rollout import Batch

_TOKENS = 128  # for which the second moment takes logits over the whole vocabulary
_SHARE_OF_ROWS = 8  # one row in so many is enough for it
_ROUNDING, _ROUNDING_IN_16_BITS = 2.5e-5, 5e-3  # nats per token; a quarter of what the first update may differ by


def off_policy_metrics(surprise: Tensor, mask: Tensor, moments: Tensor, processes: int = 1) -> dict[str, Tensor]:
    """Hold the sampled tokens against the distribution that they should come from.

    For tokens drawn from a distribution with entropy H the mean of `log p + H` is 0, and the mean of its square is the
    variance of the log-probabilities under that distribution. Sampling that cuts or favours tokens moves the first;
    what keeps tokens of typical probability (`typical_p`) moves only the second.

    Args:
        surprise: `log p + H` of the completion tokens in nats, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        moments: The sums that `sampled_moments` gives, over all processes, shape `(2,)`.
        processes: How many there are.

    Returns:
        `ppo/off_policy_gap`, the mean of `log p + H` over all tokens, in nats per token; `ppo/off_policy_spread`, the
        mean of its square over some of them, divided by its expectation: 1 for the policy's own samples.
    """
    seen, expected = moments.unbind()
    spread = torch.where(expected > 1e-9 * processes, seen / expected, 1.0)
    return {"ppo/off_policy_gap": masked_mean(surprise, mask), "ppo/off_policy_spread": spread}


@torch.no_grad()
def follow_sampler(
    trainer: Any, sampled: Batch, old_logps: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Take into account that another engine than the trainer's networks sampled a rollout.

    Where the two agree to rounding, the old log-probabilities are the sampler's: those of what drew the tokens. Else
    they are the policy's, and tokens are weighted (`vllm_importance_sampling_correction`) by way of their advantages,
    in which the loss is linear. Distance and weights are logged.

    Args:
        trainer: The PPO trainer.
        sampled: What TRL sampled: with `sampling_per_token_logps` `(B, T)` where another engine did.
        old_logps: Log-probabilities of the policy at the rollout in nats, shape `(B, T)`.
        advantages: Advantages, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        Old log-probabilities and advantages, each `(B, T)`.
    """
    sampled_logps = sampled.get("sampling_per_token_logps")
    if sampled_logps is None or not trainer.model.training:
        return old_logps, advantages
    args, accelerator = trainer.args, trainer.accelerator
    distance = (old_logps - sampled_logps).abs().masked_fill(~mask.bool(), 0.0)
    gap, largest = _mean_and_max(accelerator, distance, mask)
    same = gap <= (_ROUNDING_IN_16_BITS if trainer.half_precision else _ROUNDING)
    weights = mask.to(old_logps.dtype)
    if not same and args.vllm_importance_sampling_correction:
        bounds = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        weights = importance_weights(old_logps, sampled_logps, mask, args.vllm_importance_sampling_mode, *bounds)
    mean, highest = _mean_and_max(accelerator, weights, mask)
    _, lowest = _mean_and_max(accelerator, -weights, mask)
    metrics = {
        "sampling_logp_difference/mean": gap,
        "sampling_logp_difference/max": largest,
        "importance_sampling_ratio/min": -lowest,
        "importance_sampling_ratio/mean": mean,
        "importance_sampling_ratio/max": highest,
    }
    for name, value in metrics.items():  # TRL's names
        trainer._metrics["train"][f"sampling/{name}"].append(value)
    return sampled_logps if same else old_logps, advantages * weights


def _mean_and_max(accelerator: Any, values: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and maximum over the tokens of all processes."""
    total, tokens = accelerator.reduce(torch.stack([values.sum(), mask.sum()]), reduction="sum").tolist()
    highest = accelerator.gather(values.masked_fill(~mask.bool(), float("-inf")).max()[None]).max()
    return total / max(tokens, 1.0), highest.nan_to_num(neginf=0.0).item()  # 0 where no token counts


@torch.no_grad()
def sampled_moments(trainer: GRPOTrainer, texts: Texts) -> Tensor:
    """Sums over a few of a process's tokens of `(log p + H)^2` and of its expectation, shape `(2,)`.

    The logits come from the model's own output layer, not from the one that training uses.
    """
    few = texts.select(slice(max(1, len(texts) // _SHARE_OF_ROWS))).trimmed()
    model = trainer.accelerator.unwrap_model(trainer.model)
    rows = few.rows(is_packed(model))
    drawn = few.completion_mask.flatten().nonzero().squeeze(1)[:_TOKENS]
    places = rows.places(few.positions_before).flatten()[drawn]
    with trainer.accelerator.autocast(), states_at(model, places):
        tokens = few.network_input(rows, model.get_input_embeddings())
        outputs = model(**tokens, use_cache=False)
    return second_moments(outputs.logits[0], few.completion_ids.flatten()[drawn], trainer.temperature)


def second_moments(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Sum `(log p + H)^2` of sampled tokens, and what to expect of it where they are drawn from the distributions.

    Args:
        logits: Shape `(n, V)`.
        tokens: The sampled tokens, shape `(n,)`.
        temperature: Divides the logits.

    Returns:
        Both sums in nats squared, shape `(2,)`.

    Example:
        >>> logits = torch.tensor([[0.75, 0.25]]).log()  # log 3 apart: the variance is 3/16 (log 3)^2
        >>> [round(value, 4) for value in second_moments(logits, torch.tensor([1]), 1.0).tolist()]
        [0.6789, 0.2263]
    """
    logps = (logits.float() / temperature).log_softmax(dim=-1)
    probabilities = logps.exp()
    logps = logps.masked_fill(probabilities == 0, 0.0)  # what is never drawn adds 0, not 0 * inf
    surprise = logps - (probabilities * logps).sum(dim=-1, keepdim=True)
    seen = surprise.gather(1, tokens[:, None]).square().sum()
    return torch.stack([seen, (probabilities * surprise.square()).sum()])
