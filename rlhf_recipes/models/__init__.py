"""Loading with LoRA and 4-bit weights, and adapters as roles on one base."""

from rlhf_recipes.models.adapters import is_adapter, load_policy
from rlhf_recipes.models.bases import load_policy_base, load_reward_base
from rlhf_recipes.models.loading import (
    load_causal_lm,
    load_image_classifier,
    load_image_model,
    load_processor,
    load_sequence_classifier,
    load_tokenizer,
    lora_config,
    model_options,
    quantization_config,
    upcast_trainable,
)
from rlhf_recipes.models.parameter_table import stage_table
from rlhf_recipes.models.quantized import keep_4bit_differentiable
from rlhf_recipes.models.reward import load_reward_model, start_from
from rlhf_recipes.models.roles import Roles
from rlhf_recipes.models.vision import language_layers

__all__ = [
    "Roles",
    "is_adapter",
    "keep_4bit_differentiable",
    "language_layers",
    "load_causal_lm",
    "load_image_classifier",
    "load_image_model",
    "load_policy",
    "load_policy_base",
    "load_processor",
    "load_reward_base",
    "load_reward_model",
    "load_sequence_classifier",
    "load_tokenizer",
    "lora_config",
    "model_options",
    "quantization_config",
    "stage_table",
    "start_from",
    "upcast_trainable",
]
