"""Checks of the kinds of what `PPOTrainer` is given: an error names the argument and the fix."""

from __future__ import annotations

from types import NoneType
from typing import Any

from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import PeftType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from trl import BEMACallback, SyncRefModelCallback

from rlhf_recipes.models.adapters import check_shareable
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.prompts import check_is_dataset


def check_given(
    args: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any, peft_config: Any, callbacks: Any = None
) -> None:
    """Check the kinds of what `PPOTrainer` was given, before anything is loaded.

    Raises:
        TypeError: If one of them is of another kind.
        ValueError: If the training data is missing, the adapter is made for something else than a policy, or not all
            processes of a launch would read the base.
    """
    _check_launch(args)
    if args is not None and not isinstance(args, PPOConfig):
        raise TypeError(
            f"`args` must be a `PPOConfig`, got {type(args).__name__}. It takes the fields of TRL's `GRPOConfig` that "
            "PPO honours, and PPO's own: `PPOConfig(output_dir, ...)`."
        )
    check_is_dataset(train_dataset, "train_dataset")
    if isinstance(eval_dataset, dict) and not eval_dataset:
        raise ValueError("`eval_dataset` is an empty dictionary, so that nothing would be evaluated. Leave it out.")
    named = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    if other := [key for key in named if not isinstance(key, str)]:
        raise TypeError(f"The names of `eval_dataset` must be text, got {other[0]!r} ({type(other[0]).__name__}).")
    for key, rows in named.items():
        if rows is not None or key:
            check_is_dataset(rows, f"eval_dataset[{key!r}]" if key else "eval_dataset")
    if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | NoneType):
        raise TypeError(
            "`processing_class` must be a tokenizer (`PreTrainedTokenizerBase`), or for prompts with pictures a "
            f"processor (`ProcessorMixin`), got {type(processing_class).__name__}."
        )
    if peft_config is not None:
        _check_peft_config(peft_config)
    _check_callback_kinds(callbacks)


