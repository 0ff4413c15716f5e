"""Make a reward model read its score where PPO will: at the end token of a finished completion."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn

from rlhf_recipes.data.chat_templates import (
    check_prompts_stay_open,
    encode_answer,
    encode_prompt,
    options_of,
    warn_about_template,
)
from rlhf_recipes.data.dialogues import BadRow, split_dialogue
from rlhf_recipes.data.reward_prompts import REWARD_PROMPT, reward_prompt_problem
from rlhf_recipes.models.loading import padding_tokens
from rlhf_recipes.models.readout import fit_normalization
from rlhf_recipes.reward_modeling.collator import sequences_of
from rlhf_recipes.reward_modeling.evaluation import fields_of_images, score_sequences
from rlhf_recipes.rewards.encoding import is_encoder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from transformers import PreTrainedTokenizerBase
    from trl import RewardTrainer

    from rlhf_recipes.models.images import ImageReader

_NAMED = 8  # tokens, of what may be hundreds
_LOOKED_AT = 16  # rows, for what they are and what a chat template makes of them


def check_score_head(trainer: RewardTrainer) -> None:
    """Check that the score can be read at the end token, and in the precision of the model.

    A model for sequence classification reads its score at the last token that is not padding. If the end token is
    padding too, the score is read before it: a completion that was cut off looks like a finished one, and whoever
    loads the model with another padding token gets other scores.

    Args:
        trainer: A trainer that has not started.

    Raises:
        ValueError: If padding and end of text are the same token, or the base computes in half precision and the
            float32 head cannot.
    """
    model: Any = trainer.model  # TRL types what a trainer holds only in part
    tokenizer: Any = trainer.processing_class
    ends_in_padding = tokenizer.pad_token_id == tokenizer.eos_token_id or any(
        ids[-1] == tokenizer.pad_token_id for row in _first_rows(trainer) for ids in sequences_of(row)
    )
    if ends_in_padding:
        others = [token for token in padding_tokens(tokenizer) if token != tokenizer.pad_token]
        raise ValueError(
            f"The padding token is the token that ends a text ({tokenizer.pad_token!r}). A reward model reads its "
            "score at the last token that is not padding, so it would never see that a completion ended. Set "
            "`pad_token` to another token that does not occur in the texts (this tokenizer has "
            f"{others[:_NAMED] or 'none'})."
        )
    if model.dtype != torch.float32 and not (trainer.args.bf16 or trainer.args.fp16):
        raise ValueError(
            f"The base model computes in {model.dtype} (`dtype`), which the float32 score head can read only "
            "in mixed precision. Set `bf16: true`, or `dtype: float32`."
        )


@torch.no_grad()
def normalize_score_head(trainer: RewardTrainer, samples: int = 256) -> float:
    """Scale a new score head so that scores of training completions have a standard deviation of 1.

    A random head gives scores of any size, and the softmax over them choices of any certainty. A shift is not needed:
    a comparison does not see it.

    Source: https://huggingface.co/papers/1909.08593, section 2.2, whose code normalises reward models before the
    training too (`normalize_before` in lm_human_preferences/train_reward.py of openai/lm-human-preferences), there on
    samples of the policy, with a gain beside the head.

    Args:
        trainer: A trainer that has not started.
        samples: Completions of the first training rows that are scored, at most.

    Returns:
        The factor of the head's weights.

    Raises:
        ValueError: If the head is not one linear layer, or the scores do not vary.
    """
    model: Any = trainer.model
    heads = [weight for name, weight in model.named_parameters() if weight.requires_grad and ".score." in f".{name}"]
    if len(heads) != 1:
        raise ValueError(
            f"`normalize_head` scales a head of one linear layer, but {len(heads)} trained weights are named `score`. "
            "Use a decoder, or remove the setting."
        )
    rows: Any = trainer.train_dataset
    first = [(row, ids) for row in islice(rows, samples) for ids in sequences_of(row)][:samples]
    fields = fields_of_images(trainer, lambda number: first[number][0])
    with trainer.accelerator.autocast():
        size = trainer.args.per_device_eval_batch_size
        scores = score_sequences(model, [ids for _, ids in first], size, fields=fields)
    gain, _ = fit_normalization(scores)
    heads[0].mul_(gain)
    return gain


def _first_rows(trainer: RewardTrainer) -> list[dict[str, Any]]:
    rows: Any = trainer.train_dataset
    return list(islice(rows, _LOOKED_AT)) if isinstance(rows, Dataset) else []


def check_reward_prompts(
    train_dataset: Any = None, eval_dataset: Any = None, model: Any = None, processing_class: Any = None, **others: Any
) -> bool:
    """Check that all rows of a reward model have the column `reward_prompt`, or none of them.

    Args:
        train_dataset: The rows that it learns from.
        eval_dataset: Those it is evaluated on, by name where there are several sets.
        model: The model.
        processing_class: Its tokenizer.
        others: Further arguments of the trainer.

    Returns:
        Whether they have it.

    Raises:
        ValueError: If some have it and others do not, or rows bring token ids of another prompt.
    """
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    named = {name: rows for name, rows in {"train": train_dataset, **evals}.items() if rows is not None}
    having = [name for name, rows in named.items() if REWARD_PROMPT in (rows.column_names or ())]
    if having and len(having) < len(named):
        other = next(name for name in named if name not in having)
        raise ValueError(
            f"The {having[0]} rows have the column `{REWARD_PROMPT}`, and the {other} rows do not: the reward model "
            "would read other prompts there. Give it to both, or to neither."
        )
    if processing_class is not None and not (isinstance(model, nn.Module) and is_encoder(model)):
        for name in having:
            _check_ids(islice(named[name], _LOOKED_AT), processing_class, name)
    return bool(having)


def _check_ids(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for index, row in enumerate(rows):
        if reward_prompt_problem(row):
            return  # said where the rows are prepared
        prompt = encode_prompt(tokenizer, row[REWARD_PROMPT], **options_of(row))[:-1]  # the last may join the answer
        for ids in [row.get("chosen_ids"), row.get("rejected_ids"), *(row.get("completion_ids") or ())]:
            if ids is not None and list(ids[: len(prompt)]) != list(prompt):
                raise ValueError(
                    f"Row {index} of the {name} rows has a `{REWARD_PROMPT}` and brings token ids that do not begin "
                    "with it: the reward model would not read it. Give the ids of reward prompt and completion, or "
                    "remove the columns of ids."
                )


def with_chat_ids(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Collection[int],
    name: str,
    images: ImageReader | None = None,
) -> Dataset | IterableDataset:
    """Encode the chats among preferences as PPO will read them: generation prompt, answer, and its end token.

    TRL's own way takes what the template writes, whether that ends at the end token, behind it or without one.

    Args:
        rows: Rows with `chosen` and `rejected`, or with `completions`. Text stays as it is, and so do rows that bring
            token ids.
        tokenizer: The tokenizer.
        end_ids: Ids that end a completion of the policy.
        name: What the progress bar calls the rows.
        images: What reads the pictures of rows; `None` without a processor.

    Returns:
        The rows; chats have `chosen_ids` and `rejected_ids`, or `completion_ids`.

    Raises:
        ValueError: If a chat cannot be encoded, with its row, or the rows are text and the tokenizer ends prompts too,
            or sees no pictures in them.
    """
    first_rows = list(islice(rows, _LOOKED_AT))
    group = bool(first_rows) and "completions" in first_rows[0]
    names = ("completion_ids",) if group else ("chosen_ids", "rejected_ids")
    first_rows = [row for row in first_rows if any(row.get(column) is None for column in names)]
    if not first_rows:
        return rows
    if not (chats := [chat for row in first_rows for chat in _chats_of(row)[:1]]):
        if images is not None:
            raise ValueError(
                f"The {name} rows are text, and pictures need chats. Give lists of messages with `role` and `content` "
                "as `prompt`, `chosen` and `rejected`, or the processor's `tokenizer` for rows without pictures."
            )
        check_prompts_stay_open(tokenizer)
        return rows
    consequence = f"The reward model is trained with {tokenizer.eos_token!r} there, which a policy may never write."
    warn_about_template(tokenizer, chats, end_ids, consequence, rewards=True, **options_of(first_rows[0]))

    def encoded(row: dict[str, Any], index: int) -> dict[str, Any]:
        if group and row.get("completion_ids"):
            return {"completion_ids": row["completion_ids"]}
        try:
            if images is not None:
                prompt_ids, answer_ids = images.encode_answers(row, [side for _, side in _chats_of(row)], end_ids)
                ids = [[*prompt_ids, *answer] for answer in answer_ids]
            else:
                answers = [encode_answer(tokenizer, *chat, end_ids, **options_of(row)) for chat in _chats_of(row)]
                ids = [[*answer.prompt_ids, *answer.ids] for answer in answers]
        except BadRow as error:
            raise ValueError(f"The prompt of row {index} of the {name} rows {error}.") from error
        except ValueError as error:
            raise ValueError(f"Row {index} of the {name} rows: {error}") from error
        return {"completion_ids": ids} if group else dict(zip(names, ids, strict=True))

    more = {"desc": f"Encoding {name} chats"} if isinstance(rows, Dataset) else {}
    return rows.map(encoded, with_indices=True, **more)


def _chats_of(row: dict[str, Any]) -> list[tuple[list[Any], list[Any]]]:
    """Prompt and answer of each completion of a row, if they are chats."""
    sides = row.get("completions") or [row[side] for side in ("chosen", "rejected") if row.get(side)]
    if not sides or not isinstance(sides[0], list):
        return []
    prompt = row.get("prompt")
    return [split_dialogue(side) if prompt is None else (prompt, side) for side in sides]


def cut_after_eos(ids: list[int], eos_token_id: int) -> list[int]:
    """Cut the token ids of a text after its last end token; one without it stays as it is.

    Example:
        >>> cut_after_eos([5, 1, 6, 1, 9], eos_token_id=1)
        [5, 1, 6, 1]
    """
    return ids[: len(ids) - ids[::-1].index(eos_token_id)] if eos_token_id in ids else ids
