"""Several reward adapters as one reward, which trusts them less where they disagree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import Tensor

from rlhf_recipes.rewards.combined import CombinedReward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Aggregation = Literal["mean", "min", "mean_minus_std"]


def aggregate_scores(scores: Tensor, aggregation: Aggregation, k: float = 1.0) -> tuple[Tensor, Tensor]:
    """Combine the scores of several reward models into one reward.

    Source: https://huggingface.co/papers/2310.02743: the mean, and the worst case (minimum);
    https://huggingface.co/papers/2401.00243: adapters on one base, and the mean minus the weighted standard deviation.

    Args:
        scores: Score of each member for each completion (reward units), shape `(M, B)`.
        aggregation: `"mean"`, `"min"`, or `"mean_minus_std"`, the mean minus `k` standard deviations.
        k: How much disagreement costs.

    Returns:
        The rewards and the disagreement (population standard deviation over the members), shapes `(B,)`.

    Raises:
        ValueError: If `scores` is not `(M, B)` with `M` of at least 2.

    Example:
        >>> import torch
        >>> rewards, disagreement = aggregate_scores(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), "mean_minus_std", k=0.5)
        >>> rewards, disagreement
        (tensor([1.5000, 2.0000]), tensor([1., 0.]))
    """
    if scores.dim() != 2 or len(scores) < 2:
        raise ValueError(f"Expected scores (M, B) of two or more members, got shape {tuple(scores.shape)}.")
    disagreement = scores.std(dim=0, correction=0)
    if aggregation == "min":
        return scores.amin(dim=0), disagreement
    penalty = k * disagreement if aggregation == "mean_minus_std" else 0.0
    return scores.mean(dim=0) - penalty, disagreement


class EnsembleReward(CombinedReward):
    """Score with several reward adapters on the policy's base, and log how much they disagree.

    `PPOTrainer(reward_funcs=EnsembleReward([...]))` puts the adapters on the base that is in memory. Each is read in
    its own way and normalised with its own gain and bias (`reward_model.json`), which makes them comparable.

    Args:
        members: Folders of reward adapters. Functions with TRL's reward signature, one number per completion, work
            too.
        aggregation: `"mean"`, `"min"`, or `"mean_minus_std"`, the mean minus `k` standard deviations.
        k: How much disagreement costs, 0 or more.
        name: Name of the reward in the logs; the mean disagreement is logged as `rewards/<name>/disagreement`.

    Raises:
        ValueError: If there are fewer than two members, one is there twice or async, or a value is out of range.

    Example:
        >>> def short(completions, **kwargs):
        ...     return [-float(len(text)) for text in completions]
        >>> def zero(completions, **kwargs):
        ...     return [0.0] * len(completions)
        >>> EnsembleReward([short, zero], "min")(completions=["abc", "a"])
        [-3.0, -1.0]
    """

    kind: ClassVar[str] = "ensemble"

    def __init__(
        self,
        members: Sequence[str | Path | Callable[..., Any]],
        aggregation: Aggregation = "mean",
        k: float = 1.0,
        name: str = "ensemble",
    ) -> None:
        if isinstance(members, str | Path) or len(members) < 2:
            raise ValueError(f"An ensemble needs a list of two or more members, got {members!r}.")
        if aggregation not in get_args(Aggregation):
            raise ValueError(f"`aggregation` must be one of {get_args(Aggregation)}, got {aggregation!r}.")
        if not 0.0 <= k < math.inf:
            raise ValueError(f"`k` must be a number from 0 upwards, got {k}.")
        super().__init__(members, name)
        self.aggregation, self.k = aggregation, k

    def __call__(
        self, log_metric: Callable[[str, float], None] | None = None, reward_record: Any = None, **kwargs: Any
    ) -> list[float]:
        """Return one reward per completion. Members that reward tokens leave no trace in `reward_record`."""
        rewards, disagreement = aggregate_scores(self.member_scores(kwargs), self.aggregation, self.k)
        if log_metric is not None:
            log_metric(f"rewards/{self.__name__}/disagreement", disagreement.mean().item())
        return rewards.tolist()
