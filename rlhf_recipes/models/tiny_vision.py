"""Small vision-language models from scratch, for machines that cannot download one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from rlhf_recipes.models.tiny import EOS, PAD, UNKNOWN
from rlhf_recipes.models.vision import without_videos

_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
_PATCH, _SIDE = 14, 28  # pixels: a picture of this side has four patches
_PIXELS = {"shortest_edge": 56**2, "longest_edge": 112**2}  # of a picture that a Qwen sees: fewest and most


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
    tokenizer = _tokenizer(words, "<image>")
    square = {"height": _SIDE, "width": _SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )
    sizes = _sizes(hidden_size)
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **_ENDS),
        vision_config=CLIPVisionConfig(image_size=_SIDE, patch_size=_PATCH, projection_dim=hidden_size, **sizes),
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=(_SIDE // _PATCH) ** 2,
        vision_feature_layer=-1,
    )
    return _ready(LlavaForConditionalGeneration(config)), processor


def tiny_qwen2_5_vl(
    words: Sequence[str], hidden_size: int = 32
) -> tuple[Qwen2_5_VLForConditionalGeneration, ProcessorMixin]:
    """Make a small Qwen2.5-VL with random weights (seed torch first), and its processor, for pictures without videos.

    Args:
        words: The vocabulary, each word once; words of texts are separated by spaces.
        hidden_size: Width `H` of both parts, a multiple of 32.

    Returns:
        The model, in float32 and in evaluation mode, and the processor, with a chat template. A picture has a token
        for every 28 x 28 pixels, 4 to 16 of them, between two more.

    Example:
        >>> model, processor = tiny_qwen2_5_vl(["red", "which", "colour"])
        >>> from PIL import Image
        >>> shown = {"type": "image", "image": Image.new("RGB", (56, 84))}
        >>> chat = [{"role": "user", "content": [shown, {"type": "text", "text": "which colour"}]}]
        >>> fields = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        >>> fields["image_grid_thw"].tolist(), (fields["input_ids"] == model.config.image_token_id).sum().item()
        ([[1, 6, 4]], 6)
    """
    start, image, end = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
    tokenizer = _tokenizer(words, image, start, end, "<|video_pad|>")
    processor = without_videos(Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(size=_PIXELS, patch_size=_PATCH),
        tokenizer=tokenizer,
        chat_template=_template(f"{start} {image} {end}"),
    )
    sizes = _sizes(hidden_size)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            # Half of a head's width is turned by positions: in time, height and width
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [hidden_size // 32] * 2 + [hidden_size // 16],
            },
            **sizes,
            **_ENDS,
        },
        vision_config={
            "depth": 2,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_heads": 4,
            "patch_size": _PATCH,
            "window_size": 2 * _SIDE,
            "fullatt_block_indexes": [1],
            "out_hidden_size": hidden_size,
        },
        image_token_id=tokenizer.vocab[image],
        video_token_id=tokenizer.vocab["<|video_pad|>"],
        vision_start_token_id=tokenizer.vocab[start],
        vision_end_token_id=tokenizer.vocab[end],
    )
    return _ready(Qwen2_5_VLForConditionalGeneration(config)), processor


def _tokenizer(words: Sequence[str], *special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words, with the tokens that stand for pictures."""
    vocabulary = [PAD, EOS, UNKNOWN, *special, "user", "assistant", ":", *words]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named: dict[str, Any] = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN, "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer


def _template(picture: str) -> str:
    """A chat template that writes `picture` in the place of one."""
    return (
        "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}" + picture + " {% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %} {% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )


def _sizes(hidden_size: int) -> dict[str, Any]:
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, **layers}


def _ready(model: Any) -> Any:
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=0)
    return model.eval()
