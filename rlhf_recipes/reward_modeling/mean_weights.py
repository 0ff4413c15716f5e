"""The mean of several models' weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_weights(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average the weights of models of one shape, each tensor over all members.

    Source: https://huggingface.co/papers/2401.12187 (WARM), which averages the weights of reward models.

    Args:
        members: The weights of each model by their names; tensors of any shape.

    Returns:
        Their mean, added up in float64 and given back in the first member's dtype.

    Raises:
        ValueError: If there is no member, or two have other names or shapes.

    Example:
        >>> mean_weights([{"score": torch.tensor([1.0, 4.0])}, {"score": torch.tensor([3.0, 0.0])}])
        {'score': tensor([2., 2.])}
    """
    if not members:
        raise ValueError("There are no weights to average. Give those of two or more models.")
    first = members[0]
    shapes = [{name: tensor.shape for name, tensor in member.items()} for member in members]
    for number, found in enumerate(shapes):
        if strange := {name for name, _ in shapes[0].items() ^ found.items()}:
            raise ValueError(
                f"Models 0 and {number} differ in {len(strange)} weights: {min(strange)!r} is missing in one, or has "
                "another shape. Average models that started from the same base."
            )
    return {
        name: torch.stack([member[name].double() for member in members]).mean(dim=0).to(tensor.dtype)
        for name, tensor in first.items()
    }
