"""Chats as token ids: the prompt as a policy reads it, and the answer up to the token that ends it.

What a chat template writes around an answer differs: it may close a turn with the end token, with a token of its own
(`<end_of_turn>`) and a line break, with nothing at all; its generation prompt may open a thought that finished
dialogues do not show. A reward has to be trained and read at the same token, at which PPO's completions stop.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig

from rlhf_recipes.data.dialogues import split_dialogue

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CHATS = 16  # that are looked at for what a template does
_MARKER = "ANSWERx7ANSWER"  # an answer that is found again in a template's text
_SPACE = "\u2581"  # with which SentencePiece's tokens write one


@dataclass(frozen=True)
class Answer:
    """A chat as token ids.

    Attributes:
        prompt_ids: The prompt, with the generation prompt, as a policy reads it before it answers.
        ids: The answer after it, up to and with its end token, or without one if it was cut off.
        closed: Whether the template ends the answer with an end token; else the tokenizer's is put there.
        added: What the generation prompt opens that the template does not write before a given answer, as text.
        written: What the template writes before a given answer that its generation prompt does not open.
        closing: What the template writes after the answer.
    """

    prompt_ids: list[int]
    ids: list[int]
    closed: bool
    added: str
    written: str
    closing: str


@dataclass(frozen=True)
class _Texts:
    """A chat as its template writes it.

    Attributes:
        before: The prompt with the generation prompt.
        whole: Prompt and answer.
        start: Where the answer begins in the whole.
        content: Where the content of its first message begins; `None` if that cannot be seen.
        end: Where the content of its last message ends; `None` if that cannot be seen.
    """

    before: str
    rendered: str
    start: int
    content: int | None
    end: int | None


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, Any]],
    answer: list[dict[str, Any]],
    end_ids: Collection[int],
    *,
    finished: bool = True,
    tools: Any = None,
    template_kwargs: dict[str, Any] | None = None,
) -> Answer:
    """Encode a chat as PPO reads it: the prompt's ids, and after them those of the answer.

    Args:
        tokenizer: A tokenizer with a chat template.
        prompt: Messages before the answer, maybe none.
        answer: The messages of the answer, one or more.
        end_ids: Ids that end a completion of the policy, the tokenizer's end token among them.
        finished: Whether the answer ended; one that was cut off has no end token.
        tools: Tools that the template may name, or their JSON.
        template_kwargs: Further arguments of the template.

    Returns:
        The token ids, and what the template did.

    Raises:
        ValueError: If there is no chat template, or it cannot be seen where in its text the answer begins.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> tokenizer = word_tokenizer(["user", "model", "stop", "hi", "you"])
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}{{ m.role }} {{ m.content }} stop {% endfor %}"
        ...     "{% if add_generation_prompt %}model {% endif %}"
        ... )
        >>> prompt, answer = [{"role": "user", "content": "hi"}], [{"role": "model", "content": "you"}]
        >>> [end], eos = tokenizer.convert_tokens_to_ids(["stop"]), tokenizer.eos_token_id
        >>> tokenizer.convert_ids_to_tokens(encode_answer(tokenizer, prompt, answer, {eos, end}).ids)
        ['you', 'stop']
    """
    text = _texts(tokenizer, prompt, answer, tools, template_kwargs)
    prompt_ids = _ids_of(tokenizer, text.before)
    after = partial(_ids_after, tokenizer, text.before, prompt_ids)
    ids = after(text.rendered[text.start :])
    ends = [place for place, token in enumerate(ids) if token in end_ids]
    if text.end is not None:  # those after the content, of which the first one ends the answer
        count = sum(token in end_ids for token in _ids_of(tokenizer, text.rendered[text.end :]))
        ends = ends[max(0, len(ends) - count) :][:1]
    if text.end is not None and (not finished or not ends):  # without what the template writes after the content
        content = text.rendered[text.start : text.end]
        ids = after(content) if text.end < len(text.rendered) else ids
        ids = [*ids, *[tokenizer.eos_token_id] * finished]
    elif ends:
        ids = ids[: ends[-1] + finished]
    else:
        ids = [*ids, *[tokenizer.eos_token_id] * finished]
    return Answer(
        prompt_ids,
        ids,
        closed=bool(ends),
        added=text.before[_shared(text.before, text.rendered[: text.start]) :],
        written=text.rendered[text.start : text.content] if text.content is not None else "",
        closing=text.rendered[len(text.rendered) if text.end is None else text.end :],
    )


def encode_sampled(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, Any]],
    completion: str,
    end_ids: Collection[int],
    *,
    finished: bool = True,
) -> tuple[list[int], list[int]]:
    """Encode what a policy sampled after the generation prompt: the template does not write around it once more.

    Args:
        tokenizer: A tokenizer with a chat template, such as a reward model's own.
        prompt: Messages before the answer.
        completion: The sampled text, without special tokens.
        end_ids: As of `encode_answer`.
        finished: Whether it ended with an end token: then the one comes behind it that the template closes with.

    Returns:
        The prompt's ids, and the completion's.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> tokenizer = word_tokenizer(["user", "model", "hi", "you"])
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        >>> ids = encode_sampled(tokenizer, [{"role": "user", "content": "hi"}], "model you", [])
        >>> [tokenizer.convert_ids_to_tokens(part) for part in ids]
        [['user', 'hi'], ['model', 'you', '<eos>']]
    """
    text = _texts(tokenizer, prompt, [{"role": "assistant", "content": _MARKER}], None, None)
    lead = text.rendered[text.start : text.content] if text.content is not None else ""
    if lead.isspace() and not completion.startswith(lead):  # decoding takes the space of some first words away
        completion = lead + completion
    prompt_ids = _ids_of(tokenizer, text.before)
    ids = _ids_after(tokenizer, text.before, prompt_ids, completion)
    closing = [] if text.end is None else _ids_of(tokenizer, text.rendered[text.end :])
    end = next((token for token in closing if token in end_ids), tokenizer.eos_token_id)
    return prompt_ids, [*ids, *[end] * finished]


def with_first_space(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, ids: Sequence[int]) -> Any:
    """Give a sampled text back the space before its first word, which some tokenizers' decoding takes away.

    Args:
        tokenizer: The policy's tokenizer.
        prompt: The prompt, a text or a chat.
        completion: The completion; a chat stays as it is.
        ids: Its token ids.

    Returns:
        The completion as it goes on from the prompt.
    """
    if not isinstance(prompt, str) or not isinstance(completion, str) or not ids:
        return completion
    first: Any = tokenizer.convert_ids_to_tokens(ids[0])
    lost = str(first).startswith(_SPACE) and not completion.startswith(" ") and not prompt[-1:].isspace()
    return f" {completion}" if lost else completion


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    *,
    tools: Any = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Encode a prompt, text or chat, as PPO gives it to the policy; the options are those of `encode_answer`.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> encode_prompt(word_tokenizer(["the", "film"]), "the film the")
        [3, 4, 3]
    """
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(text=prompt)["input_ids"]
        return ids
    options = _options(tools, template_kwargs)
    return _ids_of(tokenizer, _rendered(tokenizer, prompt, add_generation_prompt=True, **options)) if prompt else []


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens that end a completion: the tokenizer's end token, and those that the model names.

    Args:
        model: The policy, a reward model on the same base, or the path of one. Its `generation_config` may name one id
            or several, such as that of the end of a turn; a sequence classifier has none, so it is read from its
            folder, or from that of its base.
        tokenizer: Its tokenizer.

    Returns:
        The ids, each once, the tokenizer's first.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[1, 6]))
        >>> end_token_ids(model, SimpleNamespace(eos_token_id=6))
        [6, 1]
    """
    if isinstance(model, str):
        config = _saved_settings(model)
    else:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = getattr(base, "generation_config", None) or _saved_settings(base.config._name_or_path)
        config = config or base.config.get_text_config()
    named = getattr(config, "eos_token_id", None)
    named = [] if named is None else named if isinstance(named, list) else [named]
    eos: Any = tokenizer.eos_token_id
    return list(dict.fromkeys([eos, *named]))


def _saved_settings(path: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):  # many models have no such file
        return None


def check_completions(rows: Dataset, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> None:
    """Check how the rows of a supervised fine-tuning end, before it begins.

    Args:
        rows: Rows as `to_completions` gives them: `prompt` and `completion`, `messages`, or `text`.
        tokenizer: The tokenizer.
        end_ids: Ids that end a completion of the model.

    Raises:
        ValueError: If the tokenizer ends prompts too, or the chat template refuses a chat.
    """
    column = next(name for name in ("completion", "messages", "text") if name in rows.column_names)
    if isinstance(rows[0][column], str):
        check_prompts_stay_open(tokenizer)
        return
    first = rows.select(range(min(_CHATS, len(rows))))
    chats = [
        split_dialogue(row["messages"]) if column == "messages" else (row["prompt"], row[column]) for row in first
    ]
    warn_about_template(
        tokenizer,
        [chat for chat in chats if chat[1]],
        end_ids,
        "A model that is trained on this does not learn to stop, and PPO would cut off its completions.",
        **options_of(first[0]),
    )


def check_prompt_format(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    template_kwargs: Any = None,
) -> None:
    """Check that prompts do not end in an end token, and that the template closes answers with one that ends them.

    Args:
        rows: Rows with a column `prompt`; the first few are looked at.
        tokenizer: The policy's tokenizer.
        model: The policy, which may name more end tokens.
        template_kwargs: Further arguments of the template.

    Raises:
        ValueError: If the tokenizer ends prompts too, or the chat template refuses a chat.
    """
    prompts = [row["prompt"] for row in islice(rows, _CHATS)]
    if prompts and isinstance(prompts[0], str):
        check_prompts_stay_open(tokenizer)
        return
    answer = [{"role": "assistant", "content": _MARKER}]
    warn_about_template(
        tokenizer,
        [(prompt, answer) for prompt in prompts if prompt and prompt[-1]["role"] != "assistant"],
        end_token_ids(model, tokenizer),
        "A policy that follows the template does not stop there, and its completions are cut off.",
        answers_given=False,
        template_kwargs=template_kwargs,
    )


def options_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return how a row's chat is to be rendered, by its columns `tools` and `chat_template_kwargs`, as in TRL.

    Example:
        >>> options_of({"prompt": "Hi"})
        {'tools': None, 'template_kwargs': None}
    """
    return {"tools": row.get("tools"), "template_kwargs": row.get("chat_template_kwargs")}


