"""Rewards per token from a model with a tokenizer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlhf_recipes.models.quantized import keep_4bit_differentiable
from rlhf_recipes.shaping import align_rewards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class TokenClassifierReward:
    """Pay each token of a completion what a token classifier gives it.

    The model reads the text of prompt and completion with its own tokenizer. Each of its rewards goes to the policy's
    token that holds the last character it judges; no reward is lost or doubled. Rewards on the prompt are left out.

    Args:
        model: A token classification model with one output.
        tokenizer: Its tokenizer, a fast one, because slow ones do not tell which characters a token is made of.
        policy_tokenizer: The tokenizer of the policy.
        batch_size: Texts per forward pass.

    Raises:
        ValueError: If the model has more than one output, its 4-bit weights are repacked, or the tokenizer is a slow
            one.
    """

    __name__ = "token_reward"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(
                f"The token classifier has {model.config.num_labels} outputs. Load it with `num_labels=1`: the output "
                "is the reward of a token."
            )
        if not tokenizer.is_fast:
            raise ValueError("The reward model's tokenizer gives no character offsets. Load it with `use_fast=True`.")
        keep_4bit_differentiable(model)
        self.model = model.eval()
        self._tokenizer, self._policy_tokenizer, self._batch_size = tokenizer, policy_tokenizer, batch_size

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[Any],
        completion_ids: list[list[int]],
        reward_prompt: list[Any] | None = None,
        images: Any = None,
        **kwargs: Any,
    ) -> list[list[float]]:
        """Return one list of rewards per completion, one reward per token of the policy.

        Where rows have a reward prompt, the model reads it in place of the prompt.

        Raises:
            ValueError: If the prompts have pictures, which a text says nothing of without a reward prompt.
        """
        if images is not None and reward_prompt is None:
            raise ValueError(
                "The token classifier reads text and does not see the pictures of these rows. Give a column "
                "`reward_prompt` with what it has to know of them."
            )
        spans = [token_spans(self._policy_tokenizer, ids) for ids in completion_ids]
        texts: list[Any] = [self._policy_tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        before = [self._prompt_text(prompt) for prompt in (prompts if reward_prompt is None else reward_prompt)]
        rewards = []
        for start in range(0, len(texts), self._batch_size):
            part = slice(start, start + self._batch_size)
            rewards += self._rewards(before[part], texts[part], spans[part])
        return rewards

    def _rewards(self, before: list[str], texts: list[str], spans: list[list[tuple[int, int]]]) -> list[list[float]]:
        both = [prompt + text for prompt, text in zip(before, texts, strict=True)]
        inputs = self._tokenizer(both, return_tensors="pt", padding=True, return_offsets_mapping=True)
        offsets, mask = inputs.pop("offset_mapping").tolist(), inputs["attention_mask"].tolist()
        logits = self.model(**inputs.to(self.model.device)).logits[..., 0].float().tolist()
        aligned = []
        for row, prompt in enumerate(before):
            own = [
                (logits[row][i], (max(start - len(prompt), 0), end - len(prompt)))
                for i, (start, end) in enumerate(offsets[row])
                if mask[row][i] and end > max(start, len(prompt))
            ]
            aligned.append(align_rewards([reward for reward, _ in own], [span for _, span in own], spans[row]))
        return aligned

    def _prompt_text(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        text: Any = self._policy_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return str(text)


def token_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Find the characters of the decoded text that each token is made of.

    Sampled ids need not be what the tokenizer would make of their text, so they are decoded, one more at a time.

    Args:
        tokenizer: The policy's tokenizer.
        ids: Token ids of a completion.

    Returns:
        `(start, end)` for each token, `end` excluded; an empty span for special tokens and for the first bytes of a
        character that only a later token completes.
    """
    spans, end = [], 0
    for count in range(1, len(ids) + 1):
        text: Any = tokenizer.decode(list(ids[:count]), skip_special_tokens=True)
        start, end = end, max(end, len(text.rstrip(_UNFINISHED)))
        spans.append((start, end))
    return spans