def _check_launch(args: Any) -> None:
    """Refuse settings of FSDP and DeepSpeed that transformers heeds, or judges, before the trainer is there."""
    of_launch = "in the launch's configuration, as in recipes/accelerate/fsdp2.yaml"
    if is_fsdp_enabled():  # transformers' word for this one setting
        raise ValueError(
            "With `fsdp_cpu_ram_efficient_loading` only one process reads the base, but each tries the policy out "
            f"before it is sharded. Set it to false {of_launch}."
        )
    own = getattr(args, "fsdp_plugin_args", None) or {}
    if own.get("activation_checkpointing", parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")):
        raise ValueError(
            "`fsdp_activation_checkpointing` computes a layer again under whichever role is active then. Set it to "
            f"false {of_launch}, and `activation_checkpointing: true` in the stage's YAML, which knows the roles."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 lets no process run a network before DeepSpeed's engine is there, but PPO tries the policy out "
            "before, and runs parts of it past the engine. Launch with recipes/accelerate/fsdp2.yaml, which spreads "
            "the base as well; or where it fits on each GPU with recipes/accelerate/zero2.yaml."
        )


def check_policy(model: Any) -> None:
    """Check that a policy writes text, and that its adapter, if it is given as a `PeftModel`, is LoRA's.

    Raises:
        TypeError: If it is no model, or its adapter is another one.
        ValueError: If it is a classifier.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a path, a `PreTrainedModel` or a `PeftModel`, got {type(model).__name__}.")
    own: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if own.get_output_embeddings() is None:
        raise ValueError(
            f"`model` is a {type(own).__name__}, which has no output head to write text with. Give a causal language "
            "model (`AutoModelForCausalLM`), or the folder of one."
        )
    if isinstance(model, PeftModel):
        for name, config in model.peft_config.items():
            _check_lora(config, f"The adapter {name!r} of `model`")
            if config.task_type not in (None, "CAUSAL_LM"):
                raise ValueError(
                    f"The adapter {name!r} of `model` has the task type {config.task_type}. A policy writes text: "
                    "give one that was made with `task_type='CAUSAL_LM'`."
                )


def check_callbacks(callbacks: list[TrainerCallback], trains_whole_model: bool) -> None:
    """Check that TRL's callbacks fit how the policy is trained.

    Raises:
        ValueError: If one of them could not work, or would do so without any effect on the run.
    """
    for callback in callbacks:
        if isinstance(callback, SyncRefModelCallback):
            raise ValueError("`SyncRefModelCallback` has no effect: the reference is frozen. Remove it.")
        if isinstance(callback, BEMACallback) and not trains_whole_model:
            raise ValueError(
                "`BEMACallback` builds a second model from a configuration, which cannot be done for an adapter. "
                "Train the whole model (without `peft_config`), or remove it."
            )


def check_reward_list(reward_funcs: list[Any]) -> None:
    """Check that each reward is something that can give one.

    Raises:
        TypeError: If one is neither a path, a model nor a function.
    """
    for index, reward in enumerate(reward_funcs):
        if not isinstance(reward, str) and not hasattr(reward, "__fspath__") and not callable(reward):
            raise TypeError(
                f"`reward_funcs[{index}]` is a {type(reward).__name__}. Give a function, a model, or the path of a "
                "reward model or reward adapter."
            )
        if isinstance(reward, type) or (isinstance(reward, nn.Module) and not hasattr(reward, "config")):
            raise TypeError(
                f"`reward_funcs[{index}]` is {reward!r}. A class must be instantiated, and a model must be one of "
                "transformers'; wrap another one in a function that returns a list of numbers."
            )


def reward_tokenizers(processing_classes: Any, reward_funcs: Any) -> list[PreTrainedTokenizerBase | None]:
    """Bring `reward_processing_classes` into a list with one entry for each reward.

    Raises:
        TypeError: If one is no tokenizer.
        ValueError: If they are not as many as the rewards.

    Example:
        >>> reward_tokenizers(None, ["outputs/reward", len])
        [None, None]
    """
    rewards = len(reward_funcs) if isinstance(reward_funcs, list | tuple) else 1
    if processing_classes is None:
        processing_classes = [None] * rewards
    several = isinstance(processing_classes, list | tuple)
    tokenizers = list(processing_classes) if several else [processing_classes]
    if len(tokenizers) != rewards:
        raise ValueError(
            f"`reward_processing_classes` has {len(tokenizers)} entries, and `reward_funcs` {rewards}. Give one for "
            "each, `None` where the reward has its own tokenizer or needs none."
        )
    for index, tokenizer in enumerate(tokenizers):
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"`reward_processing_classes[{index}]` must be a tokenizer or None, got {type(tokenizer).__name__}."
            )
    return tokenizers


def unused_tokenizer(role: str, reward: str) -> ValueError:
    """Make the error of a tokenizer that a reward would not use; `role` is `reward_` and the reward's number."""
    return ValueError(
        f"`reward_processing_classes[{role.removeprefix('reward_')}]` is given, but that reward is {reward}. Give "
        "`None` there."
    )


def _check_callback_kinds(callbacks: Any) -> None:
    if not isinstance(callbacks, list | tuple | NoneType):
        raise TypeError(f"`callbacks` must be a list of callbacks, got {type(callbacks).__name__}. Give `[callback]`.")
    for index, callback in enumerate(callbacks or []):
        # A class is made into a callback by transformers
        if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
            raise TypeError(f"`callbacks[{index}]` must be a `TrainerCallback`, got {type(callback).__name__}.")


def _check_peft_config(config: Any) -> None:
    if not isinstance(config, PeftConfig):
        raise TypeError(f"`peft_config` must be a `peft.LoraConfig`, got {type(config).__name__}.")
    _check_lora(config, "`peft_config`")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"`peft_config` has the task type {config.task_type}. A policy writes text: set `task_type='CAUSAL_LM'`."
        )


def _check_lora(config: PeftConfig, what: str) -> None:
    # Subclasses of LoraConfig, such as AdaLoRA's, ask for steps of their own in the training loop
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise TypeError(
            f"{what} is a {type(config).__name__}. The roles share one base, which only LoRA adapters can: give a "
            "`peft.LoraConfig`."
        )
    check_shareable(config, what)
