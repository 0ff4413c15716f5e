"""Judge a completion only up to where it could have stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from transformers import PreTrainedTokenizerBase


def truncate(ids: Sequence[int], stop_token_ids: Collection[int], start: int) -> tuple[list[int], bool]:
    """Cut a completion behind its first stop token at or after a position.

    Source: the post-processing of samples in https://huggingface.co/papers/1909.08593, section 3.1.1: passages are cut
    at the first full stop between 16 and 24 tokens.

    Args:
        ids: Token ids of a completion.
        stop_token_ids: Ids that may end it.
        start: First position, from 0, at which one counts.

    Returns:
        The ids up to and with the stop token, and whether there was one; without one all ids stay.

    Example:
        >>> truncate([7, 9, 7, 9, 7], stop_token_ids=[9], start=2)
        ([7, 9, 7, 9], True)
    """
    for position in range(start, len(ids)):
        if ids[position] in stop_token_ids:
            return list(ids[: position + 1]), True
    return list(ids), False


class TruncatedReward:
    """Pass truncated completions to another reward function, and give a fixed score to those that cannot be cut.

    The policy is still trained on all the tokens it sampled; only what is judged is shorter.

    Args:
        function: A reward function with TRL's signature that returns one number per completion.
        tokenizer: The policy's tokenizer, to make the text of the truncated completion.
        stop_token_ids: Ids that may end a completion.
        start: First position at which one counts.
        missing_score: Score of a completion without a stop token, in reward units.

    Example:
        >>> from types import SimpleNamespace
        >>> def length(completion_ids, **kwargs):
        ...     return [float(len(ids)) for ids in completion_ids]
        >>> tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
        >>> reward = TruncatedReward(length, tokenizer, stop_token_ids=[9], start=1)
        >>> reward(completions=["7 9 7", "7 7 7"], completion_ids=[[7, 9, 7], [7, 7, 7]])
        [2.0, -1.0]
    """

    def __init__(
        self,
        function: Callable[..., Any],
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Collection[int],
        start: int = 0,
        missing_score: float = -1.0,
    ) -> None:
        self.__name__ = getattr(function, "__name__", "truncated")
        self._function, self._tokenizer = function, tokenizer
        self._stop_token_ids, self._start, self._missing_score = stop_token_ids, start, missing_score

    def __call__(self, completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
        """Return one reward per completion."""
        cut = [truncate(ids, self._stop_token_ids, self._start) for ids in completion_ids]
        texts: list[Any] = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in cut]
        if completions and not isinstance(completions[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        if "finished" in kwargs:  # what was cut is a whole text
            kwargs["finished"] = [stopped for _, stopped in cut]
        rewards = self._function(completions=texts, completion_ids=[ids for ids, _ in cut], **kwargs)
        return [reward if stopped else self._missing_score for reward, (_, stopped) in zip(rewards, cut, strict=True)]
