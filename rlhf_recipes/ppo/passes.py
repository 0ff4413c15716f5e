"""Run policy and reference: sample completions, and compute their log-probabilities and the KL.

This file and `_trl.py` are the places that call what is inside TRL. `B` completions, `T` completion tokens (padded on
the right), `H` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from rlhf_recipes.models.generation import sample_after
from rlhf_recipes.models.packing import is_packed
from rlhf_recipes.models.quantized import unpacked
from rlhf_recipes.models.rows import Texts, scatter_rows, scatter_tokens
from rlhf_recipes.models.sharding import call_inside, is_sharded
from rlhf_recipes.models.states import states_at, states_given
from rlhf_recipes.shaping import chunked_full_kl

if TYPE_CHECKING:
    from rlhf_recipes.models.image_embeddings import EmbeddedPrompt
    from rlhf_recipes.models.roles import Roles
    from rlhf_recipes.ppo.rollout import Rollout

TILE_VOCABULARY = 32768  # entries that TRL's fused output layer works on at a time
_LOGITS_AT_A_TIME, _FEWEST_TOKENS = 2**19, 64  # on a CPU, whose cache they should stay in
_POSITIONS_PER_CHUNK = 512  # for which the exact KL makes logits at a time


# 1. Sampling
def sample_completions(
    trainer: GRPOTrainer, prompt_ids: list[list[int]], embedded: list[EmbeddedPrompt] | None = None
) -> list[list[int]]:
    """Sample one completion per prompt from the policy: token ids, with the end token where it was sampled.

    Args:
        trainer: The trainer whose engine is used.
        prompt_ids: Token ids of `B` prompts.
        embedded: The same as embeddings, where they have pictures.
    """
    args: Any = trainer.args
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        generation_kwargs=trainer.generation_kwargs,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    ) as model:
        return sample_from(trainer, model, prompt_ids, embedded)


def sample_from(
    trainer: GRPOTrainer, model: Any, prompt_ids: list[list[int]], embedded: list[EmbeddedPrompt] | None = None
) -> list[list[int]]:
    """The same from any model, with the adapter in use."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    args: Any = trainer.args
    packed = is_packed(inner) and not args.generation_kwargs and not args.cache_implementation
    config, ends = trainer.generation_config, trainer.eos_token_ids
    # of a single prompt bitsandbytes reads the 4 bits themselves, and a sharded model's weights are not all here
    alone = len(prompt_ids) == 1 or is_sharded(model)
    with nullcontext() if alone else unpacked(inner):
        return sample_after(model, prompt_ids, config, trainer.temperature, ends, packed, embedded)


# 2. The pass of a policy
@dataclass(frozen=True)
class PolicyPass:
    """What a pass of a policy tells of completions, with gradients where they are on.

    Attributes:
        logps: Log-probabilities of the tokens in nats, shape `(B, T)`; 0 on padding.
        entropies: Entropies of the distributions that they were drawn from, in nats, shape `(B, T)`.
        kept: What `read` kept of the states, `(B, T, ...)`, or `None`.
        router_loss: How unevenly the routers of a mixture of experts use them, of all tokens, a scalar, or `None`.
    """

    logps: Tensor
    entropies: Tensor
    kept: Any = None
    router_loss: Tensor | None = None


