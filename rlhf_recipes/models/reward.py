"""Load a trained reward model, whole or as an adapter, with its own base and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.models.adapters import WEIGHTS, is_adapter
from rlhf_recipes.models.loading import load_new_classifier


def load_reward_model(path: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a trained sequence classifier, an encoder or a decoder, for scoring.

    Args:
        path: Folder (or hub id) of a model, or folder of an adapter, whose base is then loaded and merged with it.
        **options: Those of `load_sequence_classifier`.

    Returns:
        The model, and its tokenizer: that of the folder, or of the adapter's base where the folder has none.

    Raises:
        FileNotFoundError: If a folder does not exist, or holds no safetensors weights.
        ValueError: If weights of the head are missing: they would start at random, and so would every reward.
    """
    path = str(path)
    code = {"trust_remote_code": options.get("trust_remote_code", False)}
    if not is_adapter(path):
        model, missing = load_new_classifier(path, **options)
        _check_complete(path, missing)
        return model, AutoTokenizer.from_pretrained(path, **code)
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{path!r} has no {WEIGHTS}. Weights are read from safetensors files only.")
    base = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
    model, missing = load_new_classifier(base, **options)
    with safe_open(file, framework="pt") as weights:
        saved = {key.removeprefix("base_model.model.") for key in weights.keys()}  # noqa: SIM118  # not a mapping
    _check_complete(path, missing - saved)
    merged: Any = PeftModel.from_pretrained(model, path).merge_and_unload()
    own = (Path(path) / "tokenizer_config.json").is_file()
    return merged, AutoTokenizer.from_pretrained(path if own else base, **code)


def _check_complete(path: str, missing: set[str]) -> None:
    if missing:
        raise ValueError(
            f"{path!r} is no trained reward model: {len(missing)} weights, {min(missing)!r} among them, are not in "
            "its files and would start at random. Give the output folder of the reward stage. (If it is one, these "
            "weights were not saved: train again with `lora_modules_to_save`.)"
        )
