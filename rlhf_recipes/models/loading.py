"""Load tokenizers and base models, whole or in 4 bits: from safetensors only, without remote code unless asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from jinja2.exceptions import TemplateError
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import is_bitsandbytes_available

from rlhf_recipes.models.arguments import complete_arguments
from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.models.quantized import keep_4bit_differentiable
from rlhf_recipes.models.vision import (
    image_classifier_class,
    image_model_class,
    language_layers,
    processor_class,
    sees_images,
)
from rlhf_recipes.quiet import held_back

if TYPE_CHECKING:
    from trl import ModelConfig


# Heads of sequence classifiers, by the names of their modules: `score` of decoders; encoders have more than one layer.
HEAD_MODULES = ("score", "classifier", "pre_classifier", "pooler")
_LOADER = "transformers.modeling_utils"


def quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """Build the bitsandbytes configuration that a stage's model arguments ask for.

    Args:
        model_args: TRL's model arguments; `load_in_4bit` gives `bnb_4bit_quant_type` weights (NF4 by default) with
            double quantization (QLoRA, https://huggingface.co/papers/2305.14314, section 3) and computes in `dtype`.

    Returns:
        The configuration, or `None` when neither `load_in_4bit` nor `load_in_8bit` is set.

    Raises:
        ImportError: If quantization is asked for and bitsandbytes is not installed.

    Example:
        >>> from trl import ModelConfig
        >>> config = quantization_config(ModelConfig(load_in_4bit=True, dtype="float32"))
        >>> config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
        ('nf4', True)
    """
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    if not is_bitsandbytes_available():
        raise ImportError(
            "Quantized weights (`load_in_4bit` or `load_in_8bit`) need bitsandbytes, which is not installed or does "
            "not support this machine. Install it with `pip install bitsandbytes`, or set `load_in_4bit: false`."
        )
    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
        bnb_4bit_compute_dtype=_torch_dtype(model_args.dtype),
    )


def model_options(model_args: ModelConfig) -> dict[str, Any]:
    """Collect the options for weights and attention from a stage's model arguments, for `load_causal_lm` and its like.

    Args:
        model_args: TRL's model arguments.

    Returns:
        `quantization_config`, `dtype` and `attn_implementation`.

    Raises:
        ImportError: If quantization is asked for and bitsandbytes is not installed.

    Example:
        >>> from trl import ModelConfig
        >>> model_options(ModelConfig(dtype="bfloat16"))
        {'quantization_config': None, 'dtype': 'bfloat16', 'attn_implementation': None}
    """
    return {
        "quantization_config": quantization_config(model_args),
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }


def lora_config(model_args: ModelConfig, task_type: str, model: torch.nn.Module | None = None) -> LoraConfig:
    """Build the LoRA configuration of a stage.

    Args:
        model_args: TRL's model arguments (`lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules`, ...).
        task_type: `"CAUSAL_LM"` for policies and `"SEQ_CLS"` for reward models. With any other type PEFT freezes the
            reward model's score head at its random start and does not save it.
        model: The model that the adapter is for, whose layers that LoRA cannot adapt are left out.

    Returns:
        The configuration. Without `lora_target_modules` every linear layer but the output head is adapted, of a
        vision-language model those of its language part.

    Raises:
        ValueError: If the adapter targets the output head, which TRL's fused log-probabilities would ignore.

    Example:
        >>> from trl import ModelConfig
        >>> lora_config(ModelConfig(lora_r=8), "SEQ_CLS").r
        8
    """
    targets: Any = model_args.lora_target_modules or "all-linear"
    if isinstance(targets, list) and len(targets) == 1:
        targets = targets[0]  # YAML's `all-linear` arrives as a list; PEFT knows the word only as a string
    if targets == "all-linear" and model is not None and sees_images(model):
        targets = language_layers(model)
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]  # TRL makes a string of one name, which PEFT would take for a pattern of whole paths
    if task_type == "CAUSAL_LM" and "lm_head" in ([targets] if isinstance(targets, str) else targets):
        raise ValueError(
            "`lora_target_modules` names 'lm_head', but log-probabilities are computed from its weight directly and "
            "would ignore the adapter. Remove 'lm_head' from the list."
        )
    modules = model_args.lora_modules_to_save
    if task_type == "SEQ_CLS":
        modules = [*HEAD_MODULES, *(modules or [])]  # PEFT alone would leave an encoder's pooler at its random start
    config = LoraConfig(
        task_type=task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=targets,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=modules,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )
    return fuse_lora(config, model)


def load_tokenizer(
    path: str | None, *, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, ready for generation in batches (padding on the left).

    Args:
        path: Hub id or local folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the tokenizer may run.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: If a local folder does not exist.
        ValueError: If it has no padding token or no end-of-sequence token, or no path is given.
    """
    _check_path(path)
    tokenizer = AutoTokenizer.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code, padding_side="left", truncation_side="left"
    )
    return _with_special_tokens(tokenizer, path)


