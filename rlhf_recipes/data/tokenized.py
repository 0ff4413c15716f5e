"""Check the token ids that a trainer made of the rows, before it trains on them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict

from rlhf_recipes.data.context import context_length

if TYPE_CHECKING:
    from trl import RewardTrainer, SFTTrainer

logger = logging.getLogger(__name__)


def check_tokenized(trainer: SFTTrainer | RewardTrainer, given: DatasetDict) -> None:
    """Check the rows that a trainer kept, and warn about those that it left out without a word.

    `SFTTrainer` cuts a row at `max_length` and leaves it out if nothing of the completion remains; `RewardTrainer`
    leaves a pair out if one of its two texts is longer. Packed rows (SFT) are not the ones that were given, and are
    not counted.

    Args:
        trainer: The trainer, with its tokenized rows.
        given: The rows that it was made with, as `train` and `test`.

    Raises:
        ValueError: If no row of a split is left, one is longer than the model's context, or one is empty or has
            tokens that the model does not know.

    Example:
        >>> from types import SimpleNamespace
        >>> from transformers import LlamaConfig
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2, 3]]})
        >>> model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=2))
        >>> args = SimpleNamespace(max_length=None)
        >>> trainer = SimpleNamespace(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        >>> check_tokenized(trainer, DatasetDict(train=rows, test=rows))
        Traceback (most recent call last):
        ...
        ValueError: `input_ids` of the train rows: the longest has 3 tokens, but the model's context is 2. Set ...
    """
    model: Any = trainer.model  # TRL types what a trainer holds only in part
    args: Any = trainer.args
    datasets: dict[str, Any] = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
    vocabulary, context = model.config.get_text_config().vocab_size, context_length(model)
    for split, prepared in datasets.items():
        if "seq_lengths" not in prepared.column_names:
            _check_left_out(split, prepared, len(given[split]), args.max_length)
        for column in sorted({"input_ids", "chosen_ids", "rejected_ids"} & set(prepared.column_names)):
            _check_ids(f"`{column}` of the {split} rows", prepared[column], vocabulary, context)
        if "completion_ids" in prepared.column_names:
            sequences = [ids for group in prepared["completion_ids"] for ids in group]
            _check_ids(f"`completion_ids` of the {split} rows", sequences, vocabulary, context)


def _check_left_out(split: str, prepared: Dataset, total: int, max_length: int | None) -> None:
    if len(prepared) == 0:
        raise ValueError(
            f"None of the {total} {split} rows fits into `max_length` ({max_length} tokens). Raise `max_length`, or "
            "shorten the rows."
        )
    if len(prepared) < total and PartialState().is_main_process:
        left_out = total - len(prepared)
        logger.warning(
            "%d of %d %s rows do not fit into `max_length` (%s tokens) and are left out.",
            *(left_out, total, split, max_length),
        )


def _check_ids(name: str, rows: Any, vocabulary: int, context: int | None) -> None:
    lengths = [len(ids) for ids in rows]
    if min(lengths) == 0:
        raise ValueError(f"{name}: row {lengths.index(0)} has no tokens. Remove such rows.")
    if context is not None and max(lengths) > context:
        raise ValueError(
            f"{name}: the longest has {max(lengths)} tokens, but the model's context is {context}. Set `max_length` "
            f"to {context} or less, or use a model with a longer context."
        )
    lowest, highest = min(min(ids) for ids in rows), max(max(ids) for ids in rows)
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"{name} have token ids from {lowest} to {highest}, but the model knows 0 to {vocabulary - 1}. Use "
            "the tokenizer of the model."
        )
