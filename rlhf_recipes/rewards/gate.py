"""Two rewards as one by a rule, not by a sum: safety where a completion is unsafe, and helpfulness elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rlhf_recipes.rewards.combined import CombinedReward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def gate_scores(helpfulness: Tensor, safety: Tensor, threshold: float, unsafe: Tensor) -> tuple[Tensor, Tensor]:
    """Take the safety score where it says that a completion is unsafe or the prompt is tagged, else the helpfulness.

    Scores are linear, as reward models give them; their sigmoid is what the threshold is compared with, so that the
    result needs no logit to be linear again.

    Source: https://huggingface.co/papers/2307.09288, section 3.2.3 (`R_c`; its whitening is `score_scaling: batch`).

    Args:
        helpfulness: Scores of `B` completions, shape `(B,)`.
        safety: Scores of the same, shape `(B,)`.
        threshold: Probability of being safe below which the safety score counts, in (0, 1). Llama 2's is 0.15.
        unsafe: Whether the prompt is one that asks for unsafe completions, shape `(B,)`.

    Returns:
        The scores, and whether each is that of safety, both `(B,)`.

    Raises:
        ValueError: If the shapes differ, or the threshold is no probability between 0 and 1.

    Example:
        >>> helpfulness, safety = torch.tensor([3.0, 3.0, 3.0]), torch.tensor([-2.0, -1.0, 4.0])
        >>> gate_scores(helpfulness, safety, 0.15, unsafe=torch.tensor([False, False, True]))
        (tensor([-2.,  3.,  4.]), tensor([ True, False,  True]))
    """
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"`threshold` must be a probability between 0 and 1, both excluded, got {threshold}.")
    if not helpfulness.shape == safety.shape == unsafe.shape or helpfulness.dim() != 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (helpfulness, safety, unsafe))
        raise ValueError(f"Expected `helpfulness`, `safety` and `unsafe` of one shape, (B,), got {shapes}.")
    gated = unsafe.bool() | (safety.sigmoid() < threshold)
    return torch.where(gated, safety, helpfulness), gated


class GatedReward(CombinedReward):
    """Reward helpfulness where a completion is safe, and safety where it is not.

    `PPOTrainer(reward_funcs=GatedReward(...))` puts both adapters on the base that is in memory, and starts the critic
    from helpfulness. Each is read with its own gain and bias (`reward_model.json`): give the safety model the zero
    that the threshold means, on which a sigmoid is 0.5 (`recipes/normalize_reward.py`).

    Source: https://huggingface.co/papers/2307.09288, section 3.2.3.

    Args:
        helpfulness: Folder of a reward adapter, or a function with TRL's reward signature.
        safety: The same.
        threshold: Probability of being safe, the sigmoid of the safety score, below which it counts, in (0, 1).
        unsafe_column: Column of the prompts that says with true or false for which of them safety counts always.
        name: Name of the reward in the logs, which have the means `rewards/<name>/helpfulness` and
            `rewards/<name>/safety`, and the share `rewards/<name>/gated` of completions whose score is that of safety.

    Raises:
        ValueError: If a reward is missing or there twice, one is async, or the threshold is no probability.

    Example:
        >>> def long(completions, **kwargs):
        ...     return [float(len(text)) for text in completions]
        >>> def polite(completions, **kwargs):
        ...     return [-5.0 if "!" in text else 5.0 for text in completions]
        >>> GatedReward(long, polite, threshold=0.15)(completions=["certainly", "no!"])
        [9.0, -5.0]
    """

    kind: ClassVar[str] = "gate"

    def __init__(
        self,
        helpfulness: str | Path | Callable[..., Any],
        safety: str | Path | Callable[..., Any],
        threshold: float,
        unsafe_column: str | None = None,
        name: str = "gated",
    ) -> None:
        for argument, member in (("helpfulness", helpfulness), ("safety", safety)):
            if not isinstance(member, str | Path) and not callable(member):
                raise ValueError(
                    f"`{argument}` is {member!r}. A gate chooses between two rewards: give a folder or a function for "
                    "each. A single one is given as it is."
                )
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0.0 < threshold < 1.0:
            raise ValueError(
                f"`threshold` must be a probability between 0 and 1, both excluded, got {threshold!r}: below it the "
                "safety score counts. Llama 2's is 0.15."
            )
        super().__init__([helpfulness, safety], name)
        self.threshold, self.unsafe_column = threshold, unsafe_column

    @property
    def needed_columns(self) -> list[str]:
        """Columns of the rows that it cannot do without."""
        return [] if self.unsafe_column is None else [self.unsafe_column]

    def __call__(
        self, log_metric: Callable[[str, float], None] | None = None, reward_record: Any = None, **kwargs: Any
    ) -> list[float]:
        """Return one reward per completion. Members that reward tokens leave no trace in `reward_record`.

        Raises:
            ValueError: If the rows have no column of that name, or something else than true or false in it.
        """
        helpfulness, safety = self.member_scores(kwargs)
        rewards, gated = gate_scores(helpfulness, safety, self.threshold, self._unsafe(kwargs, len(safety)))
        if log_metric is not None:
            for what, values in (("helpfulness", helpfulness), ("safety", safety), ("gated", gated.double())):
                log_metric(f"rewards/{self.__name__}/{what}", values.mean().item())
        return rewards.tolist()

    def _unsafe(self, columns: dict[str, Any], count: int) -> Tensor:
        if self.unsafe_column is None:
            return torch.zeros(count, dtype=torch.bool)
        tags: Sequence[Any] | None = columns.get(self.unsafe_column)
        if tags is None:
            raise ValueError(
                f"The gate reads the column {self.unsafe_column!r}, which the rows do not have; they have "
                f"{sorted(columns)}. Add it, with true or false for each prompt, or leave `unsafe_column` out."
            )
        strange = [tag for tag in tags if not isinstance(tag, bool)]
        if strange:
            raise ValueError(
                f"The column {self.unsafe_column!r} has {strange[0]!r}, but must say true or false for each prompt."
            )
        return torch.tensor(tags)
