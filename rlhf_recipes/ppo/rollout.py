"""The record of a rollout, from its sampling to its last update, and the layout of its rows in micro-batches.

`B` completions, `P` prompt tokens (padded on the left), `T` completion tokens (padded on the right), `H` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from rlhf_recipes.models.rows import OF_COMPLETION, OF_PROMPT, Texts

Batch = dict[str, Tensor]  # a rollout, or a part of it, as TRL shuffles, splits and buffers it


@dataclass(frozen=True)
class Rollout(Texts):
    """A rollout, or a micro-batch of it: texts, what the frozen networks said of them, and what PPO learns from.

    None of its tensors carries a gradient. A checkpoint holds the same fields.

    Attributes:
        old_per_token_logps: Log-probabilities of the policy that sampled, in nats, shape `(B, T)`.
        ref_per_token_logps: Log-probabilities of the reference in nats, shape `(B, T)`.
        old_values: The critic's values before each token at the rollout, in reward units, shape `(B, T)`.
        value_mask: 1 where the critic learns, shape `(B, T)`.
        advantages: Advantages, whitened if the configuration says so, weighted where vLLM sampled, shape `(B, T)`.
        returns: What the critic learns, in reward units, shape `(B, T)`.
        items_in_rollout: Tokens or completions over which the loss of the rollout is averaged, of all processes.
        row: Number of each completion within the rollout that was sampled, shape `(B,)`.
        anchor_hidden: Last hidden states of the policy that an exact KL in the loss is to, shape `(B, T, H)`.
        prompt_below: With `critic_layers`: states that enter the critic's trained layers, shape `(B, P, H)`.
        completion_below: The same of the completions, shape `(B, T, H)`.
    """

    old_per_token_logps: Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    ref_per_token_logps: Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    old_values: Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    value_mask: Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    advantages: Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    returns: Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    items_in_rollout: Tensor = field(kw_only=True)
    row: Tensor | None = field(default=None, kw_only=True)
    anchor_hidden: Tensor | None = field(default=None, metadata=OF_COMPLETION, kw_only=True)
    prompt_below: Tensor | None = field(default=None, metadata=OF_PROMPT, kw_only=True)
    completion_below: Tensor | None = field(default=None, metadata=OF_COMPLETION, kw_only=True)

    @classmethod
    def from_batch(cls, batch: Batch) -> Rollout:
        """Read what TRL hands to the loss."""
        return cls(**{each.name: batch[each.name] for each in fields(cls) if each.name in batch})

    def to_batch(self) -> Batch:
        """The form in which TRL shuffles, splits and buffers it."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in tensors.items() if value is not None}


def texts_of(batch: Batch) -> Texts:
    """Read prompts and completions from what TRL samples."""
    return Texts(**{each.name: batch[each.name] for each in fields(Texts) if each.name in batch})


def join(micro_batches: list[Batch]) -> Batch:
    """Concatenate micro-batches of a rollout; numbers about the rollout are the same in all."""
    first = micro_batches[0]
    return {
        name: value if value.dim() == 0 else torch.cat([batch[name] for batch in micro_batches])
        for name, value in first.items()
    }


def reshuffle(micro_batches: list[Batch]) -> list[Batch]:
    """Draw the micro-batches of a further epoch from the rows of all."""
    shuffled: Any = shuffle_sequence_dict(join(micro_batches))  # type: ignore[arg-type]
    return split_tensor_dict(shuffled, len(micro_batches))  # type: ignore[return-value]


def sort_within_steps(micro_batches: list[Batch], per_step: int) -> list[Batch]:
    """Sort the rows of each optimizer step's micro-batches by length, so that they are padded less.

    Which rows make up a step stays as it is, so that the step is the same.

    Args:
        micro_batches: The micro-batches of a rollout, of one size, in their order.
        per_step: How many of them are accumulated to one optimizer step.

    Returns:
        As many micro-batches of the same size.
    """
    sorted_batches: list[Batch] = []
    for start in range(0, len(micro_batches), per_step):
        step = micro_batches[start : start + per_step]
        rows = join(step)
        for part in texts_of(rows).lengths.argsort(stable=True).chunk(len(step)):
            sorted_batches.append({name: value if value.dim() == 0 else value[part] for name, value in rows.items()})
    return sorted_batches
