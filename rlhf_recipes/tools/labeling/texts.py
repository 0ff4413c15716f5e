"""Texts of models as they are shown: nothing in them is markup, and nothing that hides stays hidden."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rlhf_recipes.messages import contents

_KEPT = "\n\t\u200c\u200d"  # lines, tabs, and the joiners that emoji, Persian and Indic scripts are written with
_HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # controls, formats (bidi too), private, surrogates, separators


def visible_parts(text: str) -> Iterator[tuple[str, str]]:
    r"""Split a text into what is seen as it is, and characters that would not be seen.

    Args:
        text: Any text. Line ends become one kind.

    Returns:
        Pairs of text and name: of what is seen the name is empty; of a control, bidi or other invisible character the
        text is its code and the name that of Unicode.

    Example:
        >>> list(visible_parts("a\u202eb\x1b"))
        [('a', ''), ('U+202E', 'RIGHT-TO-LEFT OVERRIDE'), ('b', ''), ('U+001B', 'control character')]
    """
    text = text.replace("\r\n", "\n")
    for hidden, characters in groupby(text, key=_hides):
        if not hidden:
            yield "".join(characters), ""
        else:
            yield from ((f"U+{ord(one):04X}", unicodedata.name(one, "control character")) for one in characters)


def _hides(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _KEPT


def turns(value: Any) -> list[tuple[str, str]]:
    """Read a prompt or an answer as turns.

    Args:
        value: Text or a chat.

    Returns:
        Pairs of role and text. Text has no role; calls of tools are shown as JSON.

    Example:
        >>> turns("Hi"), turns([{"role": "user", "content": "Hi"}])
        ([('', 'Hi')], [('user', 'Hi')])
    """
    if isinstance(value, str):
        return [("", value)]
    return [(str(message.get("role") or "?"), _said(message)) for message in value]


def _said(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    texts = [contents([message])] if message.get("content") else []
    return "\n".join([*texts, json.dumps(calls, ensure_ascii=False)] if calls else texts)
