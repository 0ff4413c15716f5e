"""Padding that no pass has to compute: prompts and completions are joined, and rows of like length go together.

`B` rows, `P` prompt tokens (padded on the left), `T` completion tokens (padded on the right).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.models.rows import Rows


def text_rows(batch: dict[str, Tensor], packed: bool) -> Rows:
    """Prompt and completion of each row of a batch as one text, for a network that reads them packed, or padded."""
    return Rows(join_columns(batch, "mask"), packed)


def join_columns(batch: dict[str, Tensor], name: str) -> Tensor:
    """What belongs to prompts, `(B, P, ...)`, and to completions, `(B, T, ...)`, side by side: `(B, P + T, ...)`."""
    return torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], dim=1)


def positions_before(batch: dict[str, Tensor]) -> Tensor:
    """Positions in the texts from which each completion token is predicted, shape `(B, T)`.

    Those of padding are the last one's.
    """
    length = batch["completion_mask"].size(1)
    first = batch["prompt_mask"].sum(dim=1, keepdim=True) - 1
    positions = first + torch.arange(length, device=first.device)
    return positions.minimum(row_lengths(batch)[:, None] - 1)


def sequences(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a network reads of a batch: the token ids of prompts and completions, and their masks."""
    return {name: batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}


def trim(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut off the columns in which no row has a token: at the start of the prompts, at the end of the completions.

    Args:
        batch: `prompt_mask` `(B, P)` and `completion_mask` `(B, T)`, and tensors of the same rows: those named
            `prompt_...` of shape `(B, P, ...)`, all others of shape `(B, T, ...)` or without dimensions.

    Returns:
        The same, at least one column of each left. The tensors are views.

    Example:
        >>> masks = {"prompt_mask": torch.tensor([[0, 1, 1]]), "completion_mask": torch.tensor([[1, 0, 0]])}
        >>> {name: mask.tolist() for name, mask in trim(masks).items()}
        {'prompt_mask': [[1, 1]], 'completion_mask': [[1]]}
    """
    prompt, completion = (int(count_columns(batch[name])) for name in ("prompt_mask", "completion_mask"))
    cut = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() < 2:
            cut[name] = value
        else:
            cut[name] = value[:, -prompt:] if name.startswith("prompt_") else value[:, :completion]
    return cut


def count_columns(mask: Tensor) -> Tensor:
    """Number of columns of a mask `(B, L)` in which some row has a token, at least 1."""
    return mask.any(dim=0).sum().clamp(min=1)


def row_lengths(batch: dict[str, Tensor]) -> Tensor:
    """Tokens of each row, prompt and completion, shape `(B,)`."""
    return batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)


def by_length(batch: dict[str, Tensor], batch_size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Split a batch into parts of rows of like length, each cut to its longest row.

    Args:
        batch: As for `trim`.
        batch_size: Rows of a part.

    Yields:
        The indices of the rows `(b,)`, and the part.
    """
    order = row_lengths(batch).argsort(descending=True, stable=True)  # the largest first: what fits, fits
    for rows in order.split(batch_size):
        yield rows, trim({name: value[rows] for name, value in batch.items()})


def put_together(parts: list[tuple[Tensor, Tensor]], length: int, left: bool = False) -> Tensor:
    """Join what was computed of the parts of `by_length`.

    Args:
        parts: For each part the indices of its rows `(b,)` and a tensor `(b, t, ...)` with `t` at most `length`.
        length: `T`, or `P`.
        left: Whether what was cut off was on the left, as of prompts.

    Returns:
        A tensor `(B, T, ...)` in the order of the batch, 0 where a part was cut off.

    Example:
        >>> put_together([(torch.tensor([1]), torch.ones(1, 2)), (torch.tensor([0]), torch.ones(1, 1))], 2)
        tensor([[1., 0.],
                [1., 1.]])
    """
    count = sum(len(rows) for rows, _ in parts)
    first = parts[0][1]
    whole = first.new_zeros(count, length, *first.shape[2:])
    for rows, values in parts:
        columns = slice(length - values.size(1), None) if left else slice(values.size(1))
        whole[rows, columns] = values
    return whole


def sort_within_steps(micro_batches: list[dict[str, Tensor]], per_step: int) -> list[dict[str, Tensor]]:
    """Sort the rows of each optimizer step's micro-batches by length, so that they are padded less.

    Which rows make up a step stays as it is, so that the step is the same.

    Args:
        micro_batches: The micro-batches of a rollout, of one size, in their order.
        per_step: How many of them are accumulated to one optimizer step.

    Returns:
        As many micro-batches of the same size.
    """
    sorted_batches: list[dict[str, Tensor]] = []
    for start in range(0, len(micro_batches), per_step):
        group = micro_batches[start : start + per_step]
        rows = join(group)
        for part in row_lengths(rows).argsort(stable=True).chunk(len(group)):
            sorted_batches.append({name: value if value.dim() == 0 else value[part] for name, value in rows.items()})
    return sorted_batches


def join(batches: list[dict[str, Tensor]]) -> Any:
    """Put the micro-batches of a rollout together; numbers about the whole rollout are the same in all."""
    first = batches[0]
    return {name: first[name] if first[name].dim() == 0 else torch.cat([b[name] for b in batches]) for name in first}
