r"""Bring rows into the columns that the trainers read: prompts, preferences, completions.

A value is text, or a chat: a list of `{"role": ..., "content": ...}` messages, or of ShareGPT's `from` and `value`.
A dialogue in plain text has turns that start with "\n\nHuman:" and "\n\nAssistant:". Row numbers in messages count
from 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, concatenate_datasets

from rlhf_recipes.data.bad_rows import BadRows
from rlhf_recipes.data.conversations import conversation_columns, read_conversation
from rlhf_recipes.data.dialogues import (
    BadRow,
    Row,
    check_kind,
    filled,
    read_tools,
    split_dialogue,
    split_pair,
    split_row,
    two_prompts,
)
from rlhf_recipes.data.instructions import only_prompts
from rlhf_recipes.data.preferences import are_preferences, best_completions, to_preference_table
from rlhf_recipes.messages import image_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PICTURES_AT_A_TIME = 256
_SOURCES = ("prompt", "completion", "chosen", "rejected", "messages", "text")


def to_prompts(dataset: Dataset, *, prompt_words: int | None = None, drop_bad_rows: bool = False) -> Dataset:
    """Make rows with a column `prompt`, for PPO.

    The prompt is the column `prompt`; or what precedes the last assistant turn of `chosen`, `messages` or
    `conversations` (also where `prompt` repeats a part of that chat as text); or that of HelpSteer3, UltraFeedback,
    Nectar and RewardBench 2, as the reward stage reads it; or the first words of `text`, for the policy to continue
    (https://huggingface.co/papers/1909.08593, section 3.1).

    Args:
        dataset: Prompt, completion, preference, `messages`, `conversations` or `text` rows.
        prompt_words: For `text` rows: number of words, at most, that make the prompt.
        drop_bad_rows: Whether to leave out rows with an empty prompt, instead of refusing the dataset.

    Returns:
        The column `prompt` (text or chat) and every column that was not one of the sources.

    Raises:
        ValueError: If the columns are none of these, rows cannot be used, or none is left.

    Example:
        >>> rows = Dataset.from_dict({"text": ["a long film , and a dull one", "short"], "label": [0, 1]})
        >>> to_prompts(rows, prompt_words=3)[:]
        {'prompt': ['a long film', 'short'], 'label': [0, 1]}
    """
    dataset = only_prompts(dataset)
    columns = _columns(dataset, ["prompt"], ["chosen"], ["messages"], ["conversations"], ["text"])
    if (columns == ["text"]) != (prompt_words is not None):
        raise ValueError(
            "`prompt_words` says how many words of each `text` are the prompt: give it with `text` rows, and only "
            f"with them. Got `prompt_words` {prompt_words} and the columns {_names(dataset)}."
        )
    if prompt_words is not None and prompt_words < 1:
        raise ValueError(f"`prompt_words` must be at least 1, got {prompt_words}.")

    def convert(row: Row) -> Row:
        if prompt_words is not None:
            return {"prompt": _first_words(filled(row["text"], "text").strip(), prompt_words)}
        return {"prompt": filled(_prompt(row), "prompt")}

    return _convert(dataset, convert, drop_bad_rows)


def to_preferences(dataset: Dataset, *, drop_bad_rows: bool = False) -> Dataset:
    r"""Make rows with the columns `prompt`, `chosen` and `rejected`, for a reward model.

    Without a prompt of the same kind, `chosen` and `rejected` are whole dialogues and are split at their last
    assistant turn: text after the last "\n\nAssistant:" (Anthropic's hh-rlhf,
    https://huggingface.co/papers/2204.05862), a chat before its last message. Rows whose two prompts differ compare
    nothing: they are left out, and a warning says how many there were.

    Args:
        dataset: Rows with `chosen` and `rejected`, both text or both chats.
        drop_bad_rows: Whether to leave out rows with an empty prompt or completion and rows whose completions are the
            same, instead of refusing the dataset.

    Returns:
        The columns `prompt`, `chosen`, `rejected`, and every column that was not one of the sources (`chosen_ids`
        and `rejected_ids`, say).

    Raises:
        ValueError: If a column is missing, rows cannot be used, or none is left.

    Example:
        >>> rows = Dataset.from_dict({
        ...     "chosen": ["\n\nHuman: Hi\n\nAssistant: Hello!"], "rejected": ["\n\nHuman: Hi\n\nAssistant: No."]
        ... })
        >>> to_preferences(rows)[0]
        {'prompt': '\n\nHuman: Hi\n\nAssistant:', 'chosen': ' Hello!', 'rejected': ' No.'}
    """
    _columns(dataset, ["chosen", "rejected"])

    def convert(row: Row) -> Row:
        prompt, chosen, rejected = split_pair(row)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    return _convert(dataset, convert, drop_bad_rows)


def to_completions(dataset: Dataset, *, drop_bad_rows: bool = False) -> Dataset:
    """Make rows for supervised fine-tuning: `prompt` and `completion`, or `messages`, or `text`.

    Of preference rows, `chosen` is the completion; of the other kinds that `to_preference_table` knows it is the best
    one of each row of its table, and the first one where several share the best place.

    Args:
        dataset: Completion, `messages`, preference, `conversations` or `text` rows; the first of these that the
            columns allow. Otherwise preferences of any other kind.
        drop_bad_rows: Whether to leave out rows with an empty prompt, completion or text, instead of refusing the
            dataset.

    Returns:
        The columns of that kind, and every column that was not one of the sources.

    Raises:
        ValueError: If the columns are none of these, rows cannot be used, or none is left.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["Hi"], "chosen": [" Hello!"], "rejected": [" No."]})
        >>> to_completions(rows)[0]
        {'prompt': 'Hi', 'completion': ' Hello!'}
    """
    kinds = [["prompt", "completion"], ["messages"], ["chosen"], ["conversations"], ["text"]]
    names = set(dataset.column_names)
    of_these = any(names.issuperset(kind) for kind in kinds) and not {"chosen", "num_correct"} <= names
    if not of_these and are_preferences(names):
        dataset = best_completions(to_preference_table(dataset, drop_bad_rows=drop_bad_rows))
    kind = _columns(dataset, *kinds)[-1]
    kind = "messages" if kind == "conversations" else kind

    def convert(row: Row) -> Row:
        if kind == "text":
            return {"text": filled(row["text"], "text")}
        if kind == "messages":
            filled(split_dialogue(row["messages"])[1], "last assistant message")
            return {"messages": row["messages"]}
        prompt, completion = split_row(row, kind)
        return {"prompt": filled(prompt, "prompt"), "completion": filled(completion, kind)}

    return _convert(dataset, convert, drop_bad_rows)


def split_by_prompt(dataset: Dataset, test_size: float, seed: int) -> DatasetDict:
    """Hold out a share of the prompts, with all of their rows, for the evaluation.

    A hash of prompt and seed decides the side. So a prompt lies on the same side in every stage and whatever other
    rows there are, and no stage trains on what another one tests on. The share is met on average. A side that would
    be empty gets one prompt.

    Args:
        dataset: Converted rows. The prompt is `prompt`, or what precedes the last assistant turn of `messages`, or the
            whole `text`.
        test_size: Share of the prompts, between 0 and 1.
        seed: Another seed gives another split.

    Returns:
        The splits `train` and `test`, both in the order of the rows.

    Raises:
        ValueError: If the rows have none of these columns or only one prompt, or `test_size` is out of range.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["a", "b", "a", "c"]})
        >>> splits = split_by_prompt(rows, test_size=0.3, seed=0)
        >>> set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
        set()
    """
    if not 0.0 < test_size < 1.0:
        raise ValueError(f"`test_size` must lie between 0 and 1, got {test_size}.")

    def place(key: str) -> float:
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)

    places = list(map(place, prompt_keys(dataset)))
    distinct = sorted(set(places))
    if len(distinct) < 2:
        raise ValueError("All rows have the same prompt, so none can be held out. Give a test split of its own.")
    limit = min(max(test_size, distinct[1]), distinct[-1])  # the test prompts lie below it
    return DatasetDict(
        train=dataset.select([index for index, place in enumerate(places) if place >= limit]),
        test=dataset.select([index for index, place in enumerate(places) if place < limit]),
    )


def prompt_keys(dataset: Dataset) -> list[str]:
    """Write the prompts of converted rows (see `split_by_prompt`) as JSON, to compare them.

    Rows with pictures have a hash of these beside it: one question about two pictures makes two prompts.

    Example:
        >>> prompt_keys(Dataset.from_dict({"prompt": ["a", "b"]}))
        ['"a"', '"b"']
    """
    column = _columns(dataset, ["prompt"], ["messages"], ["text"])[0]
    values = dataset[column]
    prompts = (split_dialogue(value)[0] for value in values) if column == "messages" else values
    keys = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
    for name in image_columns(dataset.column_names):
        stored = dataset.select_columns(name).with_format("arrow")  # as paths or files: nothing is decoded
        pictures = (value for batch in stored.iter(_PICTURES_AT_A_TIME) for value in batch[name].to_pylist())
        keys = [
            f"{key} {hashlib.sha256(repr(picture).encode()).hexdigest()}"
            for key, picture in zip(keys, pictures, strict=True)
        ]
    return keys


def check_prompt_lengths(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> None:
    """Refuse prompts that do not fit into the context.

    Args:
        dataset: Rows with a column `prompt`; chats are measured as the chat template renders them for generation.
        tokenizer: The policy's tokenizer.
        max_prompt_tokens: Tokens that the context leaves for a prompt.

    Raises:
        ValueError: If a prompt is longer, or there is no room for any.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> rows = Dataset.from_dict({"prompt": ["the film", "the film was long"]})
        >>> check_prompt_lengths(rows, word_tokenizer(["the", "film", "was", "long"]), max_prompt_tokens=3)
        Traceback (most recent call last):
        ...
        ValueError: 1 of 2 prompts do not fit into the context: row 1 has 4 tokens, and at most 3 are left for ...
    """
    _columns(dataset, ["prompt"])
    if max_prompt_tokens < 1:
        raise ValueError(
            f"The context leaves {max_prompt_tokens} tokens for a prompt. Lower `max_completion_length`, or use a "
            "model with a longer context."
        )
    prompts = list(dataset["prompt"])
    lengths = [len(ids) for ids in encode_prompts(prompts, tokenizer)]
    too_long = [(index, length) for index, length in enumerate(lengths) if length > max_prompt_tokens]
    if too_long:
        index, length = too_long[0]
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} prompts do not fit into the context: row {index} has {length} tokens, "
            f"and at most {max_prompt_tokens} are left for a prompt. Shorten or remove such rows, lower "
            "`max_completion_length`, or use a model with a longer context."
        )


def encode_prompts(prompts: list[Any], tokenizer: PreTrainedTokenizerBase, **template: Any) -> list[list[int]]:
    """Token ids of prompts, all of them texts or all chats, which the chat template renders for generation."""
    encoded: Any
    if prompts and isinstance(prompts[0], list):
        encoded = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )
    else:
        encoded = tokenizer(text=prompts) if prompts else {"input_ids": []}
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _columns(dataset: Dataset, *kinds: list[str]) -> list[str]:
    """Return the first of several kinds of rows that the columns allow."""
    for kind in kinds:
        if set(kind) <= set(dataset.column_names):
            return kind
    expected = ", or ".join(" and ".join(f"`{column}`" for column in kind) for kind in kinds)
    raise ValueError(f"Expected the columns {expected}; found {_names(dataset)}. Rename the columns.")


def _names(dataset: Dataset) -> str:
    return ", ".join(f"`{column}`" for column in dataset.column_names)


def _convert(dataset: Dataset, convert: Callable[[Row], Row], drop_bad_rows: bool) -> Dataset:
    """Replace the source columns by what `convert` makes of them, without the rows that it refuses."""
    used = [column for column in _SOURCES if column in dataset.column_names]
    used += conversation_columns(dataset.column_names)
    indices: list[int] = []
    rows: list[Row] = []
    bad_rows = BadRows()
    more = [column for column in ("chosen_ids", "rejected_ids", "tools") if column in dataset.column_names]
    tools: list[Any] = []
    for index, row in enumerate(dataset.select_columns([*used, *more]).with_format(None)):
        try:
            named = row.pop("tools", None)
            row = read_conversation(row)
            for column in [name for name in row if name in _SOURCES]:
                check_kind(row[column], column)
            converted = convert(row)
            is_chat = any(isinstance(value, list) for value in converted.values())
            tools.append(read_tools(named) if is_chat else named)
        except BadRow as problem:
            bad_rows.add(str(problem), f"row {index}")
        else:
            rows.append(converted)
            indices.append(index)
    bad_rows.settle(len(dataset), len(rows), drop_bad_rows, harmless={two_prompts()})
    converted = Dataset.from_dict({column: [row[column] for row in rows] for column in rows[0]})
    if "tools" in more:
        converted = converted.add_column("tools", tools, feature=dataset.features["tools"])
        used.append("tools")
    others = dataset.remove_columns(used)
    if not others.column_names:
        return converted
    others = others.select(indices).flatten_indices(keep_in_memory=True)
    return concatenate_datasets([converted, others], axis=1)


def _prompt(row: Row) -> Any:
    """Return the prompt of a row that has `prompt`, `chosen` or `messages`."""
    dialogue = next((column for column in ("chosen", "messages") if column in row), None)
    return row["prompt"] if dialogue is None else split_row(row, dialogue)[0]


def _first_words(text: str, count: int) -> str:
    ends = [word.end() for word in islice(re.finditer(r"\S+", text), count)]
    return text[: ends[-1]]
