"""Texts of unlike length: prompts with their completions, and how a network reads them, packed or as padded rows.

`B` texts, `P` columns of prompts (padded on the left), `T` of completions (padded on the right), `W` columns in all,
`N` tokens in all, `L` tokens of the longest text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from rlhf_recipes.models.image_embeddings import EmbeddedPrompt, pad_prompts, positions_after

_GROUPS = 4  # of texts, which attention pads to their longest: more groups have less padding, and each costs calls


def scatter_tokens(tokens: Tensor, places: Tensor, *shape: int) -> Tensor:
    """Scatter tokens `(n, ...)` into a tensor of zeros.

    Args:
        tokens: Values of `n` tokens.
        places: For each token its place among all of `shape`, row by row, each a different one, shape `(n,)`.
        shape: Rows and columns.

    Returns:
        A tensor `(*shape, ...)`.

    Example:
        >>> scatter_tokens(torch.tensor([5, 6]), torch.tensor([3, 0]), 2, 2)
        tensor([[6, 0],
                [0, 5]])
    """
    zeros = tokens.new_zeros(math.prod(shape), *tokens.shape[1:])
    # `index_copy` would keep the tokens for its backward pass
    return zeros.index_put((places,), tokens).view(*shape, *tokens.shape[1:])


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences of like length, packed one after another, and their places in rows that attention pads.

    `N` tokens of `B` texts.

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
        arguments: The network's arguments besides the tokens.

    Example:
        >>> rows = Rows(torch.tensor([[0, 1, 1], [1, 0, 0]]), packed=True)
        >>> states = rows.join(torch.tensor([[0, 5, 6], [7, 0, 0]]))
        >>> states.tolist(), rows.arguments["position_ids"].tolist()
        ([[7, 5, 6]], [[0, 0, 1]])
        >>> rows.split(states).tolist()
        [[0, 5, 6], [7, 0, 0]]
        >>> rows.gather(states, torch.tensor([[1], [0]])).tolist()
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
            groups = _like_length(lengths[order], rows, positions)
            self.arguments = {"position_ids": positions[None], "sequence_groups": groups}
        else:
            self._starts = order * self._length
            self._places = self._starts[rows] + positions
            columns = torch.arange(self._length, device=mask.device)
            self.arguments = {"attention_mask": (columns < lengths[:, None]).long()}

    def join(self, values: Tensor) -> Tensor:
        """Values of the mask's columns `(B, W, ...)` as the network's `(1, N, ...)` or `(B, L, ...)`."""
        tokens = values.flatten(0, 1)[self._columns]
        return tokens[None] if self._packed else scatter_tokens(tokens, self._places, len(values), self._length)

    def network_input(
        self, tokens: Tensor, positions: Tensor | None = None, types: Tensor | None = None
    ) -> dict[str, Any]:
        """What a network is called with for its tokens.

        Args:
            tokens: Ids of the mask's columns, shape `(B, W)`, or embeddings of them, `(B, W, H)`.
            positions: Of the mask's columns, on each axis of a grid, `(B, W, axes)`; `None`: tokens are counted.
            types: 1 where a column is of a picture, whose tokens attend to each other, `(B, W)`; `None`: none do.
        """
        given = {"input_ids" if tokens.dim() == 2 else "inputs_embeds": self.join(tokens), **self.arguments}
        if positions is not None:
            given["position_ids"] = self.join(positions).movedim(-1, 0)
        if types is not None:
            given["token_type_ids"] = self.join(types)
        return given

    def split(self, states: Tensor) -> Tensor:
        """Undo `join`: `(B, W, ...)`, 0 where there is no token."""
        tokens = states[0] if self._packed else states.flatten(0, 1)[self._places]
        return scatter_tokens(tokens, self._columns, *self._mask_shape)

    def places(self, positions: Tensor) -> Tensor:
        """Places among all of the network's states of positions `(B, t)` of the texts: `(B, t)`."""
        return self._starts[:, None] + positions

    def gather(self, states: Tensor, positions: Tensor) -> Tensor:
        """Gather the network's states at positions `(B, t)` of the texts: `(B, t, ...)`."""
        places = self.places(positions)
        return states.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, *states.shape[2:])


