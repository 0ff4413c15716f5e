"""PPO-ptx: batches of a second data set, and the language-model loss on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from rlhf_recipes.models.sharding import call_inside
from rlhf_recipes.models.states import language_model_loss
from rlhf_recipes.ppo.prompts import check_is_dataset

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from rlhf_recipes.ppo.config import PPOConfig


class PretrainingTexts:
    """Batches of texts in an order that depends only on the seed and the batch's number, so that a run can resume.

    Args:
        dataset: Rows with a column `text`.
        tokenizer: The policy's tokenizer.
        args: `ptx_batch_size` texts in a batch, each cut off at `ptx_max_length` tokens; and the `seed` of the order,
            which is new in every pass over the data.

    Raises:
        TypeError: If it is no `Dataset`.
        ValueError: If there is no column `text`, or no row.
    """

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> None:
        check_is_dataset(dataset, "ptx_dataset")
        if not hasattr(dataset, "__len__"):
            raise TypeError("`ptx_dataset` is a stream, but its batches are drawn by number. Give a `Dataset`.")
        if "text" not in dataset.column_names or len(dataset) == 0:
            raise ValueError(
                f"The pretraining data set needs rows with a column 'text'; it has {len(dataset)} rows with "
                f"{dataset.column_names}."
            )
        self._texts: list[str] = list(dataset["text"])
        self._text_tokenizer = tokenizer
        self._batch_size = args.ptx_batch_size or args.per_device_train_batch_size
        self._max_length, self._seed = args.ptx_max_length, args.seed

    def batch(self, number: int) -> dict[str, Tensor]:
        """Tokenize the batch of a number, from 0: `input_ids` and `attention_mask`, each `(N, L)`."""
        places = range(number * self._batch_size, (number + 1) * self._batch_size)
        texts = [self._texts[self._index(place)] for place in places]
        encoded = self._text_tokenizer(
            text=texts, truncation=True, max_length=self._max_length, add_special_tokens=True
        )
        eos = self._text_tokenizer.eos_token_id
        rows = [torch.tensor([*ids, eos][: self._max_length]) for ids in encoded["input_ids"]]
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(rows, True, float(self._text_tokenizer.pad_token_id)).long(),
            "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True),
        }

    def loss(self, policy: Any, number: int, accelerator: Accelerator) -> Tensor:
        """Language-model loss of a policy on the batch of a number, a scalar in nats per token."""
        batch, embeddings = self.batch(number), policy.get_input_embeddings().weight.size(0)
        if (largest := int(batch["input_ids"].max())) >= embeddings:
            raise ValueError(
                f"A text of `ptx_dataset` has the token {largest}, and the embeddings of the model end at "
                f"{embeddings - 1}. Give the model's own tokenizer."
            )
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        trunk: Any = policy.get_base_model() if isinstance(policy, PeftModel) else policy

        def loss_of_batch() -> Tensor:
            """Run the trunk, and make logits of its states in pieces."""
            hidden_states = trunk.base_model(**batch, use_cache=False).last_hidden_state
            return language_model_loss(hidden_states, **batch, head=policy.get_output_embeddings())

        with accelerator.autocast():
            return call_inside(policy, loss_of_batch)

    def _index(self, place: int) -> int:
        passed, position = divmod(place, len(self._texts))
        generator = torch.Generator().manual_seed(self._seed + passed)
        return int(torch.randperm(len(self._texts), generator=generator)[position])
