"""Build the policy and the rewards of a PPO run from what the user gives: paths, models, adapters, functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.models.loading import load_causal_lm, load_sequence_classifier
from rlhf_recipes.models.roles import POLICY, REFERENCE, Roles, is_adapter, load_policy
from rlhf_recipes.rewards import AdapterReward, MissingEosPenalty, checked

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from rlhf_recipes.ppo.config import PPOConfig


def build_policy(
    model: Any, args: PPOConfig, quantization_config: BitsAndBytesConfig | None, peft_config: PeftConfig | None
) -> tuple[Roles, str | None]:
    """Load the base if needed, put the policy's adapter on it, and the reference beside it.

    Args:
        model: Folder of a trained adapter, `PeftModel`, or base model (path or instance).
        args: The configuration; `model_init_kwargs` are used when `model` is a path.
        quantization_config: Quantization of a base that is loaded here.
        peft_config: Configuration of a fresh adapter.

    Returns:
        The roles, and the role of the reference: a frozen copy of a trained adapter, or `None` for the bare base.

    Raises:
        ValueError: If `model` and `peft_config` do not fit together.
        TypeError: If `model` is none of these.
    """
    init_kwargs: Any = args.model_init_kwargs or {}
    options = {"quantization_config": quantization_config, **init_kwargs}
    if isinstance(model, str | Path) and is_adapter(model):
        base = PeftConfig.from_pretrained(str(model)).base_model_name_or_path
        model = load_policy(load_causal_lm(str(base), **options), model)
    elif isinstance(model, str | Path):
        model = load_causal_lm(str(model), **options)

    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("The model already has an adapter, which is trained further. Leave `peft_config` out.")
        if POLICY not in model.peft_config:
            raise ValueError(f"The policy's adapter must be named {POLICY!r}, got {list(model.peft_config)}.")
        roles = Roles(model)
        roles.add_copy(REFERENCE, source=POLICY)
        return roles, REFERENCE
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a path, a `PreTrainedModel` or a `PeftModel`, got {type(model).__name__}.")
    if peft_config is None:
        raise ValueError(
            "PPOTrainer trains adapters on a base that policy, reference, critic and reward share. Give `peft_config` "
            "(for example `LoraConfig(task_type='CAUSAL_LM')`), or the folder of a trained adapter as `model`."
        )
    return Roles(get_peft_model(model, peft_config)), None


def build_rewards(
    reward_funcs: Any, roles: Roles, tokenizer: PreTrainedTokenizerBase, args: PPOConfig
) -> tuple[list[Any], list[float]]:
    """Turn everything that can be a reward into what TRL's engine calls.

    Args:
        reward_funcs: One or a list of functions, models, paths of models, and folders of reward adapters.
        roles: The roles; reward adapters are added to them.
        tokenizer: The policy's tokenizer.
        args: The configuration (`reward_weights`, `missing_eos_penalty`).

    Returns:
        The functions and models, and their weights.

    Raises:
        ValueError: If there is no reward, or the weights are not one per reward.
    """
    given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    weights = args.reward_weights or [1.0] * len(given)
    if not given or len(weights) != len(given):
        raise ValueError(f"Expected one or more rewards and one weight each, got {len(given)} and {len(weights)}.")
    functions: list[Any] = []
    for index, reward in enumerate(given):
        if isinstance(reward, str | Path) and is_adapter(reward):
            role = f"reward_{index}"
            roles.add_scalar_role(role, reward)
            name = Path(reward).resolve().name
            if any(function.__name__ == name for function in functions if isinstance(function, AdapterReward)):
                name = f"{name}_{index}"
            functions.append(
                AdapterReward(roles, role, name, tokenizer.pad_token_id, args.per_device_train_batch_size)
            )
        elif isinstance(reward, str | Path):
            functions.append(load_sequence_classifier(str(reward)))
        elif isinstance(reward, nn.Module):
            functions.append(reward)
        else:
            functions.append(checked(reward))
    if args.missing_eos_penalty is not None:
        functions.append(MissingEosPenalty(args.missing_eos_penalty, _eos_token_ids(roles, tokenizer)))
        weights = [*weights, 1.0]
    return functions, weights


def _eos_token_ids(roles: Roles, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    declared = roles.model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return [tokenizer.eos_token_id, *(token for token in ids if token is not None)]
