"""Losses of targets per token."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from rlhf_recipes.masks import check_shapes


def token_loss(token_scores: Tensor, labels: Tensor, mask: Tensor, kind: Literal["mse", "bce"] = "mse") -> Tensor:
    """Error of the score at each token against a target at each token, averaged over the tokens of a sequence.

    The mask is 1 at the tokens with a target: never at the prompt, whose tokens carry no loss.

    Args:
        token_scores: Score at each token, shape `(B, T)`.
        labels: Target at each token, shape `(B, T)`: in reward units for `"mse"`; a probability for `"bce"`.
        mask: 1 where a token has a target, shape `(B, T)`.
        kind: `"mse"` for the squared error; `"bce"` for the cross-entropy of `sigmoid(score)`.

    Returns:
        The mean over each sequence's tokens with a target, shape `(B,)`; 0 where there is none.

    Raises:
        ValueError: If the shapes differ, the kind is not one of those named, or a target of `"bce"` is not in [0, 1].

    Example:
        >>> import torch
        >>> token_scores, labels = torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0]])
        >>> token_loss(token_scores, labels, mask=torch.tensor([[0, 1, 1]])).tolist()
        [2.0]
    """
    check_shapes(mask, token_scores=token_scores, labels=labels)
    counts = mask.bool()
    token_scores, labels = (tensor.masked_fill(~counts, 0.0) for tensor in (token_scores, labels.to(token_scores)))
    if kind == "mse":
        losses = mse_loss(token_scores, labels, reduction="none")
    elif kind == "bce":
        if ((labels < 0) | (labels > 1)).any():
            raise ValueError("A target of 'bce' is a probability in [0, 1]. Rescale the labels, or use 'mse'.")
        losses = binary_cross_entropy_with_logits(token_scores, labels, reduction="none")
    else:
        raise ValueError(f"`kind` must be 'mse' or 'bce', got {kind!r}.")
    return losses.masked_fill(~counts, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
