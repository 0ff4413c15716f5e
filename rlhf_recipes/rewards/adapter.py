"""A reward model that is an adapter on the policy's own base."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_recipes.models.image_embeddings import Pixels
    from rlhf_recipes.models.readout import Readout
    from rlhf_recipes.models.roles import Roles
    from rlhf_recipes.rewards.record import RewardRecord


class AdapterReward:
    """Score prompt and completion with a reward adapter, on the token ids themselves.

    TRL scores reward models on decoded text without special tokens, where a finished completion looks like one that
    was cut off. The adapter shares the policy's tokenizer, so it reads the very tokens that were sampled, with the
    end token exactly where it was produced. It sees the pictures that the policy sees.

    Args:
        roles: The roles on the shared base.
        role: The role to score with.
        name: Name of the reward in the logs.
        pad_token_id: Padding id of the tokenizer.
        batch_size: Sequences per forward pass.
        readout: Which of the head's numbers make the score, with gain and bias.
        reads: Beside the score, what the adapter gives for the tokens: `"redistributed"`, its score split over them
            (`Readout.token_rewards`), from the same forward pass, or `"attention"`, its last token's attention. It
            writes that into the `RewardRecord` that it is called with.
    """

    reads_images = True

    def __init__(
        self,
        roles: Roles,
        role: str,
        name: str,
        pad_token_id: int,
        batch_size: int,
        readout: Readout,
        reads: Literal["score", "redistributed", "attention"] = "score",
    ) -> None:
        self.__name__ = name
        self.role, self.needs_reward_prompt = role, readout.reward_prompt
        self._reads = reads
        self._roles, self._readout = roles, readout
        self._options = (pad_token_id, batch_size)

    def __call__(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        reward_record: Sequence[RewardRecord] = (),
        reward_prompt_ids: list[list[int]] | None = None,
        pixels: list[Pixels | None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Return one score per completion, read after its reward prompt where the rows have one, and its pictures.

        Raises:
            ValueError: If a score is not finite; it names the completion. If the adapter was trained on reward
                prompts, and the rows have none.
        """
        self._readout.check_reward_prompts(self.__name__, reward_prompt_ids)
        before = prompt_ids if reward_prompt_ids is None else reward_prompt_ids
        sequences = [prompt + completion for prompt, completion in zip(before, completion_ids, strict=True)]
        embedded = None if pixels is None else self._roles.embed_prompts(before, pixels)
        prefixes = self._roles.prefix_scores(self.role, sequences, *self._options, embedded)
        lengths = [len(completion) for completion in completion_ids]
        tails = [scores[-length:] for scores, length in zip(prefixes, lengths, strict=True)]
        if reward_record and self._reads == "redistributed":
            reward_record[0].token_rewards[self.__name__] = [self._readout.token_rewards(tail) for tail in tails]
        elif reward_record and self._reads == "attention":
            weights = self._roles.last_token_attention(self.role, sequences, *self._options, embedded)
            reward_record[0].attention = [row[-length:] for row, length in zip(weights, lengths, strict=True)]
        scores = [self._readout.score(tail).item() for tail in tails]
        bad = [row for row, score in enumerate(scores) if not math.isfinite(score)]
        if bad:  # as `nan` it would count as a completion that this reward does not judge
            raise ValueError(
                f"The reward adapter {self.__name__!r} gives {scores[bad[0]]} for completion {bad[0]}: it diverged in "
                "its training. Train it again with a lower learning rate."
            )
        return scores
