"""A reward model that is an adapter on the policy's own base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_recipes.models.roles import Roles


class AdapterReward:
    """Score prompt and completion with a reward adapter, on the token ids themselves.

    TRL scores reward models on decoded text without special tokens, where a finished completion looks like one that
    was cut off. The adapter shares the policy's tokenizer, so it reads the very tokens that were sampled, with the
    end token exactly where it was produced.

    Args:
        roles: The roles on the shared base.
        role: The role to score with.
        name: Name of the reward in the logs.
        pad_token_id: Padding id of the tokenizer.
        batch_size: Sequences per forward pass.
    """

    def __init__(self, roles: Roles, role: str, name: str, pad_token_id: int, batch_size: int) -> None:
        self.__name__ = name
        self.role = role
        self._roles = roles
        self._pad_token_id = pad_token_id
        self._batch_size = batch_size

    def __call__(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """Return one score per completion."""
        sequences = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        scores: list[float] = self._roles.scores(self.role, sequences, self._pad_token_id, self._batch_size).tolist()
        return scores
