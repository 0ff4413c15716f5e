"""Adapters on disk: which base they belong to, and their weights, from safetensors files only."""

from __future__ import annotations

import os
from pathlib import Path

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.models.loading import looks_local
from rlhf_recipes.models.plain_lora import as_plain_lora, changes_base
from rlhf_recipes.models.sharding import is_sharded, write
from rlhf_recipes.models.trained_on import TOLERANCE, check_trained_on, log_probs

POLICY = "default"  # the name that TRL expects

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD_KEY = "base_model.model.score.weight"


def is_adapter(path: str | Path) -> bool:
    """Return whether a path is a folder with a saved PEFT adapter.

    Example:
        >>> is_adapter("no/such/folder")
        False
    """
    return (Path(path) / CONFIG).is_file()


def base_name(model: nn.Module) -> str:
    """Return the path or hub id of the base model of a model, with or without adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name: str = base.config._name_or_path  # type: ignore[union-attr, assignment]
    return name


def load_policy(base: nn.Module, adapter: str | Path, tolerance: float = TOLERANCE) -> PeftModel:
    """Put a trained adapter (the SFT stage's) on a base model, as the policy to be trained.

    Args:
        base: The causal language model that the adapter was trained on.
        adapter: Folder of the adapter.
        tolerance: How far the log-probabilities may be, in nats per token, from those that the adapter had on the base
            of its training, where that was quantized in another way or of another precision.

    Returns:
        The PEFT model; its adapter is named `"default"`, as everywhere in TRL.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ValueError: If the adapter is a reward model's, belongs to another base, or computes something else on this
            one.
    """
    config, weights = read_policy(adapter, base)
    model = get_peft_model(base, config, adapter_name=POLICY)
    set_weights(model, weights, POLICY, adapter)
    check_trained_on(adapter, model, log_probs, "nats per token", tolerance)
    return model


def name_base_absolutely(model: nn.Module) -> None:
    """Let adapters of a model name a local base by its absolute path when they are saved next.

    PEFT writes the name with which the base was loaded. A relative path would be looked for from wherever the adapter
    is loaded.

    Args:
        model: Any model; one without adapters is left as it is.

    Example:
        >>> name_base_absolutely(nn.Linear(2, 2))
    """
    for config in getattr(model, "peft_config", {}).values():
        name = config.base_model_name_or_path
        if name and Path(name).is_dir():
            config.base_model_name_or_path = os.path.abspath(name)


def base_to_load(adapter: str | Path) -> str:
    """Return the base of a saved adapter as `base_of` does, but refuse a folder that is not there.

    Args:
        adapter: Folder of the adapter.

    Returns:
        A hub id, or an existing folder.

    Raises:
        FileNotFoundError: If the base is a folder that is not there; it says what to write where.
        ValueError: As `base_of`.
    """
    name = base_of(adapter)
    if looks_local(name) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"The adapter in {str(adapter)!r} belongs to the base {name!r}, and there is no such folder. If the base "
            f"has moved, write its new absolute path as `base_model_name_or_path` into {Path(adapter) / CONFIG}."
        )
    return name


def base_of(adapter: str | Path) -> str:
    """Return the base that a saved adapter belongs to: a hub id, or a folder, also where it was written relative.

    The stages write absolute paths. PEFT alone writes the base's name as it was given. A relative folder is looked for
    from here, and from the folders above the adapter, which is where it lies after the whole tree moved or if a
    program is started from another folder.

    Args:
        adapter: Folder of the adapter.

    Returns:
        The name.

    Raises:
        ValueError: If the adapter names no base, or several folders could be meant.
    """
    name: str | None = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    file = Path(adapter) / CONFIG
    if not name:
        raise ValueError(f"{file} names no base. Set its `base_model_name_or_path` to the base's folder or hub id.")
    places = [Path.cwd(), *Path(adapter).resolve().parents]
    candidates = list(dict.fromkeys((place / name).resolve() for place in places if (place / name).is_dir()))
    if Path(name).is_absolute() or not candidates or (candidates == [Path(name).resolve()]):
        return name
    if len(candidates) > 1:
        folders = " or ".join(repr(str(folder)) for folder in candidates)
        raise ValueError(
            f"`base_model_name_or_path` of {file} is {name!r}, which may be {folders}. "
            "Write the whole path of the adapter's base there."
        )
    return str(candidates[0])


def read_adapter(path: str | Path, base: nn.Module) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a saved LoRA adapter: its configuration, and all the weights of its file, a score head included.

    An adapter whose start took a part of the base out of it comes as plain LoRA (`as_plain_lora`).
    """
    config, weights = read_config(path, base), read_weights(path)
    if not changes_base(config):
        return config, weights
    config, weights = as_plain_lora(base, config, weights, repr(str(path)))
    return fuse_lora(config), weights


def read_policy(path: str | Path, base: nn.Module) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a saved policy as `read_adapter` does, to be trained further; reward models and critics are refused."""
    config, weights = read_adapter(path, base)
    if config.task_type not in (None, "CAUSAL_LM") or HEAD_KEY in weights:
        raise ValueError(
            f"The adapter in {str(path)!r} is a reward model's or a critic's (task type {config.task_type}), and its "
            "score head would be lost. As the policy (`model`, `sft_adapter`), give the SFT stage's output folder."
        )
    config.inference_mode = False
    return config, weights


def read_config(path: str | Path, base: nn.Module) -> LoraConfig:
    """Read the configuration of a saved LoRA adapter, and refuse one that belongs to another base."""
    if not is_adapter(path):
        raise FileNotFoundError(
            f"{str(path)!r} holds no adapter ({CONFIG}). Give the output folder of a finished stage."
        )
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise TypeError(f"The adapter in {str(path)!r} is a {config.peft_type}; only LoRA adapters can share a base.")
    check_shareable(config, f"The adapter in {str(path)!r}")
    expected, saved = base_name(base), base_of(path)
    if not same_model(expected, saved):
        raise ValueError(
            f"The adapter in {str(path)!r} was trained on {saved!r}, but the base model is {expected!r}. Use the base "
            f"that it was trained on; if it is the same model at a new place, correct `base_model_name_or_path` in "
            f"{Path(path) / CONFIG}."
        )
    config.base_model_name_or_path = expected  # PEFT would warn of another name for the same folder
    return fuse_lora(config)


def check_shareable(config: LoraConfig, subject: str) -> None:
    """Refuse LoRA adapters that change more of a base than their saved role may, or that look ahead in a text.

    Raises:
        ValueError: With the field and the fix.

    Example:
        >>> check_shareable(LoraConfig(), "The adapter")
    """
    reasons = {
        "layer_replication": "it would repeat the layers of the base for every role that shares it",
        "alora_invocation_tokens": "it acts from the last occurrence of these tokens on, wherever later text has them",
    }
    for name, reason in reasons.items():
        if getattr(config, name):
            raise ValueError(f"{subject} has `{name}`: {reason}. Take an adapter without it.")
    if config.bias != "none":
        raise ValueError(
            f"{subject} has `bias: {config.bias}`: it would train the biases of the base, which all roles share. Take "
            "one with `bias: none`."
        )


def same_model(left: str | None, right: str | None) -> bool:
    """Return whether two names of base models, hub ids or folders, are the same.

    Example:
        >>> same_model("outputs/base", "./outputs/base"), same_model("outputs/base", None)
        (True, False)
    """
    return left == right or (left is not None and right is not None and Path(left).resolve() == Path(right).resolve())


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read all that the file of an adapter holds, a score head included."""
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r} has no {WEIGHTS}. Weights are read from safetensors files only.")
    return load_file(file)


def weights_of_base(path: str | Path) -> set[str]:
    """Name what the file of an adapter holds, by the base's own names: a whole module in it takes that of the base."""
    with safe_open(Path(path) / WEIGHTS, framework="pt") as weights:
        return {key.removeprefix("base_model.model.") for key in weights.keys()}  # noqa: SIM118  # not a mapping


def load_weights(model: PeftModel, path: str | Path, adapter: str) -> dict[str, Tensor]:
    """Read saved weights into an adapter of a model, and return all that the file holds, a score head included."""
    weights = read_weights(path)
    set_weights(model, weights, adapter, path)
    return weights


def set_weights(model: PeftModel, weights: dict[str, Tensor], adapter: str, path: str | Path) -> None:
    """Put weights of an adapter that was read from a path, but its score head, into an adapter of a model.

    Raises:
        ValueError: If they are not the weights that the adapter has.
    """
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
    if is_sharded(model):
        for key, weight in expected.items():
            write(weight, own[key])
    else:
        set_peft_model_state_dict(model, own, adapter)


def _shape(weights: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None
