"""What a PPO run holds in memory before its first step: one table of the roles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.models.roles import CRITIC, REFERENCE

if TYPE_CHECKING:
    from rlhf_recipes.ppo.engine import PPOEngine

_MOMENTS = 2  # of Adam, in the parameters' own format; other optimizers keep less


def roles_table(trainer: PPOEngine) -> str:
    """Lay out roles, parameters and memory as text: a line for what roles share, and one for each role.

    Memory is that of the weights; gradients and Adam's two moments have a line of their own. What activations take is
    not in it: `rlhf-recipes plan` computes that.
    """
    owners: dict[str, list[Tensor]] = {}
    for name, parameter in trainer.model.named_parameters():
        owners.setdefault(_owner(name, trainer), []).append(parameter)
    for index, function in enumerate(trainer.reward_funcs):
        model = function if isinstance(function, nn.Module) else getattr(function, "model", None)
        if isinstance(model, nn.Module):
            owners[f"reward_{index} (own model)"] = list(model.parameters())
    rows = [("role", "parameters", "trained", "MiB")]
    rows += [_row(owner, owners[owner]) for owner in sorted(owners, key=_order)]
    trained = [p for parameters in owners.values() for p in parameters if p.requires_grad]
    states = sum((1 + _MOMENTS) * _bytes([p]) for p in trained)
    rows.append(("gradients, Adam", "", "", f"{states / 2**20:,.1f}"))
    everything = [p for parameters in owners.values() for p in parameters]
    rows.append(_row("together", everything, states))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3))])
        for row in rows
    ]
    return "\n".join(lines) + "\n"


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


def _row(owner: str, parameters: list[Any], more: float = 0.0) -> tuple[str, str, str, str]:
    trained = sum(_numbers(p) for p in parameters if p.requires_grad)
    memory = _bytes(parameters) + more
    return owner, f"{sum(map(_numbers, parameters)):,}", f"{trained:,}", f"{memory / 2**20:,.1f}"


def _numbers(parameter: Any) -> int:
    """Numbers that a parameter stands for: in 4 bits two in a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
    return int(shape.numel())


def _bytes(parameters: list[Any]) -> int:
    """Bytes of parameters, with the constants of quantized ones."""
    total = 0
    for parameter in parameters:
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(
                t.numel() * t.element_size() for t in state.as_dict(packed=False).values() if isinstance(t, Tensor)
            )
    return total
