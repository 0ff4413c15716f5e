"""Recognise numbers in rows, logs and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number: not text, nan, infinite, true or false.

    Args:
        value: Any value, also of numpy.

    Returns:
        Whether it is one.

    Example:
        >>> [is_number(value) for value in (1.5, 2, "1.5", True, None, float("nan"))]
        [True, True, False, False, False, False]
    """
    # Not `math.isfinite`, which cannot read whole numbers above 1e308.
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf  # type: ignore[operator]


def value_at(value: Any, *path: str | int) -> Any:
    """Return what stands at a place of a JSON value that may be anything; `None` if there is no such place.

    Args:
        value: The value.
        path: Keys and indices, from the outermost.

    Example:
        >>> answer = {"choices": [{"text": "Hi"}]}
        >>> value_at(answer, "choices", 0, "text"), value_at(answer, "choices", 1), value_at("none", "choices")
        ('Hi', None, None)
    """
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value


def none_for_nonfinite(value: Any) -> Any:
    """Replace numbers that are not finite by `None`, at any depth, because JSON has none.

    Args:
        value: What is to be written as JSON.

    Returns:
        The same, with texts as keys and lists for tuples.

    Example:
        >>> none_for_nonfinite({"kl": [1.0, float("inf")]})
        {'kl': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): none_for_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [none_for_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