def warn_about_template(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]]]],
    end_ids: Collection[int],
    consequence: str,
    *,
    answers_given: bool = True,
    rewards: bool = False,
    **options: Any,
) -> None:
    """Warn, before training, of a chat template that does not end an answer, or opens one that rows do not have.

    Args:
        tokenizer: A tokenizer with a chat template.
        chats: Prompt and answer of some chats.
        end_ids: Ids that end a completion.
        consequence: What becomes of an answer without an end token in this stage, as a sentence.
        answers_given: Whether the answers are those of rows, which may lack what the generation prompt opens.
        rewards: Whether a reward model learns from them, which PPO's policy then has to follow.
        **options: `template_kwargs` and `tools` of `encode_answer`.

    Raises:
        ValueError: As `encode_answer`.
    """
    answers = [encode_answer(tokenizer, *chat, end_ids, **options) for chat in chats]
    if not answers or not PartialState().is_main_process:
        return
    if not any(answer.closed for answer in answers):
        names = " or ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in end_ids)
        advice = ""
        if closing := _ids_of(tokenizer, answers[0].closing)[:1]:
            token = tokenizer.convert_ids_to_tokens(closing[0])
            advice = (
                f", or, if {token!r} is what ends an answer, add its id {closing[0]} to `eos_token_id` in the model's "
                "generation_config.json"
            )
        logger.warning(
            "The chat template writes no end token (%s) after the last answer. %s Let the template write `eos_token` "
            "after each answer%s.",
            *(names, consequence, advice),
        )
    if answers_given and (added := next((answer.added for answer in answers if answer.added), None)):
        logger.warning(
            "The chat template's generation prompt adds %r, which the template does not write before a given answer: "
            "PPO samples answers after it. Turn it off (for many templates by `chat_template_kwargs`, such as "
            "`enable_thinking: false`), or put it into the answers of the rows, if the template keeps it there.",
            added,
        )
    if rewards and (written := next((answer.written for answer in answers if answer.written.strip()), None)):
        logger.warning(
            "The chat template writes %r before a given answer, which its generation prompt does not open: the reward "
            "model is trained behind it, and PPO reads answers without it unless the policy writes it too. Use a "
            "template whose generation prompt opens it (for some by `chat_template_kwargs`, such as "
            "`enable_thinking: false`).",
            written,
        )


