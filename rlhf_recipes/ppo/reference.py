"""The frozen reference: its log-probabilities, and the exact KL of the policy to it, or to the old policy.

`B` completions, `T` completion tokens, `H` hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from rlhf_recipes.ppo.passes import PolicyPass, keep_states, policy_pass
from rlhf_recipes.shaping import chunked_full_kl

if TYPE_CHECKING:
    from rlhf_recipes.models.roles import Roles
    from rlhf_recipes.models.rows import Texts

_POSITIONS_PER_CHUNK = 512  # for which the exact KL makes logits at a time


@torch.no_grad()
def reference_pass(
    trainer: GRPOTrainer,
    roles: Roles,
    reference: str | None,
    texts: Texts,
    batch_size: int | None = None,
    keep: bool = False,
) -> PolicyPass:
    """Compute the reference's log-probabilities of completions.

    Args:
        trainer: The trainer whose engine is used.
        roles: The roles on the shared base.
        reference: The role of the reference: a frozen copy of the policy's adapter, or `None` for the bare base.
        texts: Prompts and completions.
        batch_size: Sequences per forward pass; all at once by default.
        keep: Whether to keep the last hidden states before each token, `(B, T, H)`.
    """
    with roles.use(reference):
        return policy_pass(trainer, roles.model, texts, batch_size, keep_states if keep else None)


def exact_kl(
    trainer: GRPOTrainer,
    roles: Roles,
    reference: str | None,
    hidden: Tensor,
    anchor_hidden: Tensor,
    mask: Tensor,
    to_old: bool = False,
) -> Tensor:
    """Exact KL per token `(B, T)`, 0 on padding, between the distributions that last hidden states give.

    Args:
        trainer: The trainer, whose policy gave `hidden`.
        roles: The roles on the shared base.
        reference: The role of the reference.
        hidden: The policy's states before each token, shape `(B, T, H)`.
        anchor_hidden: The reference's, or the old policy's, shape `(B, T, H)`.
        mask: 1 where a token counts, shape `(B, T)`.
        to_old: KL(old policy || policy) in place of KL(policy || reference).
    """
    policy: Any = trainer.model
    head = policy.get_output_embeddings()

    def reference_head(states: Tensor) -> Tensor:
        with roles.use(reference):  # an adapter may bring an output layer of its own
            logits: Tensor = roles.model.get_output_embeddings()(states)
        return logits

    counts = mask.bool()
    with trainer.accelerator.autocast():
        kl = chunked_full_kl(
            hidden[counts],
            anchor_hidden[counts],
            head,
            trainer.temperature,
            _POSITIONS_PER_CHUNK,
            to_old,
            head if to_old else reference_head,
        )
    return kl.new_zeros(mask.shape).masked_scatter(counts, kl)
