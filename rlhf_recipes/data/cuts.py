"""Cut texts to a number of tokens where a sentence or a paragraph ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from rlhf_recipes.data.bad_rows import BadRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS_OF_A_CHARACTER = 4  # at most, where tokens are made of the bytes of UTF-8


def to_sentence_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 64, stop: str = "."
) -> Dataset:
    """Make prompts that begin behind a full stop and end with one, for a policy to continue.

    A prompt is what follows the first full stop of a text, up to the last one within `max_tokens` tokens. Where
    nothing follows the first one, it is the text from its beginning. Texts without a prompt are left out, and a
    warning says how many they are.

    Source: https://huggingface.co/papers/1909.08593, section 3.1; the rule for the first full stop is that of its
    code, lm_human_preferences/language/datasets.py of openai/lm-human-preferences.

    Args:
        dataset: Rows with a column `text`.
        tokenizer: The policy's tokenizer, a fast one.
        max_tokens: Tokens of a prompt, at most.
        stop: The text of the one token that ends a sentence.

    Returns:
        The column `prompt`, and every other column but `text`.

    Raises:
        ValueError: If there is no column `text`, `stop` is not one token, `max_tokens` is not positive, the tokenizer
            is a slow one, or no prompt is left.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> rows = Dataset.from_dict({"text": ["we ate . it was hot . we liked", "no stop"], "id": [7, 8]})
        >>> to_sentence_prompts(rows, word_tokenizer("we ate . it was hot liked no stop".split()), max_tokens=4)[:]
        {'prompt': [' it was hot .'], 'id': [7]}
    """
    if "text" not in dataset.column_names:
        raise ValueError(f"Prompts are cut from a column `text`; the rows have {', '.join(dataset.column_names)}.")
    if max_tokens < 1:
        raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}.")
    if not tokenizer.is_fast:
        raise ValueError("The tokenizer gives no character offsets. Load it with `use_fast=True`.")
    stop_id = single_token_id(tokenizer, stop)
    texts = [str(text or "") for text in dataset["text"]]
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    prompts, kept, bad = list[str](), list[int](), BadRows()
    reason = f"no {stop!r}, or none within {max_tokens} tokens behind the first one"
    for row, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
        start, end = whole_sentences(ids, stop_id, max_tokens)
        if start == end:
            bad.add(reason, f"row {row}")
            continue
        # From the end of the token before, because some tokenizers leave the space before a word out of its token
        ends = [0, *(stop for _, stop in encoded["offset_mapping"][row])]
        prompts.append(text[ends[start] : ends[end]])
        kept.append(row)
    bad.settle(len(texts), len(kept), drop_bad_rows=False, harmless={reason})
    others = dataset.select(kept).remove_columns("text").flatten_indices(keep_in_memory=True)
    columns = {name: others[name] for name in others.column_names if name != "prompt"}
    return Dataset.from_dict({"prompt": prompts, **columns})


def whole_sentences(ids: Sequence[int], stop_id: int, max_tokens: int) -> tuple[int, int]:
    """Find the tokens behind the first full stop of a text, up to the last full stop within a number of tokens.

    Args:
        ids: Token ids of the text.
        stop_id: Id of the full stop.
        max_tokens: How many tokens, at most.

    Returns:
        Where they begin and, excluded, where they end: `(0, 0)` if there are none.

    Example:
        >>> whole_sentences([5, 9, 6, 9, 7, 9, 8], stop_id=9, max_tokens=4)  # 6 9 7 9
        (2, 6)
        >>> whole_sentences([5, 6, 9], stop_id=9, max_tokens=4), whole_sentences([5, 9, 6, 7], 9, 4)
        ((0, 3), (0, 0))
    """
    first = list(ids).index(stop_id) + 1 if stop_id in ids else len(ids)
    start = first if first < len(ids) else 0
    window = list(ids[start : start + max_tokens])
    if stop_id not in window:
        return 0, 0
    return start, start + len(window) - window[::-1].index(stop_id)


def fit_paragraphs(
    template: str, fields: Mapping[str, str], shorten: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> str:
    r"""Fill in a template so that it fits into a number of tokens: one field loses whole paragraphs from its end.

    Where its first paragraph alone does not fit, that is cut in the middle.

    Source: https://huggingface.co/papers/2009.01325; the order of the cuts is that of its code,
    `process_query` in summarize_from_feedback/tasks.py of openai/summarize-from-feedback.

    Args:
        template: Text with the names of fields in braces.
        fields: The texts of the fields.
        shorten: Name of the field that is shortened.
        tokenizer: The policy's tokenizer.
        max_tokens: Tokens of the whole prompt, at most.

    Returns:
        The prompt.

    Raises:
        ValueError: If the template names a field that is not there or not the one to shorten, or does not fit even
            without it.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> tokenizer = word_tokenizer("post we ate it was hot short".split())
        >>> fit_paragraphs("post {post} short", {"post": "we ate\nit was hot"}, "post", tokenizer, max_tokens=5)
        'post we ate short'
    """
    if f"{{{shorten}}}" not in template or shorten not in fields:
        raise ValueError(
            f"`{shorten}`, which is shortened, must be a field and stand as {{{shorten}}} in the template."
        )
    text = fields[shorten]
    while True:
        filled = _filled(template, {**fields, shorten: text})
        ids: Any = tokenizer(filled)["input_ids"]
        excess = len(ids) - max_tokens
        if excess <= 0:
            return filled
        if not text:
            raise ValueError(
                f"The prompt has {excess} tokens more than {max_tokens} even without `{shorten}`. Allow more, or "
                "leave out the row."
            )
        paragraph = text.rfind("\n")
        text = text[:paragraph] if paragraph >= 0 else text[: -max(1, excess // _TOKENS_OF_A_CHARACTER)]


def single_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    r"""Find the one token that a text is.

    Args:
        tokenizer: A tokenizer.
        text: The text of a token, such as "." or "\n".

    Returns:
        Its id: that of the entry of this name in the vocabulary, else that of the one token that the text becomes.

    Raises:
        ValueError: If the text is no token of the vocabulary and becomes none or several.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> single_token_id(word_tokenizer(["good", "."]), ".")
        4
    """
    known = tokenizer.get_vocab().get(text)
    if known is not None:
        return int(known)
    ids: Any = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"{text!r} is not one token of this tokenizer: it becomes {pieces}. Give the text of a single token, such "
            "as '.'."
        )
    return int(ids[0])


def _filled(template: str, fields: Mapping[str, str]) -> str:
    try:
        return template.format(**fields)
    except KeyError as error:
        raise ValueError(f"The template names the field {error}, and there are {', '.join(fields)}.") from None