def _like_length(lengths: Tensor, rows: Tensor, positions: Tensor) -> list[SequenceGroup]:
    """Groups of texts in the order of their `lengths` `(B,)`, from text `rows` and position of each token, `(N,)`."""
    size, groups, start = math.ceil(len(lengths) / _GROUPS), [], 0
    counts = lengths.tolist()  # once for all groups, since a GPU waits for it
    for first, group in zip(range(0, len(lengths), size), lengths.split(size), strict=True):
        longest, count = max(counts[first : first + size]), sum(counts[first : first + size])
        if count:
            columns = torch.arange(longest, device=lengths.device)
            sources = (group.cumsum(dim=0) - group)[:, None] + columns.minimum(group[:, None] - 1)
            tokens = slice(start, start + count)
            groups.append(SequenceGroup(sources, (rows[tokens] - first) * longest + positions[tokens]))
            start += count
    return groups


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | None = None, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to the longest one.

    Args:
        rows: Token ids, `B` rows.
        pad_token_id: What is put where a row has no token.
        device: Where the tensors go.
        side: Where the padding is, `"right"` or `"left"`, as of prompts.

    Returns:
        Token ids, and a mask with 1 where there is a token, each `(B, L)`.

    Example:
        >>> ids, mask = pad_rows([[5, 6], [7]], 0, side="left")
        >>> ids.tolist(), mask.tolist()
        ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, True, float(pad_token_id), side)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], True, 0.0, side)
    return ids.to(device), mask.to(device)


OF_PROMPT, OF_COMPLETION = {"columns": "prompt"}, {"columns": "completion"}  # what the columns of a field are


