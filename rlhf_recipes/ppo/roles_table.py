"""What a PPO run holds in memory before its first step: one table of the roles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.models.parameter_table import parameter_table
from rlhf_recipes.models.roles import CRITIC, REFERENCE

if TYPE_CHECKING:
    from rlhf_recipes.ppo.engine import PPOEngine


def roles_table(trainer: PPOEngine) -> str:
    """Lay out roles, parameters and memory as text: a line for what roles share, and one for each role.

    What activations take is not in it: `rlhf-recipes plan` computes that.
    """
    owners: dict[str, list[Tensor]] = {}
    for name, parameter in trainer.model.named_parameters():
        owners.setdefault(_owner(name, trainer), []).append(parameter)
    for index, function in enumerate(trainer.reward_funcs):
        model = function if isinstance(function, nn.Module) else getattr(function, "model", None)
        if isinstance(model, nn.Module):
            owners[f"reward_{index} (own model)"] = list(model.parameters())
    return parameter_table({owner: owners[owner] for owner in sorted(owners, key=_order)})


def _owner(name: str, trainer: PPOEngine) -> str:
    """Which role a parameter belongs to: its adapter, its head, or what all share."""
    from rlhf_recipes.ppo.critic import MODEL
    from rlhf_recipes.ppo.setup import FROZEN

    if name.startswith(f"{MODEL}."):
        return CRITIC
    parts = set(name.split("."))
    names: Iterable[str] = {*trainer.roles.model.peft_config, *trainer.roles.heads}
    roles = [role for role in names if role in parts and ("lora_" in name or "heads" in parts)]
    if trainer.trains_whole_model:
        frozen = name.startswith(f"{FROZEN}.")
        return roles[0] if roles and roles[0] != POLICY else "reference" if frozen else "policy"
    return _LABELS.get(roles[0], roles[0]) if roles else "base, shared"


_LABELS = {POLICY: "policy", REFERENCE: "reference"}


def _order(owner: str) -> tuple[int, str]:
    first = ("base, shared", "policy", "reference", CRITIC)
    return (first.index(owner) if owner in first else len(first), owner)
