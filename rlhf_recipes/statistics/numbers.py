"""Recognise numbers in rows and logs."""

from __future__ import annotations

import math
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
