"""Rows: load them from the hub or from files, bring them into the columns that the trainers read, and check them."""

from rlhf_recipes.data.chat_templates import check_completions, end_token_ids
from rlhf_recipes.data.context import context_length
from rlhf_recipes.data.formats import (
    check_prompt_lengths,
    split_by_prompt,
    to_completions,
    to_preferences,
    to_prompts,
)
from rlhf_recipes.data.loading import load_rows
from rlhf_recipes.data.reward_prompts import with_graded_prompts
from rlhf_recipes.data.splits import load_splits
from rlhf_recipes.data.tokenized import check_tokenized

__all__ = [
    "check_completions",
    "check_prompt_lengths",
    "check_tokenized",
    "context_length",
    "end_token_ids",
    "load_rows",
    "load_splits",
    "split_by_prompt",
    "to_completions",
    "to_preferences",
    "to_prompts",
    "with_graded_prompts",
]
