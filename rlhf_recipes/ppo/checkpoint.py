"""The part of a checkpoint that TRL's does not hold: where in a rollout the run is, and the state of PPO's controls.

A run that resumes in the middle of the epochs over a rollout continues with that rollout, not with a new one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_recipes.data.chat_templates import encode_prompt
from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.models.resumed import check_same_adapter, fingerprint
from rlhf_recipes.models.roles import CRITIC_MODEL, FROZEN, Roles
from rlhf_recipes.models.trained_on import ROWS, log_probs, save_trained_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from rlhf_recipes.ppo.critics import Critic

_STATE = "ppo_state.json"
_OF_AN_ADAPTER = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
_OF_AN_ADAPTER |= {"modules_to_save"}
_NOT_POLICY = (FROZEN, CRITIC_MODEL)  # submodules of a policy that are other roles


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


def reference_fingerprint(policy: Any, roles: Roles, reference: str | None) -> str | None:
    """What tells the reference apart from others; `None` for the bare base of an adapter, which has a name."""
    if policy is not roles.model:
        named = roles.model.get_base_model().named_parameters()
        return fingerprint(value for name, value in named if not _OF_AN_ADAPTER.intersection(name.split(".")))
    if reference is None:
        return None
    weights = get_peft_model_state_dict(roles.model, adapter_name=reference)
    return fingerprint(weights[name] for name in sorted(weights))


def policy_alone(policy: Any) -> Any:
    """A fully trained policy without the other roles that its module tree carries: the same weights, not a copy."""
    alone = copy.copy(policy)
    alone.__dict__.pop("forward", None)  # TRL's, which would compute with these weights in a deep copy too
    alone.__dict__["_modules"] = {name: child for name, child in policy.named_children() if name not in _NOT_POLICY}
    return alone


def save_models(
    folder: Path,
    policy: Any,
    roles: Roles,
    critic: Critic,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
) -> None:
    """Save what was trained: the policy in the folder itself, and the critic in `critic/`.

    Args:
        folder: The folder.
        policy: The policy.
        roles: The roles.
        critic: The critic.
        tokenizer: The policy's tokenizer.
        prompts: Prompts of the run, a few of which are kept with what the adapter says of them (`trained_on.json`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if policy is not roles.model:
        policy_alone(policy).save_pretrained(str(folder))
    else:
        roles.save_policy(folder)
        if len(prompts):
            save_trained_on(folder, policy, [encode_prompt(tokenizer, prompt) for prompt in prompts[:ROWS]], log_probs)
    critic.save(folder / "critic")
    tokenizer.save_pretrained(folder)


def load_models(folder: str | Path, policy: Any, roles: Roles, critic: Critic) -> None:
    """Read what `save_models` wrote."""
    if policy is not roles.model:
        saved = type(policy).from_pretrained(str(folder), use_safetensors=True, dtype=policy.dtype)
        policy_alone(policy).load_state_dict(saved.state_dict())
    else:
        roles.load(folder, POLICY, POLICY)
    critic.load(Path(folder) / "critic")


def check_models(
    folder: str, state: dict[str, Any], policy: Any, roles: Roles, critic: Critic, reference: str | None
) -> None:
    """Refuse another adapter, base, critic or reference than those that a checkpoint was made with.

    Args:
        folder: Folder of the checkpoint.
        state: What `load_ppo_state` read there.
        policy: The policy.
        roles: The roles.
        critic: The critic.
        reference: The role of the reference.

    Raises:
        ValueError: With what differs.
    """
    check_same_adapter(folder, policy, what="this run's policy")
    critic.check_saved(Path(folder) / "critic")
    ours = reference_fingerprint(policy, roles, reference)
    if state.get("reference", ours) != ours:  # a checkpoint of an earlier version says nothing of it
        raise ValueError(
            f"The run of {folder!r} started from another `model` than this one, which is its reference: the KL would "
            "be that to another policy. Resume with the `model` of that run."
        )
