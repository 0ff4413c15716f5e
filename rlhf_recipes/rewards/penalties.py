"""Penalties on whole completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class MissingEosPenalty:
    """Penalise completions that were cut off before their end token.

    A reward model reads a cut-off text as if it went on; the penalty says that not stopping is bad.

    Source: https://huggingface.co/papers/1909.08593, section 3.1.1 (a constant score); subtracting from the score
    follows TRL's PPO.

    Args:
        penalty: What is subtracted from the score, in reward units; not negative.
        eos_token_ids: Ids that end a completion.

    Raises:
        ValueError: If the penalty is negative.

    Example:
        >>> MissingEosPenalty(1.0, eos_token_ids=[2])(completion_ids=[[5, 2], [5, 6]])
        [0.0, -1.0]
    """

    __name__ = "missing_eos_penalty"

    def __init__(self, penalty: float, eos_token_ids: Sequence[int]) -> None:
        if penalty < 0.0:
            raise ValueError(f"`penalty` must not be negative, got {penalty}.")
        self.penalty = penalty
        self.eos_token_ids = frozenset(eos_token_ids)

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """Return 0 for each completion that ended and minus the penalty for each that did not."""
        return [0.0 if ids and ids[-1] in self.eos_token_ids else -self.penalty for ids in completion_ids]
