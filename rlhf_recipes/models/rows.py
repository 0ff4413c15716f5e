"""Texts of unlike length as a network reads them: one after another, or as padded rows.

`B` texts, `W` columns, `N` tokens in all, `L` tokens of the longest text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GROUPS = 4  # of texts, which attention pads to their longest: more groups have less padding, and each costs calls


def spread(tokens: Tensor, places: Tensor, *shape: int) -> Tensor:
    """Put tokens `(n, ...)` to their places in a tensor of zeros.

    Args:
        tokens: Values of `n` tokens.
        places: For each token its place among all of `shape`, row by row, each a different one, shape `(n,)`.
        shape: Rows and columns.

    Returns:
        A tensor `(*shape, ...)`.

    Example:
        >>> spread(torch.tensor([5, 6]), torch.tensor([3, 0]), 2, 2)
        tensor([[6, 0],
                [0, 5]])
    """
    zeros = tokens.new_zeros(math.prod(shape), *tokens.shape[1:])
    # `index_copy` would keep the tokens for its backward pass
    return zeros.index_put((places,), tokens).view(*shape, *tokens.shape[1:])


@dataclass(frozen=True)
class Slots:
    """Where attention puts texts of like length that lie one after another, `N` tokens of `B` texts.

    Attributes:
        sources: For each place of the padded texts the token that goes there, shape `(B, L)`. Padding repeats a token:
            causal attention does not look behind a text's tokens, and this takes one pass less than zeros.
        places: For each token its place among the `B * L`, shape `(N,)`.
    """

    sources: Tensor
    places: Tensor

    def pad(self, values: Tensor) -> Tensor:
        """`(1, heads, N, D)` to `(B, heads, L, D)`."""
        tokens = values[0].transpose(0, 1).index_select(0, self.sources.flatten())
        return tokens.view(*self.sources.shape, *tokens.shape[1:]).transpose(1, 2)

    def unpad(self, values: Tensor) -> Tensor:
        """`(B, L, heads, D)` to `(1, N, heads, D)`."""
        return values.flatten(0, 1).index_select(0, self.places)[None]


class Rows:
    """Texts as a network reads them: one after another, the shortest first, or as rows padded on the right.

    Args:
        mask: 1 where there is a token, shape `(B, W)`; the tokens of a text lie together.
        packed: Whether the network can read them one after another.

    Attributes:
        arguments: What the network is given besides the tokens.

    Example:
        >>> rows = Rows(torch.tensor([[0, 1, 1], [1, 0, 0]]), packed=True)
        >>> states = rows.join(torch.tensor([[0, 5, 6], [7, 0, 0]]))
        >>> states.tolist(), rows.arguments["position_ids"].tolist()
        ([[7, 5, 6]], [[0, 0, 1]])
        >>> rows.split(states).tolist()
        [[0, 5, 6], [7, 0, 0]]
        >>> rows.take(states, torch.tensor([[1], [0]])).tolist()
        [[6], [7]]
    """

    def __init__(self, mask: Tensor, packed: bool) -> None:
        mask = mask.bool()
        lengths = mask.sum(dim=1)
        self._mask_shape, self._length = mask.shape, int(lengths.max())
        self._packed = packed and not bool((lengths == self._length).all())
        order = torch.arange(len(mask), device=mask.device)
        if self._packed:  # texts without a token at the end, so that the place before them is a token's
            order = lengths.where(lengths > 0, mask.size(1) + 1).argsort(stable=True)
        rows, columns = mask[order].nonzero(as_tuple=True)
        self._columns = order[rows] * mask.size(1) + columns
        positions = (mask.long().cumsum(dim=1) - 1).flatten()[self._columns]
        self.arguments: dict[str, Any]
        if self._packed:
            ends = lengths[order].cumsum(dim=0)
            self._starts = torch.empty_like(ends).scatter(0, order, ends - lengths[order])
            slots = _like_length(lengths[order], rows, positions)
            self.arguments = {"position_ids": positions[None], "slots": slots}
        else:
            self._starts = order * self._length
            self._places = self._starts[rows] + positions
            columns = torch.arange(self._length, device=mask.device)
            self.arguments = {"attention_mask": (columns < lengths[:, None]).long()}

    def join(self, values: Tensor) -> Tensor:
        """Values of the mask's columns `(B, W, ...)` as the network's `(1, N, ...)` or `(B, L, ...)`."""
        tokens = values.flatten(0, 1)[self._columns]
        return tokens[None] if self._packed else spread(tokens, self._places, len(values), self._length)

    def split(self, states: Tensor) -> Tensor:
        """Undo `join`: `(B, W, ...)`, 0 where there is no token."""
        tokens = states[0] if self._packed else states.flatten(0, 1)[self._places]
        return spread(tokens, self._columns, *self._mask_shape)

    def places(self, positions: Tensor) -> Tensor:
        """Places among all of the network's states of positions `(B, t)` of the texts: `(B, t)`."""
        return self._starts[:, None] + positions

    def take(self, states: Tensor, positions: Tensor) -> Tensor:
        """Take the network's states at positions `(B, t)` of the texts: `(B, t, ...)`."""
        places = self.places(positions)
        return states.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, *states.shape[2:])


def _like_length(lengths: Tensor, rows: Tensor, positions: Tensor) -> list[Slots]:
    """Slots for texts in the order of their `lengths` `(B,)`, from text `rows` and position of each token, `(N,)`."""
    size, found, start = math.ceil(len(lengths) / _GROUPS), [], 0
    counts = lengths.tolist()  # once for all groups, since a GPU waits for it
    for first, group in zip(range(0, len(lengths), size), lengths.split(size), strict=True):
        longest, count = max(counts[first : first + size]), sum(counts[first : first + size])
        if count:
            columns = torch.arange(longest, device=lengths.device)
            sources = (group.cumsum(dim=0) - group)[:, None] + columns.minimum(group[:, None] - 1)
            tokens = slice(start, start + count)
            found.append(Slots(sources, (rows[tokens] - first) * longest + positions[tokens]))
            start += count
    return found
