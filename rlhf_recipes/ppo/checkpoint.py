"""The part of a checkpoint that TRL's does not hold: where in a rollout the run is, and the state of PPO's controls.

A run that resumes in the middle of the epochs over a rollout continues with that rollout, not with a new one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_recipes.models.resumed import fingerprint
from rlhf_recipes.ppo.critic import MODEL
from rlhf_recipes.ppo.setup import FROZEN

_STATE = "ppo_state.json"
_OF_AN_ADAPTER = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
_OF_AN_ADAPTER |= {"modules_to_save"}
_NOT_POLICY = (FROZEN, MODEL)  # submodules of a policy that are other roles


def save_ppo_state(
    folder: str | Path, state: dict[str, Any], rollout: list[dict[str, Tensor]] | None, rank: int
) -> None:
    """Write the state of a run into a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        state: What JSON can hold; the main process's is written.
        rollout: The micro-batches of this process's current rollout, or `None` between two rollouts.
        rank: Number of this process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (folder / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    if rollout is not None:
        tensors = {f"{number}.{name}": value for number, batch in enumerate(rollout) for name, value in batch.items()}
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, _rollout(folder, rank))


def load_ppo_state(
    folder: str | Path, rank: int, device: Any
) -> tuple[dict[str, Any], list[dict[str, Tensor]] | None]:
    """Read what `save_ppo_state` wrote.

    Raises:
        FileNotFoundError: If the checkpoint is none of PPO's.
    """
    folder = Path(folder)
    if not (folder / _STATE).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {_STATE}: it is not a complete checkpoint of a PPO run. With `save_only_model` "
            "it lacks optimizer, schedule and rollout. Give the folder as `model` to start a new run from its policy."
        )
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if not _rollout(folder, rank).is_file():
        return state, None
    batches: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(_rollout(folder, rank)).items():
        number, _, key = name.partition(".")
        batches.setdefault(int(number), {})[key] = value.to(device)
    return state, [batches[number] for number in sorted(batches)]


def _rollout(folder: Path, rank: int) -> Path:
    return folder / f"rollout_{rank}.safetensors"


def reference_fingerprint(trainer: Any) -> str | None:
    """What tells the reference apart from others; `None` for the bare base of an adapter, which has a name."""
    if trainer.trains_whole_model:
        named = trainer.roles.model.get_base_model().named_parameters()
        return fingerprint(value for name, value in named if not _OF_AN_ADAPTER.intersection(name.split(".")))
    if trainer.reference is None:
        return None
    weights = get_peft_model_state_dict(trainer.roles.model, adapter_name=trainer.reference)
    return fingerprint(weights[name] for name in sorted(weights))


def policy_alone(policy: Any) -> Any:
    """A fully trained policy without the other roles that its module tree carries: the same weights, not a copy."""
    alone = copy.copy(policy)
    alone.__dict__.pop("forward", None)  # TRL's, which would compute with these weights in a deep copy too
    alone.__dict__["_modules"] = {name: child for name, child in policy.named_children() if name not in _NOT_POLICY}
    return alone


def save_whole_model(policy: Any, folder: str | Path) -> None:
    """Save a policy that is trained without an adapter."""
    policy_alone(policy).save_pretrained(str(folder))


def load_whole_model(policy: Any, folder: str | Path) -> None:
    """Read what `save_whole_model` wrote."""
    saved = type(policy).from_pretrained(str(folder), use_safetensors=True, dtype=policy.dtype)
    policy_alone(policy).load_state_dict(saved.state_dict())
