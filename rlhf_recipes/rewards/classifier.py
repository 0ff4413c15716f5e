"""A reward model with a base and a tokenizer of its own, an encoder or a decoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlhf_recipes.data.chat_templates import end_token_ids
from rlhf_recipes.data.context import context_length
from rlhf_recipes.models.quantized import keep_4bit_differentiable
from rlhf_recipes.rewards.encoding import encode, is_encoder, which_ended

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_recipes.models.readout import Readout


class ClassifierReward:
    """Score prompt and completion with a sequence classifier, in the format that it was trained on.

    TRL scores models on the text alone, without special tokens: an encoder never sees `[CLS]`, a decoder never an end
    token, and both give numbers that mean nothing.

    Args:
        model: A sequence classifier with one output, whole or with an adapter.
        tokenizer: Its tokenizer.
        name: Name of the reward in the logs.
        batch_size: Texts per forward pass.
        readout: Which numbers make the score, with gain and bias; `None`: the raw one.
        eos_token_ids: Ids that end a completion of the policy. One without is shown to a decoder without its end
            token. `None`: as the trainer passes (`PPOTrainer` does); with another one, all are finished.

    Raises:
        ValueError: If the model has more than one output, its embeddings do not hold all tokens, an encoder is to
            be read per token, or 4-bit weights are repacked (`keep_4bit_differentiable`).

    Example:
        >>> from transformers import LlamaConfig, LlamaForSequenceClassification
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> tokenizer = word_tokenizer(["how", "are", "you", "fine"])
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForSequenceClassification(LlamaConfig(vocab_size=7, num_labels=1, **sizes))
        >>> reward = ClassifierReward(model, tokenizer)
        >>> len(reward(prompts=["how are you "], completions=["fine"]))
        1
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "classifier",
        batch_size: int = 8,
        readout: Readout | None = None,
        eos_token_ids: Collection[int] | None = None,
    ) -> None:
        # An adapter's layers stay in the classifier that it wraps
        own: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        keep_4bit_differentiable(own)
        if model.config.num_labels != 1:
            raise ValueError(f"The reward model has {model.config.num_labels} outputs. Load it with `num_labels=1`.")
        self.encoder = is_encoder(own)
        if self.encoder and readout is not None and readout.readout != "last":
            raise ValueError(
                f"The reward model is an encoder ({type(own).__name__}), which has one score per text, but its "
                f"`readout` is {readout.readout!r}. Set it to 'last' in its reward_model.json."
            )
        _check_vocabulary(own, tokenizer, name)
        self.__name__ = name
        self.needs_reward_prompt = readout is not None and readout.reward_prompt
        self.model = own.eval().requires_grad_(False)
        self._tokenizer, self._batch_size, self._readout = tokenizer, batch_size, readout
        self._eos_token_ids, self._context = eos_token_ids, context_length(own)
        self._own_ends = [] if self.encoder else end_token_ids(own, tokenizer)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        finished: Sequence[bool] | None = None,
        reward_prompt: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Return one score per completion, read after its reward prompt where the rows have one.

        Raises:
            ValueError: As `scores`; or if the model was trained on reward prompts, and the rows have none.
        """
        if self._readout is not None:
            self._readout.check_reward_prompts(self.__name__, reward_prompt)
        ended = which_ended(len(prompts), completion_ids, self._eos_token_ids, finished)
        return self.scores(prompts if reward_prompt is None else reward_prompt, completions, ended)

    def scores(self, prompts: Sequence[Any], completions: Sequence[Any], finished: Sequence[bool]) -> list[float]:
        """Score completions.

        Args:
            prompts: `B` texts or chats.
            completions: `B` texts without special tokens, or chats.
            finished: Whether each ended with an end token.

        Returns:
            `B` scores in reward units.

        Raises:
            ValueError: If a text does not fit into the model's context, or a score is not finite; it names the row.
        """
        rows = [
            encode(
                self._tokenizer,
                prompt,
                completion,
                encoder=self.encoder,
                finished=done,
                end_ids=self._own_ends,
                sampled=True,
            )
            for prompt, completion, done in zip(prompts, completions, finished, strict=True)
        ]
        for row, (ids, _) in enumerate(rows):
            if self._context is not None and len(ids) > self._context:
                raise ValueError(
                    f"Row {row} has {len(ids)} tokens for the reward model {self.__name__!r}, whose context is "
                    f"{self._context}. Take shorter prompts, lower `max_completion_length`, or use a reward model "
                    "with a longer context."
                )
        scores: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            scores += self._batch(rows[start : start + self._batch_size])
        bad = [row for row, score in enumerate(scores) if not math.isfinite(score)]
        if bad:
            raise ValueError(
                f"The reward model {self.__name__!r} gives {scores[bad[0]]} for row {bad[0]}: it diverged."
            )
        return scores

    @torch.no_grad()
    def _batch(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        ids = [torch.tensor(row, device=self.model.device) for row, _ in rows]
        padding = self._tokenizer.pad_token_id
        # Padded on the right and masked, so that any id will do
        input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0 if padding is None else padding)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        if self.encoder:
            raw = self.model(input_ids=input_ids, attention_mask=mask).logits[:, 0].float()
            return (raw if self._readout is None else self._readout.apply(raw)).tolist()
        # Not the model's own logits: it looks for the last token that is not padding, by id
        inner, head = getattr(self.model, self.model.base_model_prefix), self.model.score
        hidden = inner(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        numbers: Tensor = head(hidden)[..., 0].float()
        tails = [row[start : len(own)] for row, (own, start) in zip(numbers, rows, strict=True)]
        return [float(tail[-1] if self._readout is None else self._readout.score(tail)) for tail in tails]


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    embeddings = model.get_input_embeddings().weight.size(0)
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= embeddings:
        raise ValueError(
            f"The tokenizer of the reward model {name!r} has the token {token!r} with the number {number}, and the "
            f"embeddings of the model end at {embeddings - 1}. Give the model's own tokenizer (`tokenizer`, "
            "`reward_processing_classes`), or call `model.resize_token_embeddings(len(tokenizer))` before training."
        )