def check_prompts_stay_open(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that puts its end token behind every text, prompts too.

    Args:
        tokenizer: The tokenizer of a causal model that reads rows of plain text.

    Raises:
        ValueError: If it does: completions would be sampled after an end token, and rows trained on with two of them.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> check_prompts_stay_open(word_tokenizer(["the", "film"]))
    """
    sample = "a"
    ids: Any = tokenizer(text=sample)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and ids[-1:] != _ids_of(tokenizer, sample)[-1:]:
        raise ValueError(
            f"The tokenizer puts its end token {tokenizer.eos_token!r} behind every text, prompts too, so that a "
            "completion would come after an end. Turn it off (`tokenizer.add_eos_token = False`, or a post-processor "
            "without it) and save the tokenizer again; the stages put it after completions themselves."
        )


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], **options: Any) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except TemplateError as error:  # some refuse a system message, or turns that do not alternate
        roles = ", ".join(str(message.get("role")) for message in chat)
        raise ValueError(
            f"The chat template refuses a chat with the roles {roles}: {error}. Change such rows, or the template."
        ) from error
    return str(text)


def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text=text, add_special_tokens=False)["input_ids"]
    return ids


def _shared(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _with_marker(message: dict[str, Any]) -> dict[str, Any]:
    in_parts = isinstance(message["content"], list)  # some templates know no other form
    return {**message, "content": [{"type": "text", "text": _MARKER}] if in_parts else _MARKER}


def _options(tools: Any, template_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    return {"tools": tools or None, **(template_kwargs or {})}


def _texts(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Any],
    answer: list[Any],
    tools: Any,
    template_kwargs: dict[str, Any] | None,
) -> _Texts:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The rows are chats, but the tokenizer has no chat template. Set `tokenizer.chat_template` and save the "
            "tokenizer again, or give rows of plain text."
        )
    options = _options(tools, template_kwargs)
    rendered = _rendered(tokenizer, [*prompt, *answer], **options)
    before = _rendered(tokenizer, prompt, add_generation_prompt=True, **options) if prompt else ""
    marked = _rendered(tokenizer, [*prompt, _with_marker(answer[0]), *answer[1:]], **options)
    place = marked.find(_MARKER)
    content = place if place >= 0 and rendered.startswith(marked[:place]) else None
    start = len(before) if rendered.startswith(before) else content
    if start is None:
        raise ValueError(
            "The text that the chat template makes of a chat does not begin with what it makes of the prompt (its "
            "generation prompt included), and where the answer begins cannot be seen. Use a template that writes a "
            "prompt in the same way with and without an answer."
        )
    if len(answer) > 1:  # else the first message is the last one, and was marked
        marked = _rendered(tokenizer, [*prompt, *answer[:-1], _with_marker(answer[-1])], **options)
    _, marker, closing = marked.rpartition(_MARKER)
    end = len(rendered) - len(closing) if marker and rendered.endswith(closing) else None
    return _Texts(before, rendered, start, content, end)


def _ids_after(tokenizer: PreTrainedTokenizerBase, before: str, prompt_ids: list[int], text: str) -> list[int]:
    """Token ids of a text after a prompt, in its context where the prompt keeps its own there."""
    ids = _ids_of(tokenizer, before + text)
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids[len(prompt_ids) :]
    return _ids_of(tokenizer, text)
