"""Score transforms: how the score of a completion is changed before it is placed on tokens.

`B` completions. A transform is any callable from scores `(B,)` and `Completions` to scores `(B,)` that has a `name`;
those of this package are in `normalization.py` and `penalties.py`. The order of the list counts: a penalty after
scaling keeps its size, one before is scaled with the score. Scores are in units of reward and carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


def _of_one_process(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Completions:
    """The scored completions, as far as transforms may know them.

    Attributes:
        token_ids: Tokens of each completion without padding, with the end token where it was sampled.
        finished: Whether each completion ended by itself, shape `(B,)`, bool.
        max_length: Tokens at which generation was cut off.
        sum_over_processes: Sums a tensor over all processes, for statistics of the whole batch.
        training: Whether statistics may be updated, which evaluation must not do.

    Raises:
        ValueError: If `finished` does not have one entry per completion.

    Example:
        >>> completions = Completions([[5, 7, 2], [5]], finished=torch.tensor([True, False]), max_length=8)
        >>> completions.lengths.tolist()
        [3, 1]
    """

    token_ids: list[list[int]]
    finished: Tensor
    max_length: int
    sum_over_processes: Callable[[Tensor], Tensor] = field(default=_of_one_process, repr=False)
    training: bool = True

    def __post_init__(self) -> None:
        if self.finished.shape != (len(self.token_ids),):
            raise ValueError(
                f"`finished` has shape {tuple(self.finished.shape)}, but there are {len(self.token_ids)} completions. "
                "Give one entry per completion, shape (B,)."
            )

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each completion, end token included, shape `(B,)`."""
        return torch.tensor([len(ids) for ids in self.token_ids], dtype=torch.long, device=self.finished.device)


class ScoreTransform(Protocol):
    """Any callable that changes scores; one with `state_dict` and `load_state_dict` is saved in checkpoints."""

    @property
    def name(self) -> str:
        """Name of the contribution in the logs."""

    def __call__(self, scores: Tensor, completions: Completions) -> Tensor:
        """Return the new scores, shape `(B,)`."""


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def apply_transforms(
    scores: Tensor, completions: Completions, transforms: Sequence[ScoreTransform]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply transforms one after the other, and keep account of what each one changed.

    Args:
        scores: Scores of the reward functions, shape `(B,)`.
        completions: The completions that were scored.
        transforms: The transforms in their order.

    Returns:
        The final scores, `(B,)`, and by the name of each transform what it added, `(B,)`: its output minus its input.
        Scores plus all contributions are the final scores, up to rounding. A name that comes twice gets `_2` the
        second time.

    Raises:
        ValueError: If there is not one score per completion, or a transform changes the shape.

    Example:
        >>> from rlhf_recipes.shaping.normalization import ClipScores
        >>> completions = Completions([[5, 2]], finished=torch.tensor([True]), max_length=8)
        >>> final, contributions = apply_transforms(torch.tensor([7.0]), completions, [ClipScores(-5.0, 5.0)])
        >>> final.tolist(), {name: added.tolist() for name, added in contributions.items()}
        ([5.0], {'clip_scores': [-2.0]})
    """
    if scores.shape != completions.finished.shape:
        raise ValueError(
            f"`scores` has shape {tuple(scores.shape)}, but there are {len(completions.token_ids)} completions. "
            "Give one score per completion, shape (B,)."
        )
    scores, contributions = scores.detach(), {}
    for name, transform in zip(_unique_names(transforms), transforms, strict=True):
        # A copy, because a transform that works in place would otherwise seem to have changed nothing.
        changed = transform(scores.clone(), completions).detach().to(scores)
        if changed.shape != scores.shape:
            raise ValueError(
                f"The score transform {name!r} returned shape {tuple(changed.shape)}; expected one score per "
                f"completion, {tuple(scores.shape)}."
            )
        contributions[name] = changed - scores
        scores = changed
    return scores, contributions


def transforms_state(transforms: Sequence[ScoreTransform]) -> dict[str, dict[str, Any]]:
    """Collect what a checkpoint has to keep of the transforms.

    Args:
        transforms: The transforms in their order.

    Returns:
        The state of each transform that has one, by its name as in `apply_transforms`. Those of this package can be
        written as JSON.

    Example:
        >>> from rlhf_recipes.shaping.normalization import ClipScores, SubtractReferenceMean
        >>> transforms_state([ClipScores(-5.0, 5.0), SubtractReferenceMean(0.5)])
        {'reference_mean': {'mean': 0.5}}
    """
    named = zip(_unique_names(transforms), transforms, strict=True)
    return {name: transform.state_dict() for name, transform in named if isinstance(transform, _Stateful)}


def load_transforms_state(transforms: Sequence[ScoreTransform], state: dict[str, dict[str, Any]]) -> None:
    """Give the transforms the state that a checkpoint kept.

    Args:
        transforms: The same transforms as at the time of the checkpoint.
        state: What `transforms_state` returned then.

    Raises:
        ValueError: If the state belongs to other transforms.

    Example:
        >>> from rlhf_recipes.shaping.normalization import SubtractReferenceMean
        >>> transform = SubtractReferenceMean()
        >>> load_transforms_state([transform], {"reference_mean": {"mean": 0.5}})
        >>> transform.mean
        0.5
    """
    named = dict(zip(_unique_names(transforms), transforms, strict=True))
    stateful = {name: transform for name, transform in named.items() if isinstance(transform, _Stateful)}
    if stateful.keys() != state.keys():
        raise ValueError(
            f"The checkpoint has the state of the score transforms {sorted(state)}, but this run needs that of "
            f"{sorted(stateful)}. Resume with the transforms of the run that wrote it."
        )
    for name, transform in stateful.items():
        transform.load_state_dict(state[name])


def _unique_names(transforms: Sequence[ScoreTransform]) -> list[str]:
    names: list[str] = []
    for transform in transforms:
        name, times = transform.name, 1
        while name in names:
            times += 1
            name = f"{transform.name}_{times}"
        names.append(name)
    return names
