"""Batches of judged groups: all completions of a prompt in one element, with people's judgements of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_recipes.models.images import ImageReader
    from rlhf_recipes.reward_modeling.config import Objective

Row = dict[str, Any]


def sequences_of(row: Row) -> list[list[int]]:
    """Token ids of the completions of a prepared row, each with its prompt: `K` lists.

    Example:
        >>> sequences_of({"chosen_ids": [5, 1], "rejected_ids": [6]})
        [[5, 1], [6]]
    """
    if row.get("completion_ids") is not None:
        sequences: list[list[int]] = row["completion_ids"]
        return sequences
    return [row["chosen_ids"], row["rejected_ids"]]


def ranks_of(row: Row) -> list[float] | None:
    """Return the ranks of a row's completions, whatever judgement it holds: lower is better, equal is a tie.

    Args:
        row: A row of the preference table, or of TRL's chosen and rejected, which is a pair that the first one wins.

    Returns:
        One number per completion, or `None` if nothing is said.

    Example:
        >>> ranks_of({"label": 0.5}), ranks_of({"ratings": [1.0, 4.0, 2.0]}), ranks_of({"chosen_ids": [5]})
        ([-0.5, -0.5], [-1.0, -4.0, -2.0], [-1.0, 0.0])
    """
    if row.get("label") is not None:
        return [-row["label"], row["label"] - 1.0]
    if row.get("ranks") is not None:
        return [float(rank) for rank in row["ranks"]]
    if row.get("best") is not None:
        return [float(index != row["best"]) for index in range(len(sequences_of(row)))]
    if row.get("ratings") is not None:
        return [-rating for rating in row["ratings"]]
    return [-1.0, 0.0] if "chosen" in row or "chosen_ids" in row else None


def pairs_of(row: Row) -> list[tuple[int, int, float]]:
    """List the pairs of completions that a row compares, with the probability that the first one wins.

    Example:
        >>> pairs_of({"completion_ids": [[5], [6], [7]], "ranks": [1, 2, 2]})
        [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5)]
    """
    ranks = ranks_of(row)
    if ranks is None:
        return []
    pairs = []
    for i, j in itertools.combinations(range(len(ranks)), 2):
        label = float(ranks[i] < ranks[j]) if ranks[i] != ranks[j] else 0.5
        if row.get("label") is not None:
            label = row["label"]
        elif label == 0.5 and row.get("ranks") is None and row.get("best") is not None:
            continue  # of two that were not chosen nothing is known
        pairs.append((i, j, label))
    return pairs


@dataclass
class PreferenceCollator(DataCollatorMixin):
    """Makes a batch of `N` prepared rows with up to `K` completions each, `S` completions in all.

    Its keys: `group_mask` `(N, K)`, true where there is a completion; `input_ids` and `attention_mask` `(S, T)`, the
    completions of the first row first; `ranks` `(N, K)`, if the rows compare; and the targets of the objective:
    `label` and `margin` `(N,)` (nan where there is no margin), `best` `(N,)`, `ratings` `(N, K)`, `token_labels`
    `(S, T)` (nan where there is none). With `per_token` also `completion_mask` `(S, T)`, 1 at the tokens after the
    prompt. With pictures also what the model's processor makes of them, for each of the `S` texts.

    Args:
        pad_token_id: What fills the ends of shorter sequences.
        objective: Whose targets to put into the batch.
        per_token: Whether the loss needs to know which tokens belong to the prompt.
        pad_to_multiple_of: Lengthen the batch to a multiple of this.
        images: What reads the pictures of rows; `None` without a processor.

    Example:
        >>> collate = PreferenceCollator(pad_token_id=0, objective="best_of_k")
        >>> rows = [{"completion_ids": [[5, 6], [5], [7]], "best": 1}, {"completion_ids": [[8], [9]], "best": 0}]
        >>> batch = collate(rows)
        >>> batch["group_mask"].tolist(), tuple(batch["input_ids"].shape), batch["best"].tolist()
        ([[True, True, True], [True, True, False]], (5, 2), [1, 0])
    """

    pad_token_id: int
    objective: Objective = "pairwise"
    per_token: bool = False
    pad_to_multiple_of: int | None = None
    images: ImageReader | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[Row]) -> dict[str, Tensor]:
        """Make the batch."""
        groups = [sequences_of(row) for row in examples]
        sequences = [ids for group in groups for ids in group]
        # First, because the size of the batch, by which the evaluation weighs its loss, is read off the first tensor.
        batch = {"group_mask": _filled([[True] * len(group) for group in groups], False)}
        batch["input_ids"] = self._pad(sequences, self.pad_token_id)
        batch["attention_mask"] = self._pad([[1] * len(ids) for ids in sequences], 0)
        if self.images is not None:
            pixels = zip(map(self.images.pixels, examples), groups, strict=True)
            of_texts = [values for values, group in pixels for _ in group]
            batch |= self.images.network_fields(batch["input_ids"], of_texts)
        ranks = [ranks_of(row) for row in examples]
        if None not in ranks:
            batch["ranks"] = _filled(ranks, 0.0)
        if self.objective == "pairwise":
            batch["label"] = torch.tensor([_or(row.get("label"), 1.0) for row in examples])
            batch["margin"] = torch.tensor([_or(row.get("margin"), torch.nan) for row in examples])
        elif self.objective == "best_of_k":
            batch["best"] = torch.tensor([row["best"] for row in examples])
        elif self.objective == "regression":
            batch["ratings"] = _filled([row["ratings"] for row in examples], 0.0)
        if self.per_token:
            lengths = [length for row in examples for length in row["prompt_lengths"]]
            inside = [[0] * n + [1] * (len(ids) - n) for ids, n in zip(sequences, lengths, strict=True)]
            batch["completion_mask"] = self._pad(inside, 0)
        if self.objective == "token":
            batch["token_labels"] = self._pad(
                [labels for row in examples for labels in row["token_labels"]], torch.nan
            )
        return batch

    def _pad(self, rows: Sequence[Sequence[float]], value: float) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        filler: Any = value  # TRL's type says whole numbers only
        padded: Tensor = pad(
            tensors, padding_value=filler, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        return padded


def _filled(rows: Sequence[Any], value: float | bool) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
