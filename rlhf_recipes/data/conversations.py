"""Chats in ShareGPT's form: turns with `from` and `value`, and `conversations` as a column."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rlhf_recipes.data.dialogues import BadRow, Row, as_answer, check_kind

_ROLES = (
    dict.fromkeys(("human", "user"), "user")
    | dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant")
    | {"system": "system", "tool": "tool", "observation": "tool"}
)


def conversation_columns(names: Collection[str]) -> list[str]:
    """Name the columns that `read_conversation` takes the turns from.

    Args:
        names: The columns that there are.

    Returns:
        `conversations`, with `system` if it is there; none where `messages` hold the chat.

    Example:
        >>> conversation_columns(["system", "conversations", "chosen"])
        ['conversations', 'system']
    """
    if "conversations" not in names or "messages" in names:
        return []
    return [name for name in ("conversations", "system") if name in names]


def read_conversation(row: Row) -> Row:
    """Bring the chats of a row from ShareGPT's form into `prompt`, `messages`, `chosen` and `rejected`.

    Args:
        row: Values by column. Chats may be lists of turns or one turn. With `chosen`, `conversations` are the prompt,
            and `chosen` and `rejected` the answers: a turn, text, or the whole chat again. `system` is what the system
            says first.

    Returns:
        The row with `role` and `content` in its chats, and without `conversations` and `system`.

    Raises:
        BadRow: If a turn is from nobody known or says nothing, or the conversation cannot be answered.

    Example:
        >>> turn = {"from": "human", "value": "Hi"}
        >>> read_conversation({"conversations": [turn], "chosen": {"from": "gpt", "value": "Hello!"}})["chosen"]
        [{'role': 'assistant', 'content': 'Hello!'}]
    """
    row = {name: as_chat(value, name) for name, value in row.items()}
    if "conversations" not in row:
        return row
    chat, system = row.pop("conversations"), row.pop("system", None)
    check_kind(chat, "conversations")
    if not isinstance(chat, list) or not chat:
        raise BadRow("`conversations` is not a list of turns with `from` and `value`, or is empty")
    if isinstance(system, str) and system.strip() and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    if "chosen" not in row:
        return row | {"messages": chat}
    sides = {side: as_answer(row[side], chat) for side in ("chosen", "rejected") if side in row}
    if chat[-1]["role"] == "assistant":
        if chat[-1:] not in sides.values():
            raise BadRow("`conversations` ends with an answer of its own, which `chosen` and `rejected` cannot follow")
        chat = chat[:-1]
    return row | {side: _without(chat, answer) for side, answer in sides.items()} | {"prompt": chat}


def as_chat(value: Any, column: str) -> Any:
    """Bring turns into messages with `role` and `content`; anything else stays as it is.

    Args:
        value: A turn (`{"from": ..., "value": ...}` or `{"role": ..., "content": ...}`), a list of such, or another
            value.
        column: Its column, for messages.

    Returns:
        The chat.

    Raises:
        BadRow: If a turn is from nobody known, or says nothing.

    Example:
        >>> as_chat([{"from": "human", "value": "Hi"}], "prompt")
        [{'role': 'user', 'content': 'Hi'}]
    """
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return value
    if any(turn.get("from") is not None for turn in turns):
        return [_message(turn, column) for turn in turns]
    if not all({"role", "content"} <= turn.keys() for turn in turns):
        return value
    return [turn | {"role": _role(turn["role"]) or turn["role"]} for turn in turns]


def _message(turn: Row, column: str) -> Row:
    role = turn.get("role") if turn.get("from") is None else turn["from"]
    content = turn.get("content") if turn.get("value") is None else turn["value"]
    known = _role(role)
    if known is None:
        raise BadRow(f"`{column}` has a turn whose `from` is none of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"`{column}` has a turn whose `value` is no text")
    return {"role": known, "content": content}


def _role(name: Any) -> str | None:
    return _ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def _without(prompt: list[Row], answer: Any) -> Any:
    """Leave out the prompt of an answer that is given as the whole chat."""
    return answer[len(prompt) :] if isinstance(answer, list) and answer[: len(prompt)] == prompt else answer
