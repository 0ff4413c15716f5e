"""Small changes of a text, and their effect on the score."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlhf_recipes.tools.certificate.functional.resampling import mean_summary

THANKS = "Thank you so much for asking, and I really hope that this helps!"


def change_completion(completion: Any, change: Callable[[str], str]) -> Any:
    """Change the text of a completion, or the last message of a chat.

    Args:
        completion: Text, or a list of messages.
        change: What makes the new text.

    Returns:
        A new completion of the same kind.

    Example:
        >>> change_completion([{"role": "assistant", "content": "Hi"}], polite)[0]["content"]
        'Hi Thank you so much for asking, and I really hope that this helps!'
    """
    if isinstance(completion, str):
        return change(completion)
    last = completion[-1]
    return [*completion[:-1], {**last, "content": change(last["content"])}]


def repeated(text: str) -> str:
    """Say everything twice.

    Example:
        >>> repeated(" It is good.")
        ' It is good. It is good.'
    """
    return f"{text.rstrip()} {text.strip()}"


def truncated(text: str) -> str:
    """Keep the first half of the words, rounded up, with the white space before and between them.

    Example:
        >>> truncated(" It is very good.")
        ' It is'
    """
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return text[: ends[(len(ends) - 1) // 2]] if ends else text


def polite(text: str) -> str:
    """Add a sentence that says nothing but thanks.

    Example:
        >>> polite(" No.")
        ' No. Thank you so much for asking, and I really hope that this helps!'
    """
    return f"{text.rstrip()} {THANKS}"


def swapped_prompts(prompts: Sequence[Any], seed: int = 0) -> list[Any] | None:
    """Give every row the prompt of another row: never its own, and always the same one for the same prompt.

    Args:
        prompts: Texts or chats.
        seed: Seed of the order in which the different prompts are passed on.

    Returns:
        A prompt for each row, or `None` if there is only one prompt.

    Example:
        >>> swapped_prompts(["a", "b", "a"])
        ['b', 'a', 'b']
    """
    keys = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
    distinct = dict(zip(keys, prompts, strict=True))
    order = sorted(distinct)
    if len(order) < 2:
        return None
    random.Random(seed).shuffle(order)
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [distinct[following[key]] for key in keys]


def score_shift(
    before: ArrayLike, after: ArrayLike, clusters: ArrayLike, scale: float, level: float = 0.95
) -> dict[str, Any]:
    """Summarise the effect of a change of the text on scores.

    Args:
        before: Scores of the texts as they are, shape `(N,)`.
        after: Scores of the changed texts, shape `(N,)`.
        clusters: The prompt of each text, shape `(N,)`.
        scale: Standard deviation of the scores of the data. A change of less than 0.1 % of it is none.
        level: Probability that the interval is to cover the true mean shift.

    Returns:
        `value`, the mean shift in reward units, with `n`, `interval` and `unit`; `in_std`, the same in units of
        `scale`; `absolute`, the mean of the absolute shifts in units of `scale`; and the shares that `rose`, `fell`
        and stayed the `same`. In units of a scale of 0 they are 0.

    Example:
        >>> shift = score_shift([0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.0, 2.0], clusters=range(4), scale=2.0)
        >>> shift["value"], shift["in_std"], shift["absolute"], shift["rose"], shift["fell"], shift["same"]
        (0.5, 0.25, 0.5, 0.5, 0.25, 0.25)
    """
    shifts = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    same = np.abs(shifts) <= 1e-3 * scale
    unit = scale if scale > 0 else float("inf")
    return {
        **mean_summary(shifts, list(np.asarray(clusters)), level),
        "in_std": float(shifts.mean()) / unit,
        "absolute": float(np.abs(shifts).mean()) / unit,
        "rose": float(((shifts > 0) & ~same).mean()),
        "fell": float(((shifts < 0) & ~same).mean()),
        "same": float(same.mean()),
    }
