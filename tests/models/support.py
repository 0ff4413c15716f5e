"""Texts and comparisons for the tests of models and of PPO."""

import torch
from torch.testing import assert_close

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


def assert_same_gradients(plain, other, x, reduce=torch.sum, **tolerance):
    """Two models give the same outputs, without and with gradients, and gradients by the input and by all trained.

    Args:
        plain: The model that is right.
        other: The model that is tried.
        x: Their input.
        reduce: Makes a scalar of the squares of an output.
        tolerance: Of `assert_close`.
    """
    found = []
    for model in (plain, other):
        given = x.clone().requires_grad_()
        output = model(given)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(reduce(output.square()), [given, *trained], allow_unused=True)
        with torch.no_grad():
            found.append([model(x), output, *(gradient for gradient in gradients if gradient is not None)])
    assert len(found[0]) == len(found[1]) > 3
    for expected, given in zip(*found, strict=True):
        assert given.dtype == expected.dtype
        assert_close(given, expected, **tolerance)
