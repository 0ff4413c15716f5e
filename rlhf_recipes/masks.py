"""Masking and the check of shapes that all functions of this package share."""

from __future__ import annotations

from torch import Tensor


def counted(tensor: Tensor, mask: Tensor) -> Tensor:
    """Put 0 where the mask is 0, whatever stood there, and let no gradient through there.

    Args:
        tensor: Any quantity per token, shape `(B, T)`, or per sequence, shape `(B, 1)`.
        mask: 1 where a token counts, shape `(B, T)`.

    Returns:
        The quantity of each token, with zeros, shape `(B, T)`.

    Example:
        >>> import torch
        >>> counted(torch.tensor([[2.0, torch.nan]]), torch.tensor([[1, 0]])).tolist()
        [[2.0, 0.0]]
    """
    # Not `tensor * mask`, because nan * 0 and inf * 0 are nan.
    return tensor.masked_fill(~mask.bool(), 0.0)


def check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse tensors that do not have the shape of the mask.

    Args:
        mask: The mask, shape `(B, T)`.
        **tensors: Tensors by the names that the error is to call them.

    Raises:
        ValueError: If the shapes differ, or are not of two dimensions.

    Example:
        >>> import torch
        >>> check_shapes(torch.ones(2, 3), values=torch.ones(2, 1))
        Traceback (most recent call last):
        ValueError: `values` has shape (2, 1), but `mask` has shape (2, 3). ...
    """
    # Tensors of shape (B, 1) or (T,) would be broadcast to a wrong result without any sign.
    for name, tensor in tensors.items():
        if mask.dim() != 2 or tensor.shape != mask.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, but `mask` has shape {tuple(mask.shape)}. "
                "Give every tensor one entry per token, shape (B, T)."
            )