def load_processor(path: str | None, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """Load the processor of a vision-language model, ready for generation in batches (padding on the left).

    Where torchvision is missing, which videos need, it is one for texts and pictures alone, if the family allows that.

    Args:
        path: Hub id or local folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the processor may run.

    Returns:
        The processor.

    Raises:
        FileNotFoundError: If a local folder does not exist.
        ImportError: If it needs a library that is not there.
        ValueError: If the model has no processor, or its tokenizer no padding or end-of-sequence token.
    """
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    loader = processor_class(_config(path, source))
    processor = loader.from_pretrained(path, padding_side="left", **source)
    if not isinstance(processor, ProcessorMixin):  # AutoProcessor falls back to a tokenizer
        raise ValueError(
            f"{path!r} has no processor, which makes of pictures what a model reads: there is a "
            f"{type(processor).__name__} only. Give a vision-language model, or rows without pictures."
        )
    own: Any = processor
    _with_special_tokens(own.tokenizer, path)
    return processor


def _with_special_tokens(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token  # what ends an encoder's text
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of {path!r} has no end-of-sequence token, so a completion could never end. "
            "Set one (`tokenizer.eos_token = ...`) and save the tokenizer again."
        )
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of {path!r} has no padding token, and batches need one. Set `tokenizer.pad_token` "
            f"(for example to its eos token {tokenizer.eos_token!r}, which is handled) and save the tokenizer again."
        )
    return tokenizer


def padding_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List tokens that can pad in the place of the end token, because no text has them.

    Args:
        tokenizer: A tokenizer.

    Returns:
        Its added tokens but those that begin, end or divide texts or that its chat template writes. Those that are
        named for padding come first, and the unknown token, which some tokenizers do write, last.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> padding_tokens(word_tokenizer(["good", "bad"]))
        ['<pad>', '<unk>']
    """
    roles = ("bos_token", "eos_token", "sep_token", "cls_token", "mask_token")
    used = {getattr(tokenizer, role) for role in roles}
    chat = _all_of_chat(tokenizer)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    free = [token for token in added if token not in used and token not in chat]
    return sorted(free, key=lambda token: (token == tokenizer.unk_token, "pad" not in token.lower()))


def _all_of_chat(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, and what it makes of the roles of a chat, whose tokens it may put together."""
    if tokenizer.chat_template is None:
        return ""
    texts = [str(tokenizer.chat_template)]
    for roles in (("user", "assistant"), ("system", "user", "assistant")):
        try:
            chat = [{"role": role, "content": role} for role in roles]
            texts.append(str(tokenizer.apply_chat_template(chat, tokenize=False)))
        except (TemplateError, TypeError, ValueError):  # a template may refuse a role
            continue
    return "".join(texts)


def load_causal_lm(path: str | None, **options: Any) -> PreTrainedModel:
    """Load a causal language model (the base of policies and of every role beside them).

    Args:
        path: Hub id or local folder with safetensors weights.
        **options: `quantization_config`, `dtype` ("float32" by default), `attn_implementation`, `revision`,
            `trust_remote_code`.

    Returns:
        The model, on the accelerator of this process, or on the CPU.

    Raises:
        ValueError: If the files lack weights, which would start at random (those of a classifier have no output head),
            or the model has absolute positions and takes no `position_ids`.
        FileNotFoundError: If a local folder does not exist.
    """
    return _load_generator(AutoModelForCausalLM, path, options)


def load_image_model(path: str | None, **options: Any) -> PreTrainedModel:
    """Load a vision-language model, the base of a policy that sees pictures.

    Options and errors are those of `load_causal_lm`.
    """
    return _load_generator(image_model_class(_config(path, options)), path, options)


def _load_generator(auto_class: Any, path: str | None, options: dict[str, Any]) -> PreTrainedModel:
    model, missing, left_over = _load(auto_class, path, **options)
    scores = {key for key in left_over if not {"score", "classifier"}.isdisjoint(key.split("."))}
    if missing or scores:  # where the output head is tied to the embeddings, only the scores tell
        lacking = f"lack {len(missing)} of its weights, {min(missing, default='')!r} among them"
        defect = lacking if missing else f"hold {min(scores)!r}"
        raise ValueError(
            f"{path!r} is no trained language model: its files {defect}"
            f"{', and are those of a classifier' if scores else ''}. As `model` (`model_name_or_path`), give a model "
            "that writes text."
        )
    complete_arguments(model)
    return model


def load_sequence_classifier(path: str | None, **options: Any) -> PreTrainedModel:
    """Load a base model with a new head of one output: the start of a reward model.

    The head is random: seed the generators first. Options and errors are those of `load_causal_lm`.
    """
    return load_new_classifier(path, **options)[0]


