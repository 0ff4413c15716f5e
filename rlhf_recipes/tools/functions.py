"""Functions that a command line names."""

from __future__ import annotations

import pkgutil
import runpy
from collections.abc import Callable
from typing import Any


def named_function(name: str) -> Callable[..., Any]:
    """Load a function.

    Args:
        name: `FILE.py:NAME` or `package.module:NAME`. The file or the module is run.

    Returns:
        The function.

    Raises:
        ValueError: If the name is of neither form, or the file defines no such name.
        TypeError: If it is no function.

    Example:
        >>> named_function("math:sqrt")(4.0)
        2.0
    """
    place, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"Name the function as FILE.py:NAME or package.module:NAME, got {name!r}.")
    names = runpy.run_path(place) if place.endswith(".py") else {attribute: pkgutil.resolve_name(name)}
    if attribute not in names:
        raise ValueError(f"{place} defines no {attribute!r}.")
    function: Any = names[attribute]
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, and no function.")
    return function  # type: ignore[no-any-return]
