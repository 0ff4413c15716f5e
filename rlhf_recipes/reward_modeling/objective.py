"""The loss that a configuration asks for, of the scores of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_recipes.reward_modeling.losses import (
    best_of_k_loss,
    centering_loss,
    group_mean,
    pairwise_loss,
    plackett_luce_loss,
    ranking_loss,
    regression_loss,
    scaled_pairwise_loss,
    token_loss,
)

if TYPE_CHECKING:
    from rlhf_recipes.reward_modeling.config import PreferenceConfig


def preference_objective(
    config: PreferenceConfig, batch: dict[str, Tensor], scores: Tensor, token_scores: Tensor | None = None
) -> Tensor:
    """Loss of a batch: the mean over its prompts, with the centering term if there is one.

    Args:
        config: Says which loss.
        batch: What `PreferenceCollator` made.
        scores: Scores of the completions, shape `(N, K)`.
        token_scores: Scores at their tokens, shape `(S, T)`; for `objective: token`.

    Returns:
        The loss, a scalar.
    """
    losses = None if token_scores is None else completion_losses(config, batch, token_scores)
    return objective_of_rows(config, batch, scores, losses)


def completion_losses(config: PreferenceConfig, batch: dict[str, Tensor], token_scores: Tensor) -> Tensor | None:
    """Loss of each completion against the targets of its tokens, shape `(N, K)`; `None` where there are no targets."""
    if config.objective != "token":
        return None
    labels = batch["token_labels"]
    judged = batch["completion_mask"].bool() & labels.isfinite()
    return scatter_completions(token_loss(token_scores, labels, judged, config.token_loss), batch["group_mask"])


def objective_of_rows(
    config: PreferenceConfig, batch: dict[str, Tensor], scores: Tensor, losses: Tensor | None = None
) -> Tensor:
    """Loss of rows whose completions are scored: the mean over their prompts, as of `preference_objective`.

    Args:
        config: Says which loss.
        batch: `group_mask` `(N, K)` and the targets of the objective.
        scores: Scores of the completions, shape `(N, K)`.
        losses: What `completion_losses` gave; for `objective: token`.

    Returns:
        The loss, a scalar.
    """
    mask = batch["group_mask"]
    if losses is not None:
        return group_mean(losses, mask)
    loss = _loss(config, batch, scores, mask)
    if config.center_rewards_coefficient:
        loss = loss + config.center_rewards_coefficient * centering_loss(scores, mask)
    return loss


def scatter_completions(values: Tensor, mask: Tensor) -> Tensor:
    """Scatter one value per completion, first group first, to its place in `(N, K)`; 0 elsewhere.

    Example:
        >>> scatter_completions(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[True, True], [True, False]])).tolist()
        [[1.0, 2.0], [3.0, 0.0]]
    """
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _loss(config: PreferenceConfig, batch: dict[str, Tensor], scores: Tensor, mask: Tensor) -> Tensor:
    if config.objective == "pairwise":
        chosen, rejected = scores.unbind(dim=1)
        label, margin, noise = batch["label"], batch["margin"], config.label_noise
        if config.margin_use == "scale":
            return scaled_pairwise_loss(chosen, rejected, margin.nan_to_num(1.0), label, noise)
        margin = torch.zeros_like(margin) if config.margin_use == "ignore" else margin.nan_to_num(0.0)
        return pairwise_loss(chosen, rejected, label, margin, noise)
    if config.objective == "ranking":
        return ranking_loss(scores, batch["ranks"], mask, ties=config.ties, noise=config.label_noise)
    if config.objective == "plackett_luce":
        return plackett_luce_loss(scores, batch["ranks"], mask)
    if config.objective == "best_of_k":
        return best_of_k_loss(scores, batch["best"], mask)
    return regression_loss(scores, batch["ratings"], mask)
