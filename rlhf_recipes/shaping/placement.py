"""Placements: which tokens of a completion are paid its score.

`B` completions, `T` completion tokens. Every `mask` is `(B, T)` with 1 where a token counts. Derive the returns from
the token rewards placed here (`rlhf_recipes.ppo.functional.gae`), never from the scores: rewards of one placement with
returns of another give advantages of the wrong sign.
"""

from __future__ import annotations

import torch
from torch import Tensor


def place_terminal(scores: Tensor, mask: Tensor) -> Tensor:
    """Pay the whole score on the last counted token.

    Source: https://huggingface.co/papers/1909.08593, section 2.

    Args:
        scores: One score per completion, in units of reward, shape `(B,)`.
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        Token rewards, shape `(B, T)`. Each row sums to its score, or is 0 if no token counts.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> place_terminal(torch.tensor([3.0]), torch.tensor([[1, 1, 1, 0]])).tolist()
        [[0.0, 0.0, 3.0, 0.0]]
    """
    _check_shapes(scores, mask)
    counts = mask.bool()
    counted_from_here = counts.flip(-1).cumsum(-1).flip(-1)
    return torch.where(counts & (counted_from_here == 1), scores[:, None], 0.0)


def place_uniform(scores: Tensor, mask: Tensor) -> Tensor:
    """Spread the score evenly over the counted tokens: `r / T` on each.

    Args:
        scores: One score per completion, in units of reward, shape `(B,)`.
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        Token rewards, shape `(B, T)`. Each row sums to its score, or is 0 if no token counts.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> place_uniform(torch.tensor([3.0]), torch.tensor([[1, 1, 1, 0]])).tolist()
        [[1.0, 1.0, 1.0, 0.0]]
    """
    _check_shapes(scores, mask)
    counts = mask.bool()
    share = scores[:, None] / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(counts, share, 0.0)


def _check_shapes(scores: Tensor, mask: Tensor) -> None:
    # Scores of shape (B, 1) would be broadcast to (B, B, T) without any sign.
    if scores.dim() != 1 or mask.dim() != 2 or len(scores) != len(mask):
        raise ValueError(
            f"`scores` has shape {tuple(scores.shape)} and `mask` has shape {tuple(mask.shape)}. "
            "Give one score per completion, shape (B,), and one mask entry per token, shape (B, T)."
        )
