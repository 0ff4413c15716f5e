"""What is judged of a completion: all of it, or what precedes the place where it could have stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.cuts import single_token_id
from rlhf_recipes.rewards.encoding import which_ended

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

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


class Truncation:
    """Cuts completions for whoever judges them; the policy is still trained on every token that it sampled.

    A completion that is cut is a whole text: it gets an end token, as the texts of the reward stage have one. One
    that cannot be cut stays as it is, and counts as unfinished even if it ended by itself. Without `tokens` nothing is
    cut, and the end token alone decides.

    Args:
        tokenizer: The policy's tokenizer.
        eos_token_ids: Ids that end a completion by itself.
        tokens: Texts of single tokens, such as ".", behind the first of which a completion is cut.
        start: First position of a completion, from 0, at which one counts.

    Raises:
        ValueError: If one of the texts is not a single token.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> tokenizer = word_tokenizer(["good", "."])  # with the ids 3 and 4; the end token is 1
        >>> cut = Truncation(tokenizer, [1], tokens=["."], start=1)
        >>> cut(["good . good", "good good"], [[3, 4, 3], [3, 3, 1]])
        (['good .', 'good good'], [[3, 4, 1], [3, 3, 1]], [True, False])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        tokens: Sequence[str] = (),
        start: int = 0,
    ) -> None:
        self._tokenizer, self._eos_token_ids, self._start = tokenizer, eos_token_ids, start
        self._stop_token_ids = [single_token_id(tokenizer, text) for text in tokens]
        own: Any = tokenizer.eos_token_id
        self._end = own if own in eos_token_ids else next(iter(eos_token_ids), own)

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[list[Any], list[list[int]], list[bool]]:
        """Return completions (texts or chats), their token ids, and whether each is finished, as they are judged."""
        finished = self.finished(completion_ids)
        if not self._stop_token_ids:
            return list(completions), [list(ids) for ids in completion_ids], finished
        judged, judged_ids = list(completions), [list(ids) for ids in completion_ids]
        for row in (row for row, done in enumerate(finished) if done):
            ids, _ = truncate(completion_ids[row], self._stop_token_ids, self._start)
            text: Any = self._tokenizer.decode(ids, skip_special_tokens=True)
            is_chat = not isinstance(completions[row], str)
            judged[row] = [{"role": "assistant", "content": text}] if is_chat else text
            judged_ids[row] = [*ids, self._end]
        return judged, judged_ids, finished

    def finished(self, completion_ids: Sequence[Sequence[int]], as_trl_counts: bool = False) -> list[bool]:
        """Return for each completion whether it counts as finished; to TRL, where nothing is cut, also by padding."""
        if self._stop_token_ids:
            return [truncate(ids, self._stop_token_ids, self._start)[1] for ids in completion_ids]
        padding: Any = [self._tokenizer.pad_token_id] if as_trl_counts else []
        return which_ended(len(completion_ids), completion_ids, {*self._eos_token_ids, *padding}, None)
