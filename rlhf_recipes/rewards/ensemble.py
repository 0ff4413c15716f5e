"""Several reward adapters as one reward, which trusts them less where they disagree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from trl.trainer.utils import is_async_callable

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


class EnsembleReward:
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

    def __init__(
        self,
        members: Sequence[str | Path | Callable[..., Any]],
        aggregation: Aggregation = "mean",
        k: float = 1.0,
        name: str = "ensemble",
    ) -> None:
        if isinstance(members, str | Path) or len(members) < 2:
            raise ValueError(f"An ensemble needs a list of two or more members, got {members!r}.")
        paths = [str(Path(member).resolve()) for member in members if isinstance(member, str | Path)]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} is in the ensemble twice: the same model cannot disagree with itself.")
        if aggregation not in get_args(Aggregation):
            raise ValueError(f"`aggregation` must be one of {get_args(Aggregation)}, got {aggregation!r}.")
        if not 0.0 <= k < math.inf:
            raise ValueError(f"`k` must be a number from 0 upwards, got {k}.")
        if any(callable(member) and is_async_callable(member) for member in members):
            raise ValueError("An async function cannot be a member of an ensemble. Give it beside the ensemble.")
        self.__name__ = name
        self.members, self.aggregation, self.k = list(members), aggregation, k

    @property
    def needs_reward_prompt(self) -> bool:
        """Whether a member was trained on rows with a column `reward_prompt`."""
        return any(getattr(member, "needs_reward_prompt", False) for member in self.members)

    def with_members(self, functions: Sequence[Callable[..., Any]]) -> EnsembleReward:
        """Copy the ensemble with functions in place of its folders."""
        return EnsembleReward(functions, self.aggregation, self.k, self.__name__)

    def __call__(
        self, log_metric: Callable[[str, float], None] | None = None, reward_record: Any = None, **kwargs: Any
    ) -> list[float]:
        """Return one reward per completion. Members that reward tokens leave no trace in `reward_record`."""
        scores = torch.tensor([self._scores(member, kwargs) for member in self.members], dtype=torch.float64)
        rewards, disagreement = aggregate_scores(scores, self.aggregation, self.k)
        if log_metric is not None:
            log_metric(f"rewards/{self.__name__}/disagreement", disagreement.mean().item())
        return rewards.tolist()

    def _scores(self, member: Any, kwargs: dict[str, Any]) -> list[float]:
        if not callable(member):
            raise TypeError(f"The ensemble's member {member!r} is not loaded. Give the ensemble to `PPOTrainer`.")
        scores = [math.nan if score is None else score for score in member(**kwargs)]
        if not all(map(math.isfinite, scores)):
            name = getattr(member, "__name__", member)
            raise ValueError(f"The ensemble's member {name!r} gives {scores}; every completion needs a finite score.")
        return scores