def load_new_classifier(path: str | None, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """Load a sequence classifier with one output, and name the weights that its files do not have.

    Returns:
        The model, and the names of the weights that start at random.

    Raises:
        ValueError: If they are more than a head: LoRA would freeze them at random, and not save them. If transformers
            has no classifier of this family, or the saved one has several outputs.
    """
    try:
        model, missing, _ = _load(AutoModelForSequenceClassification, path, num_labels=1, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The weights of {path!r} do not fit a classifier with one output: it was trained with several labels, or "
            "its files are not those of its config.json. Give a reward model with `num_labels=1`."
        ) from None
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"transformers has no sequence classifier of the family of {path!r}, so it cannot become a reward model. "
            "Take a reward model of another family, with a tokenizer of its own, or a reward function."
        ) from None
    _check_trunk_is_complete(model, path, missing)
    return model, missing


def load_image_classifier(path: str | None, **options: Any) -> PreTrainedModel:
    """Load a vision-language model with a new head of one output: the start of a reward model that sees pictures.

    The head is random: seed the generators first. Options and errors are those of `load_causal_lm`.
    """
    scorer = image_classifier_class(_config(path, options))
    model, missing, _ = _load(scorer, path, num_labels=1, **options)
    _check_trunk_is_complete(model, path, missing)
    return model


def _config(path: str | None, options: dict[str, Any]) -> Any:
    source = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    return AutoConfig.from_pretrained(_check_path(path), **source)


def _check_trunk_is_complete(model: PreTrainedModel, path: str | None, missing: set[str]) -> None:
    strange = {key for key in missing if set(key.split(".")).isdisjoint(HEAD_MODULES)}
    if strange:
        raise ValueError(
            f"The files of {path!r} lack {len(strange)} weights of a {type(model).__name__} beside its head, "
            f"{min(strange)!r} among them. Give the folder of a complete model."
        )


def upcast_trainable(model: torch.nn.Module) -> None:
    """Cast the trainable parameters of a model back to float32.

    TRL casts every trainable parameter of a quantized model to bfloat16, the reward model's head included, even when
    the run does not use bfloat16. An adapter is small, and an optimizer step on bfloat16 weights loses small updates.

    Example:
        >>> layer = torch.nn.Linear(2, 1).to(torch.bfloat16)
        >>> upcast_trainable(layer)
        >>> layer.weight.dtype
        torch.float32
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _load(
    auto_class: Any, path: str | None, *, dtype: str | torch.dtype = "float32", **options: Any
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """Load a model, and name the weights that its files lack, and those that they hold for another kind of model."""
    _check_path(path)
    options = {key: value for key, value in options.items() if value is not None}
    state = PartialState()
    with held_back(_LOADER, "LOAD REPORT") as reports:
        model, info = auto_class.from_pretrained(
            path,
            dtype=_torch_dtype(dtype),
            use_safetensors=True,
            output_loading_info=True,
            device_map=None if state.device.type == "cpu" else {"": state.device},
            **options,
        )
    if _says_something(model, info):
        for report in reports:
            logging.getLogger(_LOADER).handle(report)
    keep_4bit_differentiable(model)
    if getattr(model, "is_quantized", False):
        _let_go_of_the_file(model)
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def _says_something(model: PreTrainedModel, info: dict[str, Any]) -> bool:
    """Whether more is amiss than heads: a base has no score and a reward model no other head, as it should be."""
    missing = {key for key in info["missing_keys"] if set(key.split(".")).isdisjoint(HEAD_MODULES)}
    of_the_trunk = {key for key in info["unexpected_keys"] if key.startswith(f"{model.base_model_prefix}.")}
    return bool(missing or of_the_trunk or info["mismatched_keys"])


def _let_go_of_the_file(model: torch.nn.Module) -> None:
    # On a CPU, weights that are not quantized are views of the file, which is mapped into memory as a whole: as long
    # as one of them is there, so is every weight that was read to be quantized.
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    choices = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in choices:
        raise ValueError(f"`dtype` must be one of 'auto', {', '.join(map(repr, choices))}, got {dtype!r}.")
    return choices[dtype]


def looks_local(path: str) -> bool:
    """Return whether a name of a model can only be meant as a local folder: hub ids have at most one slash.

    Example:
        >>> looks_local("outputs/quickstart/world/base"), looks_local("Qwen/Qwen3-0.6B")
        (True, False)
    """
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path.split("/")[0]).is_dir()


def _check_path(path: str | None) -> str:
    if not path:
        raise ValueError("No model is given. Set `model_name_or_path` to a hub id or a local folder.")
    if looks_local(path) and not Path(path).is_dir():
        raise FileNotFoundError(f"Model folder {path!r} does not exist. Give an existing folder or a hub id.")
    return path
