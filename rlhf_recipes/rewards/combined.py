"""One reward made of several: its members are put on the policy's base, and each is asked about every completion."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from trl.trainer.utils import is_async_callable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class CombinedReward:
    """What an ensemble and a gate share.

    Args:
        members: Folders of reward adapters, or functions with TRL's reward signature, one number per completion.
        name: Name of the reward in the logs.

    Attributes:
        members: The same; in a copy that `with_members` made, functions.

    Raises:
        ValueError: If a member is there twice, or async.
    """

    kind: ClassVar[str]

    def __init__(self, members: Sequence[str | Path | Callable[..., Any]], name: str) -> None:
        paths = [str(Path(member).resolve()) for member in members if isinstance(member, str | Path)]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} is in the {self.kind} twice: the same model cannot disagree with itself.")
        if any(callable(member) and is_async_callable(member) for member in members):
            raise ValueError(
                f"An async function cannot be a member of the {self.kind}. Give it beside the {self.kind}."
            )
        self.__name__, self.members = name, list(members)

    @property
    def needs_reward_prompt(self) -> bool:
        """Whether a member was trained on rows with a column `reward_prompt`."""
        return any(getattr(member, "needs_reward_prompt", False) for member in self.members)

    @property
    def reads_images(self) -> bool:
        """Whether every member sees the pictures of rows that have some: adapters and functions do."""
        text_readers = [member for member in self.members if hasattr(member, "needs_reward_prompt")]
        return all(getattr(member, "reads_images", False) for member in text_readers)

    def with_members(self, functions: Sequence[Callable[..., Any]]) -> CombinedReward:
        """Copy the reward with functions in place of its folders."""
        copied = copy.copy(self)
        copied.members = list(functions)
        return copied

    def member_scores(self, columns: dict[str, Any]) -> Tensor:
        """Score of each member for each completion, shape `(M, B)`, float64.

        Args:
            columns: What a reward function is called with.

        Raises:
            TypeError: If a member is a folder that is not loaded.
            ValueError: If a score is missing or not finite.
        """
        return torch.tensor([self._scores(member, columns) for member in self.members], dtype=torch.float64)

    def _scores(self, member: Any, columns: dict[str, Any]) -> list[float]:
        if not callable(member):
            raise TypeError(
                f"The {self.kind}'s member {member!r} is not loaded. Give the {self.kind} to `PPOTrainer`."
            )
        scores = [math.nan if score is None else score for score in member(**columns)]
        if not all(map(math.isfinite, scores)):
            name = getattr(member, "__name__", member)
            raise ValueError(
                f"The {self.kind}'s member {name!r} gives {scores}; every completion needs a finite score."
            )
        return scores
