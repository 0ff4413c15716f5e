"""A reward for mathematics: the last boxed answer against the true one, by math-verify, without what it misreads."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

_BOX = r"\boxed{"
# 2.5e-3 is read as 2.5 times Euler's number minus 3, and "5 3/4" as a sum or a part of it.
_MISREAD = re.compile(r"\d\.?[eE][-+]?\d|\d\s+\d")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_BRACKETS = {"(": ")", "[": "]"}


def last_box(text: str) -> str | None:
    r"""Find what stands in the last `\boxed{...}` of a text.

    Args:
        text: A completion.

    Returns:
        The text between the braces; None where there is no box, or the last one is not closed.

    Example:
        >>> last_box(r"It is \boxed{3}. No, it is \boxed{\frac{1}{2}}."), last_box("It is 3.")
        ('\\frac{1}{2}', None)
    """
    _, box, rest = text.rpartition(_BOX)
    depth = 1 if box else 0
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if box and depth == 0:
            return rest[:position]
    return None


def math_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    r"""Pay 1 where the last boxed answer equals the row's, else 0; a reward function for `PPOTrainer`.

    [math-verify](https://github.com/huggingface/Math-Verify) decides what is equal, such as 0.5 and \frac{1}{2}; it is
    no dependency of this project. What 0.9 misreads is kept from it:

    - only the last box counts: two boxes near each other would be read as a set;
    - the true answer is its first argument: the other way round some right answers are wrong;
    - numbers such as 2.5e-3 and mixed numbers such as 5 3/4 are not paid, and not accepted as true answers: write
      2.5\times10^{-3} and 5\frac{3}{4};
    - tuples, and lists with commas, are compared by position: (7, 5) is not "x=5, y=7". Sets in \{ \} have no order.

    Args:
        completions: `B` completions, texts or lists with one assistant message.
        answer: The true answers, `B` texts as they would stand in a box.
        **kwargs: Other columns, which are not read.

    Returns:
        `B` rewards.

    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If a true answer is empty, in a form that is misread, or not read at all; with the row.

    Example:
        >>> math_reward([r"It is \boxed{0.5}", r"It is \boxed{2}"], answer=[r"\frac{1}{2}"] * 2)  # doctest: +SKIP
        [1.0, 0.0]
    """
    read, equal = _math_verify()
    rewards = []
    for row, (completion, true) in enumerate(zip(completions, answer, strict=True)):
        opening, parts = _parts(true)
        gold = [read(part) for part in parts]
        if _MISREAD.search(true) or not all(gold):
            raise ValueError(
                f"math-verify does not read the true answer of row {row} as it is meant: {true!r}. Write numbers as "
                r"0.0025 or 2.5\times10^{-3}, and mixed numbers as 5\frac{3}{4}."
            )
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        rewards.append(float(_equal(opening, gold, last_box(text), read, equal)))
    return rewards


def _equal(
    opening: str, gold: Sequence[Any], box: str | None, read: Callable[[str], Any], equal: Callable[[Any, Any], bool]
) -> bool:
    if box is None or _MISREAD.search(box):
        return False
    other, parts = _parts(box)
    # Round brackets may be left out; others make an interval.
    if len(parts) != len(gold) or (opening != other and {opening, other} != {"", "()"}):
        return False
    return all(equal(true, read(part)) for true, part in zip(gold, parts, strict=True))


def _parts(text: str) -> tuple[str, list[str]]:
    # The brackets around a tuple or an interval, and its parts; a single answer is one part without brackets.
    text = text.replace(r"\left", "").replace(r"\right", "").strip()
    if _THOUSANDS.fullmatch(text):
        return "", [text]
    bracketed = text[:1] in _BRACKETS and text[-1:] in _BRACKETS.values()
    parts = _split(text[1:-1] if bracketed else text)
    if len(parts) < 2 or (bracketed and len(_split(text)) > 1):
        return "", _split(text)
    return (text[0] + text[-1] if bracketed else ""), parts


def _split(text: str) -> list[str]:
    # At the commas outside of all brackets.
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _math_verify() -> tuple[Callable[[str], Any], Callable[[Any, Any], bool]]:
    # How it reads an answer, and compares the true one with another.
    try:
        math_verify = importlib.import_module("math_verify")
    except ImportError as error:
        raise ImportError("`math_reward` needs math-verify. Install it: pip install math-verify") from error
    # Its time limits are signals, which only the main thread gets.
    limited = threading.current_thread() is threading.main_thread()

    def read(text: str) -> Any:
        return math_verify.parse(rf"{_BOX}{text}}}", parsing_timeout=5 if limited else None)

    def equal(true: Any, answer: Any) -> bool:
        return bool(math_verify.verify(true, answer, timeout_seconds=5 if limited else None))

    return read, equal
