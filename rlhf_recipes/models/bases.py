"""The base of a stage, and what reads its rows: a text model's tokenizer, or a vision-language model's processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_recipes.messages import image_columns
from rlhf_recipes.models.loading import (
    load_causal_lm,
    load_image_classifier,
    load_image_model,
    load_processor,
    load_sequence_classifier,
    model_options,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl import ModelConfig


def load_policy_base(
    model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Any], **source: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Load what writes answers to rows: a language model, or a vision-language model where they have pictures.

    Args:
        model_args: TRL's model arguments: the base, its weights and its attention.
        tokenizer: Its tokenizer.
        rows: The splits of a stage; `train` has a column `images` or `image`, or none.
        **source: `revision` and `trust_remote_code`.

    Returns:
        The model, and what trainers take as `processing_class`: the tokenizer, or the processor.

    Raises:
        ValueError: As of `load_causal_lm` and `load_processor`.
    """
    path, options = model_args.model_name_or_path, {**model_options(model_args), **source}
    if image_columns(rows["train"].column_names):
        return load_image_model(path, **options), load_processor(path, **source)
    return load_causal_lm(path, **options), tokenizer


def load_reward_base(
    model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Any], **source: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """The same with a new head of one output: the start of a reward model, which sees the pictures of rows."""
    path, options = model_args.model_name_or_path, {**model_options(model_args), **source}
    if image_columns(rows["train"].column_names):
        return load_image_classifier(path, **options), load_processor(path, **source)
    return load_sequence_classifier(path, **options), tokenizer
