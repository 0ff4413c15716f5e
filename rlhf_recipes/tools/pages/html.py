"""Parts of HTML pages: no scripts, nothing from the network, every text escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

_NOT_XML = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def clean(text: object) -> str:
    """Escape text for HTML and XML. Characters that XML does not have are replaced (`printable`).

    Example:
        >>> clean('<b> & "b"')
        '&lt;b&gt; &amp; &quot;b&quot;'
    """
    return escape(printable(text))


def printable(text: object) -> str:
    """Replace characters that XML does not have by U+FFFD, the replacement character.

    Example:
        >>> printable("a" + chr(0) + "b") == "a" + chr(0xFFFD) + "b"
        True
    """
    return _NOT_XML.sub("\ufffd", str(text))


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Write a table. Every cell is escaped.

    Example:
        >>> table(["a"], [["<b>"]])
        '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{clean(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{clean(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def document(title: str, style: str, body: str) -> str:
    """Put HTML into a page that loads nothing and runs nothing.

    Args:
        title: Heading of the page, as text.
        style: CSS.
        body: HTML that is escaped where it has to be.

    Returns:
        The page.
    """
    # No source is allowed for anything but the style in the page itself.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        f"<title>{clean(title)}</title><style>{style}</style></head><body><h1>{clean(title)}</h1>"
        f"{body}</body></html>\n"
    )
