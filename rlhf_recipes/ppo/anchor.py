"""What the policy is compared with: log-probabilities of the old policy and the reference, and the KL between them.

`B` completions, `T` completion tokens, `H` hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_recipes.ppo import checks
from rlhf_recipes.ppo._trl import policy_pass
from rlhf_recipes.ppo.objective import Outputs
from rlhf_recipes.shaping import AdaptiveKLController, FixedKLController, chunked_full_kl, kl_estimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.trainer import PPOTrainer

FIRST_PASS = ("first_logps", "first_entropies", "first_values")  # each (B, T)
_POSITIONS_PER_CHUNK = 512  # for which the exact KL makes logits at a time


def policy_and_reference(trainer: PPOTrainer, batch: dict[str, Any], batch_size: int) -> dict[str, Tensor]:
    """Run old policy and reference over a rollout.

    Args:
        trainer: The trainer.
        batch: TRL's rollout.
        batch_size: Sequences per forward pass.

    Returns:
        `old_per_token_logps`, `old_entropies`, `ref_per_token_logps` and `kl`, the KL to the reference per token (of
        padding too), in nats, each `(B, T)`; with a critic that is a head on the policy, `old_values` `(B, T)`;
        `anchor_hidden` `(B, T, H)` where the loss needs distributions of the anchor; and what `first_pass` names.
    """
    args, mask = trainer.args, batch["completion_mask"]
    full, head = args.kl_estimator == "full", trainer.critic.kind == "head"
    with trainer.roles.use(trainer.reference):
        keep = keep_states if full else None
        ref_logps, _, ref, _ = policy_pass(trainer, trainer.roles.model, batch, batch_size, keep)
    shared = first_pass(trainer)
    with torch.set_grad_enabled(bool(shared)):  # the last one, so that none runs beside what it keeps
        outputs = policy_pass(trainer, trainer.model, batch, batch_size, what_to_keep(trainer, full))
    old_logps = outputs[0].detach()
    old: Any = outputs[2] if outputs[2] is None else outputs[2].detach()
    if trainer.model.training and trainer.state.global_step == trainer._step == 0:
        checks.check_same_distribution(
            old_logps,
            ref_logps,
            mask,
            trainer.half_precision,
            what="the policy must equal its reference",
            cause="The policy's adapter changed after the reference was copied from it, or the base did.",
        )
    found = {
        "old_per_token_logps": old_logps,
        "old_entropies": outputs[1].detach(),
        "ref_per_token_logps": ref_logps,
    }
    found |= dict(zip(shared, outputs[:3], strict=False))
    if args.kl_estimator != "full":
        values = {"old_values": old} if old is not None else {}
        return {**found, **values, "kl": kl_estimate(old_logps, ref_logps, args.kl_estimator)}
    if head:
        found["old_values"] = trainer.critic.values(old)
    if args.kl_placement == "loss":
        found["anchor_hidden"] = old if args.kl_anchor == "old" else ref
    return {**found, "kl": exact_kl(trainer, old, ref, mask)}


def first_pass(trainer: PPOTrainer) -> tuple[str, ...]:
    """What a rollout keeps of the old policy's pass, with its graph, because it is the first update's too.

    A rollout of one micro-batch is first trained on with the tokens and the weights that it was scored with. A pass
    of its own is made in the very first update, where the two are compared, and with several processes, whose
    gradients go by a wrapper around the policy.
    """
    args = trainer.args
    alone = args.micro_batches_per_rollout == trainer.accelerator.num_processes == 1
    more = args.kl_estimator == "full" or trainer.aux_loss_enabled  # than what is kept
    if not (alone and trainer.model.training and trainer._step > 0 and not more):
        return ()
    return FIRST_PASS if trainer.critic.kind == "head" else FIRST_PASS[:2]


def keep_states(states: Tensor) -> Tensor:
    """For `policy_pass`: keep the states `(B, T, H)` themselves."""
    return states


def what_to_keep(trainer: PPOTrainer, full: bool) -> Callable[[Tensor], Tensor] | None:
    """What a pass of the policy keeps for others: states for an exact KL, else the values of a head, else nothing."""
    if full:
        return keep_states
    return trainer.critic.values if trainer.critic.kind == "head" else None


def policy_outputs(trainer: PPOTrainer, model: Any, inputs: dict[str, Any]) -> Outputs:
    """Run the policy on a micro-batch, with gradients, unless the rollout kept that of the old one."""
    if "first_logps" in inputs:
        return Outputs(*(inputs.pop(name, None) for name in FIRST_PASS))
    args = trainer.args
    full = args.kl_placement == "loss" and args.kl_estimator == "full"
    found = policy_pass(trainer, model, inputs, read=what_to_keep(trainer, full), router_loss=trainer.aux_loss_enabled)
    if not full:
        return Outputs(found.logps, found.entropies, found.kept, router_loss=found.router_loss)
    values = trainer.critic.values(found.kept) if trainer.critic.kind == "head" else None
    mask, to_old = inputs["completion_mask"], args.kl_anchor == "old"
    kl = exact_kl(trainer, found.kept, inputs["anchor_hidden"], mask, to_old)
    return Outputs(found.logps, found.entropies, values, kl, found.router_loss)


def exact_kl(trainer: PPOTrainer, hidden: Tensor, anchor_hidden: Tensor, mask: Tensor, to_old: bool = False) -> Tensor:
    """Exact KL per token `(B, T)`, 0 on padding, between the distributions that hidden states `(B, T, H)` give.

    Args:
        trainer: The trainer, whose policy gave `hidden`.
        hidden: The policy's states before each token.
        anchor_hidden: The anchor's.
        mask: 1 where a token counts.
        to_old: KL(old policy || policy) in place of KL(policy || reference).
    """
    head = trainer.model.get_output_embeddings()

    def reference_head(states: Tensor) -> Tensor:
        with trainer.roles.use(trainer.reference):  # an adapter may bring an output layer of its own
            logits: Tensor = trainer.roles.model.get_output_embeddings()(states)
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


def make_kl_controller(args: PPOConfig) -> FixedKLController | AdaptiveKLController:
    """The controller of the KL coefficient that the configuration asks for."""
    if args.kl_controller == "adaptive":
        return AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
    return FixedKLController(args.kl_coef)
