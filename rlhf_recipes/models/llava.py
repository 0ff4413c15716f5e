"""LLaVA with a score head, of which transformers has none."""

from __future__ import annotations

from transformers import LlavaPreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class LlavaForSequenceClassification(GenericForSequenceClassification, LlavaPreTrainedModel):
    """LLaVA that gives a text with pictures a score, at its last token that is not padding.

    Its weights have the names that `LlavaForConditionalGeneration` gives them, so that an adapter of the one fits the
    other. It is called with `input_ids`, `attention_mask` and `pixel_values`.

    Example:
        >>> from rlhf_recipes.models.tiny_vision import tiny_llava
        >>> model, processor = tiny_llava(["red", "which", "colour"])
        >>> model.config.num_labels = 1
        >>> scorer = LlavaForSequenceClassification(model.config)
        >>> scorer(**processor.tokenizer("red colour", return_tensors="pt")).logits.shape
        torch.Size([1, 1])
    """
