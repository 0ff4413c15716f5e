"""Packages that only some parts need: they come with an extra, `pip install 'rlhf-recipes[report]'`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def from_extra(extra: str, needed_by: str) -> Iterator[None]:
    """Name the command that installs the packages imported within, where one is missing.

    Args:
        extra: The extra of `pyproject.toml` that brings them.
        needed_by: What they are needed for, as the subject of a sentence.

    Raises:
        ModuleNotFoundError: If an import within finds no module; it names the command that installs it.

    Example:
        >>> with from_extra("report", needed_by="Self-BLEU"):
        ...     import no_such_package
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: Self-BLEU needs no_such_package, ...: pip install 'rlhf-recipes[report]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ModuleNotFoundError(
            f"{needed_by} needs {package}, which is not installed. Install it with: "
            f"pip install 'rlhf-recipes[{extra}]'",
            name=error.name,
        ) from error
