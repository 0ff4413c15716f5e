"""Load a trained reward model, whole or as an adapter, with its own base and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.models.adapters import WEIGHTS, base_to_load, is_adapter, read_weights, weights_of_base
from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.models.loading import load_new_classifier, load_sequence_classifier
from rlhf_recipes.models.quantized import dequantized, merges_exactly
from rlhf_recipes.models.resumed import check_same_adapter
from rlhf_recipes.models.trained_on import OF_THE_SPREAD, TOLERANCE, check_trained_on, raw_score


def load_reward_model(
    path: str | Path, tolerance: float = TOLERANCE, **options: Any
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a trained sequence classifier, an encoder or a decoder, for scoring.

    Args:
        path: Folder (or hub id) of a model, or folder of an adapter, whose base is then loaded too. The adapter is
            merged into a base in float32. On any other, quantized or in 16 bits, it stays beside the weights: they
            would round it away.
        tolerance: How far the scores may be from those that an adapter gave on the base of its training, where that
            was quantized in another way or of another precision, as a share of their spread.
        **options: Those of `load_sequence_classifier`.

    Returns:
        The model, a `PeftModel` where the adapter is not merged, and its tokenizer: that of the folder, or of the
        adapter's base where the folder has none.

    Raises:
        FileNotFoundError: If a folder does not exist, or holds no safetensors weights.
        ValueError: If weights of the head are missing: they would start at random, and so would every reward; or an
            adapter gives other scores on this base than where it was trained.
    """
    base, adapter, tokenizer = _load_parts(str(path), **options)
    if adapter is None:
        return base, tokenizer
    adapted = _adapted(base, adapter)
    check_trained_on(adapter, adapted, raw_score, OF_THE_SPREAD, tolerance)
    return adapted.merge_and_unload() if merges_exactly(base) else adapted, tokenizer


def load_scoring_model(path: str, tolerance: float, trust_remote_code: bool) -> PreTrainedModel | PeftModel:
    """Load a sequence classifier to be trained on as a critic, with the adapter of an adapter's folder merged into it.

    Args:
        path: Folder or hub id of a model, whose head may start at random, or folder of an adapter.
        tolerance: As for `load_reward_model`.
        trust_remote_code: Whether code of the hub's may be run.

    Raises:
        FileNotFoundError: If it cannot be loaded.
    """
    try:
        if is_adapter(path):
            return load_reward_model(path, tolerance, trust_remote_code=trust_remote_code)[0]
        return load_sequence_classifier(path, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(f"`critic_model` {path!r} cannot be loaded: {error}") from error


def start_from(model: Any, folder: str | Path | None) -> None:
    """Give a fresh adapter and its head the weights of a trained reward model, to be trained further.

    Args:
        model: A sequence classifier with a fresh adapter, as the reward stage makes it.
        folder: Folder of the trained adapter; `None` changes nothing. Its gain and bias (`reward_model.json`) are of
            its scores, not of its weights, and do not go on.

    Raises:
        ValueError: If the folder holds no adapter of this kind on this base, or no head.
    """
    if folder is None:
        return
    if not is_adapter(folder):
        raise ValueError(
            f"`start_adapter` is {str(folder)!r}, which holds no adapter. Give the output folder of a reward stage "
            "that trained one; a whole model goes on as `model_name_or_path`."
        )
    check_same_adapter(folder, model, what="one that this run could go on with")
    weights, expected = read_weights(folder), get_peft_model_state_dict(model)
    if wrong := weights.keys() ^ expected.keys():
        raise ValueError(
            f"The adapter in {str(folder)!r} is no reward model as this run trains it: {min(wrong)!r} is only in one "
            "of the two. Give the output folder of a reward stage with the same settings."
        )
    set_peft_model_state_dict(model, weights)


def load_whole_reward_model(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a trained sequence classifier in float32 without adapters, to work on its weights.

    Args:
        path: As of `load_reward_model`. Weights that are saved in 4 or 8 bits are dequantized first.

    Returns:
        The model, with the adapter merged into it, and its tokenizer.

    Raises:
        FileNotFoundError: If a folder does not exist, or holds no safetensors weights.
        ValueError: If weights of the head are missing.
    """
    base, adapter, tokenizer = _load_parts(str(path))
    model: Any = dequantized(base) if getattr(base, "is_quantized", False) else base.float()
    return model if adapter is None else _adapted(model, adapter).merge_and_unload(), tokenizer


def _load_parts(path: str, **options: Any) -> tuple[PreTrainedModel, str | None, PreTrainedTokenizerBase]:
    """Load the base, and name the folder of the adapter if there is one."""
    code = {"trust_remote_code": options.get("trust_remote_code", False)}
    if not is_adapter(path):
        model, missing = load_new_classifier(path, **options)
        _check_complete(path, missing)
        return model, None, AutoTokenizer.from_pretrained(path, **code)
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{path!r} has no {WEIGHTS}. Weights are read from safetensors files only.")
    base = base_to_load(path)
    model, missing = load_new_classifier(base, **options)
    _check_complete(path, missing - weights_of_base(path))
    own = (Path(path) / "tokenizer_config.json").is_file()
    return model, path, AutoTokenizer.from_pretrained(path if own else base, **code)


def _adapted(base: PreTrainedModel, adapter: str) -> Any:
    return PeftModel.from_pretrained(base, adapter, config=fuse_lora(PeftConfig.from_pretrained(adapter)))


def _check_complete(path: str, missing: set[str]) -> None:
    if missing:
        raise ValueError(
            f"{path!r} is no trained reward model: {len(missing)} weights, {min(missing)!r} among them, are not in "
            "its files and would start at random. Give the output folder of the reward stage. (If it is one, these "
            "weights were not saved: train again with `lora_modules_to_save`.)"
        )


def score_tokens(model: nn.Module, unwrapped: nn.Module, call: dict[str, Any]) -> tuple[Any, Tensor]:
    """Run a model for sequence classification and keep its head's output at every token.

    Args:
        model: The model, as it is called in training.
        unwrapped: The same without the wrappers of parallel training.
        call: What it is called with.

    Returns:
        Its output, and the scores at the tokens in float32, shape `(S, T)`.

    Raises:
        ValueError: If the model has no head that reads every token.
    """
    base: Any = unwrapped
    if isinstance(unwrapped, PeftModel):
        base = unwrapped.get_base_model()
    head = getattr(base, "score", None)
    head_outputs: list[Tensor] = []
    if head is not None:
        handle = head.register_forward_hook(lambda module, inputs, output: head_outputs.append(output))
        try:
            outputs = model(**call)
        finally:
            handle.remove()
    if not head_outputs or head_outputs[0].dim() != 3:
        raise ValueError(
            f"{type(unwrapped).__name__} has no head `score` that reads every token, so `readout` can only be 'last' "
            "and `objective` not 'token'. Use a decoder, or change the settings."
        )
    return outputs, head_outputs[0].squeeze(-1).float()
