"""Check that a run resumes with the model that its checkpoint was made of.

A checkpoint holds the weights of an adapter. What they compute depends on the adapter's configuration and on its base,
which the run that resumes brings along: with another `lora_alpha` the same weights are another policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from rlhf_recipes.models.adapters import POLICY, base_name, base_of, is_adapter, same_model

# Fields of a LoRA configuration that decide what its weights compute.
_COMPUTED = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "layer_replication"),
    *("fan_in_fan_out", "bias", "lora_bias", "trainable_token_indices"),
)
_SAMPLE = 256  # numbers of each tensor that go into a fingerprint


def check_same_adapter(checkpoint: str | Path, model: Any, adapter: str = POLICY, what: str = "this run's") -> None:
    """Check that the weights in a checkpoint compute in a model what they computed where they were saved.

    Args:
        checkpoint: Folder of the checkpoint.
        model: The model of the run that resumes from it, with its adapter or whole.
        adapter: Name of the adapter in the model.
        what: Whose adapter it is, for the message.

    Raises:
        ValueError: If one of both is an adapter and the other is a whole model, or their bases or the fields of their
            LoRA configurations differ; it names these.
    """
    is_peft, saved = isinstance(model, PeftModel), is_adapter(checkpoint)
    if not is_peft and getattr(model, "_hf_peft_config_loaded", False):  # transformers' own adapters
        return
    if is_peft != saved:
        kinds = {True: "an adapter (`peft_config`, `use_peft`)", False: "a whole model"}
        raise ValueError(
            f"{str(checkpoint)!r} holds {kinds[saved]}, but this run trains {kinds[is_peft]}. Train the same."
        )
    if not is_peft:
        return
    old, new = PeftConfig.from_pretrained(str(checkpoint)), model.peft_config[adapter]
    base = base_name(model)
    if (old.base_model_name_or_path or "") != base and not same_model(base_of(checkpoint), base):
        raise ValueError(
            f"{str(checkpoint)!r} was trained on {base_of(checkpoint)!r}, but the base of `model` is {base!r}. Resume "
            "with the base that it was trained on; if it is the same model at a new place, correct "
            "`base_model_name_or_path` in the checkpoint's adapter_config.json."
        )
    pairs = {name: (_plain(getattr(old, name, None)), _plain(getattr(new, name, None))) for name in _COMPUTED}
    changed = [f"`{name}` {now} (the checkpoint's: {then})" for name, (then, now) in pairs.items() if then != now]
    if changed:
        raise ValueError(
            f"The adapter in {str(checkpoint)!r} is not {what}, which has {', '.join(changed)}: its weights would "
            "compute something else. Resume with the checkpoint's values (`peft_config`, `lora_...`), or start a new "
            "run from its adapter."
        )


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Make a short text that tells weights apart, from a few numbers of each, the same on every machine.

    They are rounded to bfloat16, so that the precision in which the weights are kept makes no difference.

    Example:
        >>> fingerprint([torch.ones(3)]) == fingerprint([torch.ones(3).half()])
        True
        >>> fingerprint([torch.ones(3)]) == fingerprint([torch.zeros(3)])
        False
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        few = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].bfloat16().cpu().contiguous()
        digest.update(few.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON keeps it, with what is empty as `None`."""
    if isinstance(value, set | tuple | list):
        value = sorted(value, key=str)
    if isinstance(value, dict):
        value = {str(key): value[key] for key in sorted(value, key=str)}
    return None if not value or value == "none" else value
