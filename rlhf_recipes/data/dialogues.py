"""One row at a time: text or chats, split into prompt and completion.

A chat is a list of `{"role": ..., "content": ...}` messages.
"""

from __future__ import annotations

import json
import re
from typing import Any

Row = dict[str, Any]

_ASSISTANT = "\n\nAssistant:"
_WRITTEN = re.compile(r"""\s*(?:array\(\s*)?\[?\s*\{\s*["'](?:role|content|from|value)["']\s*:""")
_KEYS = re.compile(r"""[{,]\s*["'](role|content|from|value)["']\s*:""")


class BadRow(ValueError):
    """A row that cannot be used. The message is the reason, in the same words for every such row.

    Example:
        >>> raise BadRow("empty `prompt`")
        Traceback (most recent call last):
        ...
        rlhf_recipes.data.dialogues.BadRow: empty `prompt`
    """


def split_row(row: Row, column: str) -> tuple[Any, Any]:
    """Split a row into prompt and completion.

    Args:
        row: Values by column. If its `prompt` is of the same kind (text or chat) as `row[column]`, this is the prompt
            and that the completion; text that answers a chat is the assistant's message. A prompt in text beside a
            chat only repeats a part of it, or is what the user said before a chat of one answer.
        column: The column with a completion or a whole dialogue.

    Returns:
        `(prompt, completion)`, both text or both chats.

    Raises:
        BadRow: If the row has neither a prompt nor a dialogue that can be split.

    Example:
        >>> split_row({"prompt": "Hi", "chosen": " Hello!"}, "chosen")
        ('Hi', ' Hello!')
    """
    prompt, value = row.get("prompt"), row[column]
    if isinstance(prompt, str) and isinstance(value, list):
        before, answer = split_dialogue(value)
        return before or [{"role": "user", "content": filled(prompt, "prompt")}], answer
    if prompt is None:
        return split_dialogue(value)
    return prompt, as_answer(value, prompt)


def as_answer(value: Any, prompt: Any) -> Any:
    """Make a message of the assistant from text that answers a chat.

    Args:
        value: The answer.
        prompt: What it answers.

    Returns:
        A chat of one message if the prompt is a chat and the answer is text, or the answer as it is.

    Example:
        >>> as_answer("Hello!", [{"role": "user", "content": "Hi"}])
        [{'role': 'assistant', 'content': 'Hello!'}]
    """
    is_text = isinstance(value, str) and isinstance(prompt, list)
    return [{"role": "assistant", "content": value}] if is_text else value


def split_pair(row: Row, sides: tuple[str, str] = ("chosen", "rejected")) -> tuple[Any, Any, Any]:
    """Split a row with two completions, or two whole dialogues, into its prompt and the two completions.

    Args:
        row: Values by column.
        sides: The columns of the two.

    Returns:
        `(prompt, first, second)`, all text or all chats.

    Raises:
        BadRow: If one of them is empty, the two prompts differ (see `two_prompts`), or the two completions are the
            same.

    Example:
        >>> split_pair({"prompt": "Hi", "chosen": " Hello!", "rejected": " No."})
        ('Hi', ' Hello!', ' No.')
    """
    prompt, first = split_row(row, sides[0])
    second_prompt, second = split_row(row, sides[1])
    if prompt != second_prompt:
        raise BadRow(two_prompts(sides))
    if first == second and row.get(f"{sides[0]}_ids") == row.get(f"{sides[1]}_ids"):  # one may lack its end token
        raise BadRow(f"`{sides[0]}` and `{sides[1]}` are the same")
    return filled(prompt, "prompt"), filled(first, sides[0]), filled(second, sides[1])


def two_prompts(sides: tuple[str, str] = ("chosen", "rejected")) -> str:
    """Return the reason why a row whose two sides answer different prompts compares nothing.

    Args:
        sides: The columns of the two.

    Returns:
        The reason.

    Example:
        >>> two_prompts()
        '`chosen` and `rejected` answer two different prompts'
    """
    return f"`{sides[0]}` and `{sides[1]}` answer two different prompts"


