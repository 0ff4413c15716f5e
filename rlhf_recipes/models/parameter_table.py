"""Table of what a run holds in memory before its first step: roles, their parameters, and bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.models.roles import CRITIC, CRITIC_MODEL, FROZEN, REFERENCE, Roles

_MOMENTS = 2  # of Adam, in the parameters' own format; other optimizers keep less


def parameter_table(owners: dict[str, list[Any]]) -> str:
    """Lay out roles, parameters and memory as text: a line for each role, in the given order, and their sum.

    Memory is that of the weights; gradients and Adam's two moments have a line of their own. What activations take is
    not in it.

    Args:
        owners: By role, its parameters.

    Example:
        >>> layer = nn.Linear(1024, 512, bias=False)
        >>> print(parameter_table({"policy": list(layer.parameters())}))
        role             parameters  trained  MiB
        policy              524,288  524,288  2.0
        gradients, Adam                       6.0
        together            524,288  524,288  8.0
        <BLANKLINE>
    """
    rows = [("role", "parameters", "trained", "MiB")]
    rows += [_row(owner, parameters) for owner, parameters in owners.items()]
    parameters_of_all = [p for parameters in owners.values() for p in parameters]
    states = sum((1 + _MOMENTS) * _bytes([p]) for p in parameters_of_all if p.requires_grad)
    rows.append(("gradients, Adam", "", "", f"{states / 2**20:,.1f}"))
    rows.append(_row("together", parameters_of_all, states))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3))])
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def stage_table(model: nn.Module, role: str) -> str:
    """The table of a stage that trains one role: what is frozen is the base.

    Args:
        model: The model, with its adapter if it has one.
        role: Name of what is trained.
    """
    parameters = list(model.parameters())
    frozen, trained = ([p for p in parameters if p.requires_grad == trainable] for trainable in (False, True))
    return parameter_table({"base": frozen, role: trained} if frozen else {role: trained})


def roles_table(policy: nn.Module, roles: Roles, reward_models: dict[str, nn.Module]) -> str:
    """The table of a PPO run: a line for what its roles share, one for each role, and one for each model beside them.

    What activations take is not in it: `rlhf-recipes plan` computes that.

    Args:
        policy: The policy, with everything that is trained in its module tree.
        roles: The roles on the shared base.
        reward_models: By reward, models of their own.
    """
    owners: dict[str, list[Tensor]] = {}
    for name, parameter in policy.named_parameters():
        owners.setdefault(_owner(name, policy, roles), []).append(parameter)
    owners |= {f"{reward} (own model)": list(model.parameters()) for reward, model in reward_models.items()}
    return parameter_table({owner: owners[owner] for owner in sorted(owners, key=_order)})


def _owner(name: str, policy: nn.Module, roles: Roles) -> str:
    """Return the role that a parameter belongs to: its adapter, its head, or what all share."""
    if name.startswith(f"{CRITIC_MODEL}."):
        return CRITIC
    parts = set(name.split("."))
    names = {*roles.model.peft_config, *roles.heads}
    owners = [role for role in names if role in parts and ("lora_" in name or "heads" in parts)]
    if policy is not roles.model:
        frozen = name.startswith(f"{FROZEN}.")
        return owners[0] if owners and owners[0] != POLICY else "reference" if frozen else "policy"
    return _LABELS.get(owners[0], owners[0]) if owners else "base, shared"


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
