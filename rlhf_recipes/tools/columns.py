"""Tables of text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def in_columns(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    r"""Align the cells of rows in columns, two spaces apart.

    Args:
        rows: The rows, all of one length; the first may be the header.
        left: How many of the first columns are flush left, as texts are; the others are flush right, as numbers are.

    Returns:
        One line for each row.

    Example:
        >>> print(*in_columns([["item", "n"], ["a", "10"]], left=1), sep="\n")
        item   n
        a     10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
