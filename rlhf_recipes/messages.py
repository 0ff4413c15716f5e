"""Write prompts and completions, texts or chats, as text for people and for counting; nothing slow is imported."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

IMAGE_COLUMNS = ("images", "image")  # of rows, with the pictures that belong into the messages of their prompts


def image_columns(names: Collection[str] | None) -> list[str]:
    """Return those of a data set's columns that hold the pictures of its prompts.

    Args:
        names: Names of all its columns; `None`, as of a stream that does not know them, are none.

    Example:
        >>> image_columns(["prompt", "image"]), image_columns(None)
        (['image'], [])
    """
    return [name for name in IMAGE_COLUMNS if name in (names or ())]


def as_text(value: Any) -> str:
    r"""Write a prompt or a completion as text: messages become lines with their roles, nothing an empty text.

    Args:
        value: A text, a chat, or whatever else stands in a file.

    Example:
        >>> as_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        'user: Hi\nassistant: Hello'
        >>> as_text(None), as_text(3)
        ('', '3')
    """
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content') or ''}" for message in value)
    return "" if value is None else str(value)


def contents(value: Any) -> str:
    r"""Write a prompt or a completion as text without the roles: the contents of a chat's messages, one a line.

    Args:
        value: A text or a chat. Of a content in parts, the texts are taken.

    Example:
        >>> contents([{"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}, {"content": "Bye"}])
        'Hello\nBye'
        >>> contents("Hi"), contents([])
        ('Hi', '')
    """
    if isinstance(value, str):
        return value
    message_contents = [message.get("content") for message in value or ()]
    parts = [part for content in message_contents for part in (content if isinstance(content, list) else [content])]
    return "\n".join((part.get("text") or "") if isinstance(part, dict) else part or "" for part in parts)
