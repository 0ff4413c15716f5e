"""Whether the completions of a rollout are the policy's own samples, by the moments of their log-probabilities.

`B` completions, `T` completion tokens, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_recipes.models.packing import is_packed
from rlhf_recipes.models.states import states_at
from rlhf_recipes.ppo.functional import masked_mean
from rlhf_recipes.ppo.padding import join_columns, positions_before, sequences, text_rows, trim

if TYPE_CHECKING:
    from rlhf_recipes.ppo.trainer import PPOTrainer

_TOKENS = 128  # for which the second moment takes logits over the whole vocabulary
_SHARE_OF_ROWS = 8  # one row in so many is enough for it


@torch.no_grad()
def off_policy_metrics(
    trainer: PPOTrainer, batch: dict[str, Any], logps: Tensor, entropies: Tensor
) -> dict[str, Tensor]:
    """Hold the sampled tokens against the distribution that they should come from.

    For tokens drawn from a distribution with entropy H the mean of `log p + H` is 0, and the mean of its square is the
    variance of the log-probabilities under that distribution. Sampling that cuts or favours tokens moves the first;
    what keeps tokens of typical probability (`typical_p`) moves only the second.

    Args:
        trainer: The trainer.
        batch: `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, T).
        logps: Log-probabilities of the completion tokens in nats, shape `(B, T)`.
        entropies: Entropies of the distributions of these tokens in nats, shape `(B, T)`.

    Returns:
        `ppo/off_policy_gap`, the mean of `log p + H` over all tokens, in nats per token; `ppo/off_policy_spread`, the
        mean of its square over some of them, divided by its expectation: 1 for the policy's own samples.
    """
    everything = trainer._of_all_processes
    gap = masked_mean(*(everything(each) for each in (logps + entropies, batch["completion_mask"])))
    moments: Tensor = trainer.accelerator.reduce(_second_moments(trainer, batch), reduction="sum")
    seen, expected = moments.unbind()
    spread = torch.where(expected > 1e-9 * trainer.accelerator.num_processes, seen / expected, 1.0)
    return {"ppo/off_policy_gap": gap, "ppo/off_policy_spread": spread}


def _second_moments(trainer: PPOTrainer, batch: dict[str, Any]) -> Tensor:
    """Sums over a few tokens of `(log p + H)^2` and of its expectation, shape `(2,)`.

    The logits come from the model's own output layer, not from the one that training uses.
    """
    few = sequences(batch)
    few = trim({name: value[: max(1, len(value) // _SHARE_OF_ROWS)] for name, value in few.items()})
    model = trainer.accelerator.unwrap_model(trainer.model)
    texts = text_rows(few, is_packed(model))
    drawn = few["completion_mask"].flatten().nonzero().squeeze(1)[:_TOKENS]
    places = texts.places(positions_before(few)).flatten()[drawn]
    with trainer.accelerator.autocast(), states_at(model, places):
        outputs = model(input_ids=texts.join(join_columns(few, "ids")), **texts.arguments, use_cache=False)
    return second_moments(outputs.logits[0, :-1], few["completion_ids"].flatten()[drawn], trainer.temperature)


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
