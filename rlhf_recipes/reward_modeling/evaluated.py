"""Metrics of all rows of an evaluation together, however they were cut into batches and shared by processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_recipes.reward_modeling.losses import untied_margins
from rlhf_recipes.reward_modeling.objective import objective_of_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlhf_recipes.reward_modeling.config import PreferenceConfig

_TARGETS = ("label", "margin", "ranks", "best", "ratings")


class EvaluatedRows:
    """Keeps the scores and targets of the rows of an evaluation, each row once, and measures them as one batch.

    The mean of the means of batches is another number as soon as a batch is smaller, or has fewer pairs. With several
    processes the last batches are filled up with rows that were there before; these are dropped.

    Args:
        accelerator: That of the trainer.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._parts: list[dict[str, Tensor]] = []

    def add(self, batch: dict[str, Tensor], scores: Tensor, losses: Tensor | None = None) -> None:
        """Keep a batch of every process. All of them must call it, in the same order.

        Args:
            batch: What `PreferenceCollator` made: `group_mask` `(N, K)` and targets.
            scores: Scores of the completions, shape `(N, K)`.
            losses: For targets per token: the loss of each completion, shape `(N, K)`.
        """
        rows = {name: batch[name] for name in _TARGETS if name in batch}
        rows |= {"group_mask": batch["group_mask"].long(), "scores": scores}
        if losses is not None:
            rows["losses"] = losses
        rows = self._accelerator.pad_across_processes({name: part.detach() for name, part in rows.items()}, dim=1)
        self._parts.append(self._accelerator.gather_for_metrics(rows))

    def summary(self, config: PreferenceConfig) -> dict[str, float]:
        """Measure all rows.

        Args:
            config: Says which loss.

        Returns:
            `loss`; `min_reward`, `mean_reward` and `max_reward` over all completions; and, if there are untied pairs,
            `accuracy` and `margin` over all of these. Nothing, if there was no row.
        """
        if not self._parts:
            return {}
        rows = {name: _concatenated([part[name] for part in self._parts]) for name in self._parts[0]}
        rows["group_mask"] = mask = rows["group_mask"].bool()
        raw = rows["scores"][mask]
        metrics = {"loss": objective_of_rows(config, rows, rows["scores"], rows.get("losses"))}
        metrics |= {"min_reward": raw.min(), "mean_reward": raw.double().mean(), "max_reward": raw.max()}
        margins = untied_margins(rows["scores"], rows["ranks"], mask) if "ranks" in rows else raw[:0]
        if len(margins):
            metrics |= {"accuracy": (margins > 0).double().mean(), "margin": margins.double().mean()}
        return {name: value.item() for name, value in metrics.items()}


def _concatenated(parts: list[Tensor]) -> Tensor:
    """Concatenate batches, padded to the widest."""
    if parts[0].dim() == 1:
        return torch.cat(parts)
    width = max(part.size(1) for part in parts)
    return torch.cat([pad(part, (0, width - part.size(1))) for part in parts])