def policy_pass(
    trainer: GRPOTrainer,
    model: Any,
    texts: Texts,
    batch_size: int | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
    router_loss: bool = False,
) -> PolicyPass:
    """Compute the log-probability of every completion token, and the entropy where it was sampled.

    They come from TRL's fused output layer, at the sampling temperature, without a tensor of (B, T, V).

    Args:
        trainer: The trainer whose engine is used.
        model: The model to run, possibly wrapped for distributed training.
        texts: Prompts and completions.
        batch_size: Sequences per forward pass; all at once by default.
        read: What to keep of the last hidden states `(1, n, H)` from which the `n` tokens were drawn: `(1, n, ...)`.
        router_loss: Whether to compute the routers' loss, in one pass over all sequences.
    """
    routers = {"output_router_logits": True} if router_loss else {}
    parts: list[tuple[Tensor, list[Tensor]]] = []
    inner = trainer.accelerator.unwrap_model(model)
    for indices, part in texts.by_length(batch_size or len(texts)):
        rows, mask = part.rows(is_packed(inner)), part.completion_mask
        drawn = mask.flatten().nonzero().squeeze(1)
        places = rows.places(part.positions_before).flatten()[drawn]
        labels = part.completion_ids.flatten()[drawn][None]
        size = _tokens_at_a_time(inner, len(drawn))
        with trainer.accelerator.autocast():
            with states_at(inner, places, router_loss, size) as states:
                tokens = part.network_input(rows, inner.get_input_embeddings())
                outputs = model(**tokens, **routers, shift_labels=labels[:, :size], fused_lm_head=True)
            scored = [outputs]
            for given, targets in zip(states[0].split(size, 1)[1:], labels.split(size, 1)[1:], strict=True):
                with states_given(inner, given):
                    scored.append(inner(shift_labels=targets, fused_lm_head=True))
            more = [] if read is None else [read(states[0])]
        logps, entropies = (
            torch.cat([getattr(each, name) for each in scored], 1) for name in ("log_probs", "entropy")
        )
        numbers = [values[0] for values in (logps, entropies, *more)]
        parts.append((indices, [scatter_tokens(each, drawn, *mask.shape) for each in numbers]))
    columns = zip(*(values for _, values in parts), strict=True)
    indices_of_parts, length = [indices for indices, _ in parts], texts.completion_ids.size(1)
    joined = [scatter_rows(list(zip(indices_of_parts, column, strict=True)), length) for column in columns]
    kept = joined[2] if read is not None else None
    return PolicyPass(joined[0], joined[1], kept, outputs.aux_loss if router_loss else None)


def _tokens_at_a_time(model: Any, count: int) -> int:
    """How many of `count` tokens the output layer scores at a time.

    TRL's fused one works on tiles of up to 4,096 tokens: on a GPU by a kernel, in place, on a CPU by some ten
    operations that each make another tile.
    """
    weight = model.get_output_embeddings().weight
    if weight.device.type != "cpu" or is_sharded(model):
        return max(count, 1)
    return max(_LOGITS_AT_A_TIME // min(len(weight), TILE_VOCABULARY), _FEWEST_TOKENS)


def keep_states(states: Tensor) -> Tensor:
    """For `policy_pass`: keep the states themselves."""
    return states


# 3. The frozen reference, and the exact KL to it or to the old policy.
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

    counts, anchor_head = mask.bool(), head if to_old else reference_head
    states = (hidden[counts], anchor_hidden[counts])
    temperature, size = trainer.temperature, _POSITIONS_PER_CHUNK
    with trainer.accelerator.autocast():
        kl = call_inside(policy, lambda: chunked_full_kl(*states, head, temperature, size, to_old, anchor_head))
    return kl.new_zeros(mask.shape).masked_scatter(counts, kl)


class KeptPass:
    """The old policy's pass over a rollout of one micro-batch, kept with its graph for the first update.

    That update asks for the pass of the same texts with the same weights. Without the kept one it computes the pass
    again, with the same numbers: it is a cache, which saves one pass in each rollout.
    """

    def __init__(self) -> None:
        self._outputs: PolicyPass | None = None

    def keep(self, outputs: PolicyPass | None) -> None:
        """Keep a pass, or none, until it is taken or another one is kept."""
        self._outputs = outputs

    def take(self, batch: Rollout) -> PolicyPass | None:
        """Hand the pass over, once, with its rows in the order of a batch."""
        kept, self._outputs = self._outputs, None
        if kept is None:
            return None
        rows, length = batch.row, batch.completion_mask.size(1)
        values = None if kept.kept is None else kept.kept[rows, :length]
        return PolicyPass(kept.logps[rows, :length], kept.entropies[rows, :length], values)
