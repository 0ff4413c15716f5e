"""Adapters on disk: which base they belong to, and their weights, from safetensors files only."""

from __future__ import annotations

from pathlib import Path

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_recipes.models.fused_lora import fuse_lora

POLICY = "default"  # the name that TRL expects

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD_KEY = "base_model.model.score.weight"


def is_adapter(path: str | Path) -> bool:
    """Tell whether a path is a folder with a saved PEFT adapter.

    Example:
        >>> is_adapter("no/such/folder")
        False
    """
    return (Path(path) / CONFIG).is_file()


def base_name(model: nn.Module) -> str:
    """Path or hub id of the base model of a model, with or without adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name: str = base.config._name_or_path  # type: ignore[union-attr, assignment]
    return name


def load_policy(base: nn.Module, adapter: str | Path) -> PeftModel:
    """Put a trained adapter (the SFT stage's) on a base model, as the policy to be trained.

    Args:
        base: The causal language model that the adapter was trained on.
        adapter: Folder of the adapter.

    Returns:
        The PEFT model; its adapter is named `"default"`, as everywhere in TRL.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ValueError: If the adapter belongs to another base.
    """
    config = read_config(adapter, base)
    config.inference_mode = False
    model = get_peft_model(base, config, adapter_name=POLICY)
    load_weights(model, adapter, POLICY)
    return model


def read_config(path: str | Path, base: nn.Module) -> LoraConfig:
    """Read the configuration of a saved LoRA adapter, and refuse one that belongs to another base."""
    if not is_adapter(path):
        raise FileNotFoundError(
            f"{str(path)!r} holds no adapter ({CONFIG}). Give the output folder of a finished stage."
        )
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise TypeError(f"The adapter in {str(path)!r} is a {config.peft_type}; only LoRA adapters can share a base.")
    expected, found = base_name(base), config.base_model_name_or_path
    if not same_model(expected, found):
        raise ValueError(
            f"The adapter in {str(path)!r} was trained on {found!r}, but the base model is {expected!r}. Use the base "
            f"that it was trained on; if it is the same model at a new place, correct `base_model_name_or_path` in "
            f"{Path(path) / CONFIG}."
        )
    return fuse_lora(config)


def same_model(left: str | None, right: str | None) -> bool:
    """Tell whether two names of base models, hub ids or folders, are the same.

    Example:
        >>> same_model("outputs/base", "./outputs/base"), same_model("outputs/base", None)
        (True, False)
    """
    return left == right or (left is not None and right is not None and Path(left).resolve() == Path(right).resolve())


def load_weights(model: PeftModel, path: str | Path, adapter: str) -> dict[str, Tensor]:
    """Read saved weights into an adapter of a model, and return all that the file holds, a score head included."""
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r} has no {WEIGHTS}. Weights are read from safetensors files only.")
    weights = load_file(file)
    own = {key: value for key, value in weights.items() if key != HEAD_KEY}
    expected = get_peft_model_state_dict(model, adapter_name=adapter)
    wrong = [key for key in expected.keys() | own.keys() if _shape(expected, key) != _shape(own, key)]
    if wrong:
        key = min(wrong)
        raise ValueError(
            f"The adapter in {str(path)!r} does not fit the base model in {len(wrong)} of {len(expected)} weights; "
            f"{key}: expected shape {_shape(expected, key)}, the file has {_shape(own, key)}. "
            "Use the base model that the adapter was trained on."
        )
    set_peft_model_state_dict(model, own, adapter)
    return weights


def _shape(weights: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None
