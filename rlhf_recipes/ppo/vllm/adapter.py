"""The policy's adapter as vLLM gets it: what vLLM would drop in silence is refused, and each version has a name."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict

from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.models.plain_lora import changes_base
from rlhf_recipes.ppo.vllm.engine import LARGEST_RANKS, Adapter

if TYPE_CHECKING:
    from rlhf_recipes.models.roles import Roles

# Fields of a LoRA configuration that vLLM heeds, that the names of the weights tell, or that compute nothing.
_HEEDED = frozenset(
    "r lora_alpha use_rslora target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out "
    "lora_dropout init_lora_weights task_type peft_type peft_version inference_mode base_model_name_or_path revision "
    "auto_mapping runtime_config megatron_core qalora_group_size".split()
)
_ONE_RANK = "vLLM reads `r` and `lora_alpha` alone, and would scale those layers wrongly: give all layers the same"
_WEIGHTS_ALONE = "vLLM takes LoRA weights alone: leave it out"
_INSTEAD = {
    "rank_pattern": _ONE_RANK,
    "alpha_pattern": _ONE_RANK,
    "use_dora": "vLLM has no DoRA: set it to false",
    "bias": "vLLM takes LoRA weights alone: set it to 'none'",
    "lora_bias": _WEIGHTS_ALONE,
    "modules_to_save": _WEIGHTS_ALONE,
    "trainable_token_indices": _WEIGHTS_ALONE,
    "alora_invocation_tokens": "vLLM would use the adapter on all tokens: leave it out",
}


def check_adapter(config: Any) -> None:
    """Refuse an adapter of which vLLM would leave something out, or which is no LoRA.

    Args:
        config: PEFT's configuration of the policy.

    Raises:
        ValueError: With the field and the fix.

    Example:
        >>> check_adapter(LoraConfig(r=8, use_rslora=True))
        >>> check_adapter(LoraConfig(rank_pattern={"q_proj": 4}))
        Traceback (most recent call last):
        ...
        ValueError: With `use_vllm` the policy's adapter cannot have `rank_pattern` {'q_proj': 4}: vLLM reads `r`...
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"With `use_vllm` the policy must be a LoRA adapter, and its configuration is a {type(config).__name__}. "
            "Give `peft_config=LoraConfig(task_type='CAUSAL_LM')` or the folder of a LoRA adapter, or remove "
            "`use_vllm`."
        )
    if changes_base(config):
        raise ValueError(
            f"With `use_vllm` the adapter cannot start with `init_lora_weights: {config.init_lora_weights}`, which "
            "takes a part of the base out of it: vLLM's base would keep it. Set it to true."
        )
    if config.r > LARGEST_RANKS[-1]:
        raise ValueError(
            f"vLLM loads adapters up to a rank of {LARGEST_RANKS[-1]}, and the policy's has `r: {config.r}`. Lower "
            "`lora_r`, or remove `use_vllm`."
        )
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name not in _HEEDED and value and value != _default(each):
            instead = _INSTEAD.get(each.name, "vLLM does not know it: leave it out")
            raise ValueError(
                f"With `use_vllm` the policy's adapter cannot have `{each.name}` {value!r}: {instead}, or remove "
                "`use_vllm`."
            )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def version_of(roles: Roles, parent: Path) -> Adapter:
    """The version of the policy's adapter that its weights are now.

    Args:
        roles: The roles.
        parent: Folder in which versions are saved.
    """
    weights = get_peft_model_state_dict(roles.model, adapter_name=POLICY)
    config = json.dumps(roles.model.peft_config[POLICY].to_dict(), default=_plain, sort_keys=True)
    digest = hashlib.sha256(config.encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    name = f"policy-{digest.hexdigest()[:16]}"
    return Adapter(name, (parent / name).absolute())


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set) else str(value)


def save_version(roles: Roles, adapter: Adapter) -> None:
    """Save the policy's adapter in the folder of its version, whole or not at all."""
    if adapter.folder.is_dir():
        return
    unfinished = adapter.folder.with_name(f"{adapter.folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    roles.save_policy(unfinished)
    unfinished.rename(adapter.folder)
