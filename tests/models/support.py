"""Texts for the tests of models and of PPO."""

import torch

from rlhf_recipes.models.rows import Texts


def make_texts(prompts, completions, spare=2, kind=Texts):
    """Texts of given lengths, with `spare` columns of padding more than the longest needs."""
    prompt, completion = max(prompts) + spare, max([1, *completions]) + spare
    prompt_mask = torch.tensor([[0] * (prompt - n) + [1] * n for n in prompts])
    completion_mask = torch.tensor([[1] * n + [0] * (completion - n) for n in completions])
    return kind(
        prompt_ids=torch.arange(prompt_mask.numel()).view_as(prompt_mask) + 100,
        prompt_mask=prompt_mask,
        completion_ids=torch.arange(completion_mask.numel()).view_as(completion_mask),
        completion_mask=completion_mask,
    )
