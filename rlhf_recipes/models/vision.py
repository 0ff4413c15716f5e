"""Vision-language models: the class that gives scores, which transformers lacks, and processors."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


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
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"`model_type: {config.model_type}` reads no pictures. Give a vision-language model.")
    generator: Any = AutoModelForImageTextToText._model_mapping[type(config)]
    family = next(base for base in generator.__mro__ if PreTrainedModel in base.__bases__)
    name = generator.__name__.replace("ForConditionalGeneration", "ForSequenceClassification")
    if (renamed := get_checkpoint_conversion_mapping(generator.__name__)) is not None:
        # What is on the hub, and saved, has names of an older class, which transformers knows of its own classes only
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    members = {"__module__": generator.__module__, "__doc__": f"{generator.__name__}'s trunk with a score head."}
    return type(name, (GenericForSequenceClassification, family), members)


def load_processor(path: str, *, revision: str = "main", trust_remote_code: bool = False) -> ProcessorMixin:
    """Load the processor of a vision-language model, ready for generation in batches (padding on the left).

    Where torchvision is missing, which videos need, it is one for texts and pictures alone (`without_videos`).

    Args:
        path: Hub id or local folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the processor may run.

    Raises:
        ValueError: If the model reads no pictures.
    """
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    family: Any = AutoProcessor
    config = AutoConfig.from_pretrained(path, **source)
    if not is_torchvision_available() and type(config) in PROCESSOR_MAPPING:
        own: Any = PROCESSOR_MAPPING[type(config)]
        family = without_videos(own) if "video_processor" in own.get_attributes() else own
    processor = family.from_pretrained(path, padding_side="left", **source)
    if not isinstance(processor, ProcessorMixin):  # AutoProcessor falls back to a tokenizer
        raise ValueError(
            f"{path!r} has no processor, which makes of pictures what its model reads: `AutoProcessor` found a "
            f"{type(processor).__name__}. Give a vision-language model, or rows without pictures."
        )
    return processor


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
        family.__init__(self, image_processor, tokenizer, chat_template=chat_template, **options)

    return type(family.__name__, (family,), {"__init__": init, "__doc__": family.__doc__})
