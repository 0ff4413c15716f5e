"""Rows: load them from the hub or from files, and bring them into the columns that the trainers read."""

from rlhf_recipes.data.formats import (
    check_prompt_lengths,
    split_by_prompt,
    to_completions,
    to_preferences,
    to_prompts,
)
from rlhf_recipes.data.loading import load_rows

__all__ = [
    "check_prompt_lengths",
    "load_rows",
    "split_by_prompt",
    "to_completions",
    "to_preferences",
    "to_prompts",
]
