"""Token ids of a prompt and a completion in the format that a reward model with a tokenizer of its own was trained on.

Decoders read `prompt + completion + end token`: a text as `trl.RewardTrainer` writes it, a chat as PPO samples it,
with the generation prompt before the answer and nothing after its end token. Encoders (BERT) read
`[CLS] prompt [SEP] completion [SEP]`, without token types, because TRL's collator passes none in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf_recipes.data.chat_templates import encode_answer, encode_sampled
from rlhf_recipes.data.reward_prompts import graded_prompt

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase


def is_encoder(model: nn.Module) -> bool:
    """Return whether a sequence classifier is an encoder: decoders read a linear head named `score` at a token.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> is_encoder(BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)))
        True
    """
    return not hasattr(model, "score")


def which_ended(
    count: int,
    completion_ids: Sequence[Sequence[int]] | None,
    eos_token_ids: Collection[int] | None,
    finished: Sequence[bool] | None,
) -> list[bool]:
    """Return which completions ended with an end token.

    Args:
        count: How many there are.
        completion_ids: Their token ids as the policy sampled them, if they are known.
        eos_token_ids: Ids that end one, if they are known.
        finished: What the trainer passes, which knows all of its end tokens.

    Returns:
        For each whether it ended; all did where nothing is known.

    Example:
        >>> which_ended(2, [[5, 1], [5, 6]], {1}, None), which_ended(1, None, None, None)
        ([True, False], [True])
    """
    if eos_token_ids is not None and completion_ids is not None:
        return [bool(ids) and ids[-1] in eos_token_ids for ids in completion_ids]
    return [True] * count if finished is None else list(finished)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    completion: Any,
    *,
    encoder: bool,
    finished: bool = True,
    end_ids: Collection[int] = (),
    sampled: bool = False,
    tools: Any = None,
    template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], int]:
    """Encode a prompt and a completion as a reward model was trained on them.

    Args:
        tokenizer: The reward model's tokenizer.
        prompt: Text, or a list of messages; empty where rows have no prompt.
        completion: Text without special tokens, or a list of messages.
        encoder: Whether the model is an encoder. It reads a chat as one text, in its template.
        finished: Whether the completion ended with an end token. Encoders close every text with `[SEP]`: they cannot
            see that one was cut off.
        sampled: Whether a policy sampled the completion, after the generation prompt: then a chat's single answer is
            read as it stands, and not written into the template once more.
        end_ids: Ids that end an answer in the reward model's chat template, beside its tokenizer's end token.
        tools: Tools that a decoder's chat template may name, or their JSON.
        template_kwargs: Further arguments of that template.

    Returns:
        The token ids, and the position of the completion's first token.

    Raises:
        ValueError: If an encoder's tokenizer adds no special tokens, or there is a chat and no chat template, or one
            whose text does not show where the answer begins.
    """
    chat = not isinstance(completion, str)
    if encoder:
        return _encode_for_encoder(tokenizer, prompt, completion, chat)
    if chat:
        ends = {tokenizer.eos_token_id, *end_ids}
        if sampled and len(completion) == 1 and isinstance(completion[0].get("content"), str) and prompt:
            before, after = encode_sampled(tokenizer, list(prompt), completion[0]["content"], ends, finished=finished)
            return [*before, *after], min(len(before), len(before) + len(after) - 1)
        options = {"tools": tools, "template_kwargs": template_kwargs}
        answer = encode_answer(tokenizer, list(prompt), completion, ends, finished=finished, **options)
        ids = [*answer.prompt_ids, *answer.ids]
        return ids, min(len(answer.prompt_ids), len(ids) - 1)
    prompt_ids: Any = tokenizer(text=prompt)["input_ids"]
    all_ids: Any = tokenizer(text=prompt + completion + (str(tokenizer.eos_token) if finished else ""))["input_ids"]
    pairs = enumerate(zip(prompt_ids, all_ids, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(prompt_ids), len(all_ids)))
    return list(all_ids), min(same, len(all_ids) - 1)


def encode_rows(
    rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, context: int | None, max_length: int | None
) -> DatasetDict:
    """Encode rows for the training of an encoder: trainers take token ids as they are, without adding an end token.

    Args:
        rows: Splits with `chosen` and `rejected`, or `completions`, and maybe `prompt`, of which `reward_prompt` takes
            the place where it is there. Ids that are there stay.
        tokenizer: The encoder's tokenizer.
        context: `context_length` of the encoder.
        max_length: The trainer leaves out what is longer than this; `None`: nothing.

    Returns:
        The splits with `chosen_ids` and `rejected_ids`, or with `completion_ids`.

    Raises:
        ValueError: If a row does not fit into the context and would not be left out; it names the split and the row.

    Example:
        >>> from datasets import Dataset, DatasetDict
        >>> from transformers import BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "so", "good"]
        >>> tokenizer = BertTokenizer({word: index for index, word in enumerate(words)})
        >>> pair = {"prompt": "so", "chosen": "good", "rejected": "so so"}
        >>> rows = encode_rows(DatasetDict(train=Dataset.from_list([pair])), tokenizer, 512, None)
        >>> rows["train"]["chosen_ids"][0]
        [2, 5, 3, 6, 3]
    """

    def ids_of(row: dict[str, Any], text: Any, where: str) -> list[int]:
        ids = encode(tokenizer, graded_prompt(row) or "", text, encoder=True)[0]
        if context is not None and len(ids) > context and (max_length is None or max_length >= len(ids)):
            raise ValueError(
                f"{where} has {len(ids)} tokens, but the encoder's context is {context}. Set `max_length` to "
                f"{context} to leave such rows out, or take a model with a longer context."
            )
        return ids

    def encoded(row: dict[str, Any], index: int, split: str) -> dict[str, Any]:
        where = f"of row {index} of the {split} rows"
        if "completions" in row:
            saved_ids = row.get("completion_ids")
            texts = enumerate(row["completions"])
            return {"completion_ids": saved_ids or [ids_of(row, text, f"Completion {k} {where}") for k, text in texts]}
        return {f"{side}_ids": ids_of(row, row[side], f"`{side}` {where}") for side in ("chosen", "rejected")}

    result = rows.copy()
    for split, part in rows.items():
        if "chosen_ids" not in part.column_names:
            options = {"fn_kwargs": {"split": split}, "desc": f"Encoding {split} rows"}
            result[split] = part.map(encoded, with_indices=True, **options)
    return result


def _encode_for_encoder(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, chat: bool
) -> tuple[list[int], int]:
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            "The rows are chats, but the reward model's tokenizer has no chat template. Set `tokenizer.chat_template` "
            "as in training and save the tokenizer again, or give rows of plain text."
        )
    texts: Any = (
        [tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)] if chat else [prompt, completion]
    )
    ids: Any = tokenizer(*[text for text in texts if text])["input_ids"]
    if tokenizer.cls_token_id is not None and (ids[0], ids[-1]) != (tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise ValueError(
            f"The encoder's tokenizer has {tokenizer.cls_token!r} and {tokenizer.sep_token!r}, but does not put them "
            "around a text, as the encoder knows it. Give it a post-processor (`tokenizers.processors."
            "TemplateProcessing`) and save it again."
        )
    return list(ids), 0