@dataclass(frozen=True)
class Texts:
    """Prompts with their completions, padded as TRL pads them.

    Attributes:
        prompt_ids: Token ids of the prompts, padded on the left, shape `(B, P)`.
        prompt_mask: 1 where there is a token, shape `(B, P)`.
        completion_ids: Token ids of the completions, padded on the right, shape `(B, T)`.
        completion_mask: 1 where a token counts, shape `(B, T)`.
        prompt_embeds: Embeddings of prompts with pictures, which a network reads in place of their ids, shape
            `(B, P, H)`; `None` without pictures.
        prompt_positions: Positions of their tokens in time, height and width, shape `(B, P, 3)`; `None` where the
            model counts tokens.
        prompt_types: 1 at the tokens of pictures, shape `(B, P)`, where these attend to each other; else `None`.

    Example:
        >>> ids, mask = torch.tensor([[0, 5, 6], [0, 0, 7]]), torch.tensor([[0, 1, 1], [0, 0, 1]])
        >>> texts = Texts(prompt_ids=ids, prompt_mask=mask, completion_ids=ids.flip(1), completion_mask=mask.flip(1))
        >>> texts.lengths.tolist(), texts.trimmed().prompt_ids.tolist()
        ([4, 2], [[5, 6], [0, 7]])
    """

    prompt_ids: Tensor = field(metadata=OF_PROMPT, kw_only=True)
    prompt_mask: Tensor = field(metadata=OF_PROMPT, kw_only=True)
    completion_ids: Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    completion_mask: Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    prompt_embeds: Tensor | None = field(default=None, metadata=OF_PROMPT, kw_only=True)
    prompt_positions: Tensor | None = field(default=None, metadata=OF_PROMPT, kw_only=True)
    prompt_types: Tensor | None = field(default=None, metadata=OF_PROMPT, kw_only=True)

    @staticmethod
    def padded(
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        pad_token_id: int,
        device: torch.device | None = None,
        embedded: Sequence[EmbeddedPrompt] | None = None,
    ) -> Texts:
        """Pad texts that are lists of token ids: prompts on the left, completions on the right.

        Args:
            prompt_ids: Token ids of `B` prompts.
            completion_ids: Token ids of their completions.
            pad_token_id: What is put where there is no token.
            device: Where the tensors go.
            embedded: The prompts as embeddings, where they have pictures.

        Example:
            >>> texts = Texts.padded([[5, 6], [7]], [[8], [9, 1]], 0)
            >>> texts.prompt_ids.tolist(), texts.completion_mask.tolist()
            ([[5, 6], [0, 7]], [[1, 0], [1, 1]])
        """
        prompts, prompt_mask = pad_rows(prompt_ids, pad_token_id, device, side="left")
        completions, completion_mask = pad_rows(completion_ids, pad_token_id, device)
        return Texts(
            prompt_ids=prompts,
            prompt_mask=prompt_mask,
            completion_ids=completions,
            completion_mask=completion_mask,
            **pad_prompts(embedded),
        )

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, prompt and completion, shape `(B,)`."""
        return self.prompt_mask.sum(dim=1) + self.completion_mask.sum(dim=1)

    @property
    def ids(self) -> Tensor:
        """Token ids of prompts and completions side by side, shape `(B, P + T)`."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def positions_before(self) -> Tensor:
        """Positions in the texts from which each completion token is predicted, `(B, T)`; of padding the last one."""
        first = self.prompt_mask.sum(dim=1, keepdim=True) - 1
        positions = first + torch.arange(self.completion_mask.size(1), device=first.device)
        return positions.minimum(self.lengths[:, None] - 1)

    def rows(self, packed: bool) -> Rows:
        """The texts as a network reads them, packed or padded."""
        return Rows(torch.cat([self.prompt_mask, self.completion_mask], dim=1), packed)

    def network_input(self, rows: Rows, embeddings: nn.Module) -> dict[str, Any]:
        """What a network is called with for the texts: ids, or embeddings where prompts have pictures.

        Args:
            rows: The texts as the network reads them.
            embeddings: Its embeddings of tokens.
        """
        if self.prompt_embeds is None:
            return rows.network_input(self.ids)
        embeds = torch.cat([self.prompt_embeds, embeddings(self.completion_ids).to(self.prompt_embeds)], dim=1)
        positions, types = self.prompt_positions, self.prompt_types
        if positions is not None:
            positions = torch.cat([positions, positions_after(positions, self.completion_ids.size(1))], dim=1)
        if types is not None:
            types = torch.cat([types, torch.zeros_like(self.completion_ids)], dim=1)
        return rows.network_input(embeds, positions, types)

    def trimmed(self) -> Self:
        """Cut off the columns in which no text has a token, at least one of each left. The tensors are views."""
        prompt, completion = (int(count_columns(mask)) for mask in (self.prompt_mask, self.completion_mask))
        cut: dict[str, Tensor] = {}
        for attribute in fields(self):
            value = getattr(self, attribute.name)
            if value is not None and (columns := attribute.metadata.get("columns")):
                cut[attribute.name] = value[:, -prompt:] if columns == "prompt" else value[:, :completion]
        return replace(self, **cut)

    def by_length(self, batch_size: int) -> Iterator[tuple[Tensor, Texts]]:
        """Split into parts of texts of like length, each trimmed to its longest.

        Args:
            batch_size: Texts of a part.

        Yields:
            The indices of the texts `(b,)`, and the part.
        """
        order = self.lengths.argsort(descending=True, stable=True)  # the largest first: what fits, fits
        for rows in order.split(batch_size):
            yield rows, self.select(rows).trimmed()

    def select(self, rows: Tensor | slice) -> Texts:
        """The texts of some rows, without what subclasses add."""
        tensors = {each.name: getattr(self, each.name) for each in fields(Texts)}
        return Texts(**{name: value[rows] for name, value in tensors.items() if value is not None})


def count_columns(mask: Tensor) -> Tensor:
    """Number of columns of a mask `(B, L)` in which some row has a token, at least 1."""
    return mask.any(dim=0).sum().clamp(min=1)


def scatter_rows(parts: list[tuple[Tensor, Tensor]], length: int, left: bool = False) -> Tensor:
    """Scatter what was computed of the parts of `Texts.by_length` back into one batch.

    Args:
        parts: For each part the indices of its rows `(b,)` and a tensor `(b, t, ...)` with `t` at most `length`.
        length: `T`, or `P`.
        left: Whether what was cut off was on the left, as of prompts.

    Returns:
        A tensor `(B, T, ...)` in the order of the batch, 0 where a part was cut off.

    Example:
        >>> scatter_rows([(torch.tensor([1]), torch.ones(1, 2)), (torch.tensor([0]), torch.ones(1, 1))], 2)
        tensor([[1., 0.],
                [1., 1.]])
    """
    count = sum(len(rows) for rows, _ in parts)
    first = parts[0][1]
    batch = first.new_zeros(count, length, *first.shape[2:])
    for rows, values in parts:
        columns = slice(length - values.size(1), None) if left else slice(values.size(1))
        batch[rows, columns] = values
    return batch
