"""Vision-language models: their language part, their class that gives scores, and processors without torchvision."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


def language_layers(model: Any) -> str:
    r"""Return LoRA's `target_modules` for all linear layers of a vision-language model's language part.

    Args:
        model: The model without adapters.

    Returns:
        A regular expression for full names of modules.

    Raises:
        ValueError: If the model has no language part beside others.

    Example:
        >>> from rlhf_recipes.models.tiny_vision import tiny_llava
        >>> language_layers(tiny_llava(["red"])[0])
        '(.*\\.)?model\\.language_model\\.(.*\\.)?(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)'
    """
    name, language = language_part(model)
    linear = {name.rpartition(".")[2] for name, module in language.named_modules() if isinstance(module, nn.Linear)}
    return rf"(.*\.)?{re.escape(name)}\.(.*\.)?({'|'.join(sorted(linear))})"


def language_part(model: Any) -> tuple[str, nn.Module]:
    """Return a vision-language model's language part, without its output layer, and its name.

    Args:
        model: The model without adapters.

    Raises:
        ValueError: If the model has no language part beside others.
    """
    trunk = model.base_model
    language = trunk.get_decoder()
    if language is trunk:
        raise ValueError(
            f"{type(model).__name__} has no language part beside a vision tower. For a text model, give "
            "`target_modules='all-linear'`."
        )
    return next((name, module) for name, module in model.named_modules() if module is language)


def sees_images(model: Any) -> bool:
    """Whether a model is a vision-language model."""
    return hasattr(model.base_model, "get_image_features")


def image_model_class(config: Any) -> Any:
    """Return transformers' class of a family of vision-language models that writes text.

    Args:
        config: Configuration of a model.

    Raises:
        ValueError: If it is of no vision-language model.
    """
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"`model_type: {config.model_type}` reads no pictures. Give a vision-language model, or take the column "
            "of pictures (`images` or `image`) out of the rows."
        )
    return AutoModelForImageTextToText._model_mapping[type(config)]


def image_classifier_class(config: Any) -> type[PreTrainedModel]:
    """Make the class of a family of vision-language models that gives a text with pictures a score.

    The score is read at the last token that is not padding. The weights have the names that the family's generating
    class gives them, so that an adapter of the one fits the other. It is called with what the processor makes.

    Args:
        config: Configuration of a model.

    Raises:
        ValueError: If it is of no vision-language model.

    Example:
        >>> from rlhf_recipes.models.tiny_vision import tiny_llava
        >>> model, processor = tiny_llava(["red", "which", "colour"])
        >>> model.config.num_labels = 1
        >>> scorer = image_classifier_class(model.config)(model.config)
        >>> type(scorer).__name__
        'LlavaForSequenceClassification'
        >>> scorer(**processor.tokenizer("red colour", return_tensors="pt")).logits.shape
        torch.Size([1, 1])
    """
    generator = image_model_class(config)
    family = next(base for base in generator.__mro__ if PreTrainedModel in base.__bases__)
    name = generator.__name__.replace("ForConditionalGeneration", "ForSequenceClassification")
    if (renamed := get_checkpoint_conversion_mapping(generator.__name__)) is not None:
        # What is on the hub, and saved, has names of an older class, which transformers knows of its own classes only
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    members = {"__module__": generator.__module__, "__doc__": f"{generator.__name__}'s trunk with a score head."}
    return type(name, (GenericForSequenceClassification, family), members)


def processor_class(config: Any) -> type[Any]:
    """Choose the class that loads a vision-language model's processor.

    Args:
        config: Configuration of the model.

    Returns:
        `AutoProcessor`; where torchvision is missing, one for texts and pictures alone, if the family allows that.
    """
    if is_torchvision_available() or type(config) not in PROCESSOR_MAPPING:
        return AutoProcessor
    own: Any = PROCESSOR_MAPPING[type(config)]
    # One that formats chats in a way of its own (SmolVLM's) cannot do without its part for videos
    if "video_processor" in own.get_attributes() and own.apply_chat_template is ProcessorMixin.apply_chat_template:
        return without_videos(own)
    return AutoProcessor


def without_videos(family: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Make a processor's class for texts and pictures alone, which runs without torchvision.

    Args:
        family: A class whose processors also have one for videos.

    Example:
        >>> from transformers import Qwen2_5_VLProcessor
        >>> without_videos(Qwen2_5_VLProcessor).get_attributes()
        ['image_processor', 'tokenizer']
    """

    # transformers takes the parts that a processor has from the names of these arguments
    def init(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **options: Any
    ) -> None:
        family.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **options)

    return type(family.__name__, (family,), {"__init__": init, "__doc__": family.__doc__})