def split_dialogue(value: Any) -> tuple[Any, Any]:
    r"""Split a whole dialogue before its last assistant turn.

    Args:
        value: A chat, or text whose turns start with "\n\nHuman:" and "\n\nAssistant:".

    Returns:
        `(prompt, completion)`. The prompt in text ends with "\n\nAssistant:". A chat whose last message is not the
        assistant's is all prompt; a dialogue that starts with the assistant has an empty one.

    Raises:
        BadRow: If the text has no assistant turn.

    Example:
        >>> split_dialogue("\n\nHuman: Hi\n\nAssistant: Hello!")
        ('\n\nHuman: Hi\n\nAssistant:', ' Hello!')
    """
    if isinstance(value, list):
        end = len(value) - 1 if value and value[-1]["role"] == "assistant" else len(value)
        return value[:end], value[end:]
    head, marker, completion = (value or "").rpartition(_ASSISTANT)
    if not marker:
        raise BadRow(f"a dialogue in text has no turn that starts with {_ASSISTANT!r}, and there is no `prompt`")
    return head + marker if head.strip() else "", completion


def check_kind(value: Any, column: str) -> None:
    """Check that a value is text, a chat whose messages say something, or missing, and no chat written as text.

    Args:
        value: The value.
        column: Its column, for the message.

    Raises:
        BadRow: If it is anything else.

    Example:
        >>> check_kind([{"from": "human", "value": "Hi"}], "messages")
        Traceback (most recent call last):
        ...
        rlhf_recipes.data.dialogues.BadRow: `messages` is neither text nor a chat (a list of messages with ...
    """
    is_chat = isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    )
    if not (value is None or isinstance(value, str) or is_chat):
        raise BadRow(f"`{column}` is neither text nor a chat (a list of messages with `role` and `content`)")
    if is_chat and any(message["content"] is None and not message.get("tool_calls") for message in value or []):
        raise BadRow(f"`{column}` has a message whose `content` is null. Give its text, or leave the message out")
    if isinstance(value, str) and column != "text" and _is_written_chat(value):
        raise BadRow(
            f"`{column}` is a chat that was written as text. Read it back into a list of messages before, with "
            "`json.loads` or, if its quotes are single ones, `ast.literal_eval`"
        )


def _is_written_chat(text: str) -> bool:
    """Return whether text is what JSON, Python or numpy write for a list of messages, or for one."""
    if not _WRITTEN.match(text):
        return False
    keys = set(_KEYS.findall(text))
    return {"role", "content"} <= keys or {"from", "value"} <= keys


def read_tools(value: Any) -> Any:
    """Read what a row of chats gives as the tools that its template may name.

    Args:
        value: The column `tools`: JSON, a list, or nothing.

    Returns:
        The value as it is; null where it is blank text, which is no JSON.

    Raises:
        BadRow: If it is text, but not the JSON of a list.

    Example:
        >>> read_tools(""), read_tools("[]")
        (None, '[]')
    """
    if not isinstance(value, str):
        return value
    try:
        tools = json.loads(value) if value.strip() else None
    except json.JSONDecodeError:
        tools = value
    if not (tools is None or isinstance(tools, list)):
        raise BadRow("`tools` is text, but not the JSON of a list. Give such a list, or null where there are no tools")
    return None if tools is None else value


def filled(value: Any, name: str) -> Any:
    """Return text that is not blank, or a chat whose last message says something (or calls a tool).

    Args:
        value: Text or a chat.
        name: What it is, for the message.

    Returns:
        The value as it is.

    Raises:
        BadRow: If it is empty.

    Example:
        >>> filled(" Hello!", "completion")
        ' Hello!'
    """
    last = value[-1] if isinstance(value, list) and value else {"content": value}
    content = last["content"].strip() if isinstance(last["content"], str) else last["content"]
    if not content and not last.get("tool_calls"):
        raise BadRow(f"empty `{name}`")
    return value
