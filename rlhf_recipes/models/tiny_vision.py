"""A small vision-language model from scratch, for machines that cannot download one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rlhf_recipes.models.tiny import EOS, PAD, UNKNOWN

IMAGE = "<image>"
_PATCH, _SIDE = 14, 28  # pixels: a picture has four patches
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tiny_llava(words: Sequence[str], hidden_size: int = 32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Make a small LLaVA with random weights (seed torch first), and its processor.

    Args:
        words: The vocabulary, each word once; words of texts are separated by spaces.
        hidden_size: Width `H` of both parts, a multiple of 4.

    Returns:
        The model, in float32 and in evaluation mode, whose pictures are 28 pixels high and wide and have four tokens;
        and the processor, with a chat template.

    Example:
        >>> model, processor = tiny_llava(["red", "which", "colour"])
        >>> len(processor.tokenizer), model.config.image_token_id
        (10, 3)
    """
    vocabulary = [PAD, EOS, UNKNOWN, IMAGE, "user", "assistant", ":", *words]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN, "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    square = {"height": _SIDE, "width": _SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": _SIDE}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    sizes: dict[str, Any] = {"hidden_size": hidden_size, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["intermediate_size"] = 2 * hidden_size
    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, **sizes, **ends),
        vision_config=CLIPVisionConfig(image_size=_SIDE, patch_size=_PATCH, projection_dim=hidden_size, **sizes),
        image_token_index=vocabulary.index(IMAGE),
        image_seq_length=(_SIDE // _PATCH) ** 2,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=0)
    return model.eval(), processor
