"""Parts of HTML pages: no scripts, nothing from the network, every text escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

_NOT_XML = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
_SHORT = 36  # characters that a cell of a table keeps on one line


class Html(str):
    """What is HTML already, and is not escaped again."""

    __slots__ = ()


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
    """Write a table that scrolls in its own box where the page is narrow. Every cell but `Html` is escaped.

    Example:
        >>> table(["a"], [["<b>"]])  # doctest: +ELLIPSIS
        '<div class="wide"><table>...<tbody><tr><td>&lt;b&gt;</td></tr></tbody></table></div>'
    """
    head = "".join(f"<th>{clean(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, Html):
        return f"<td>{value}</td>"
    text = clean(value)
    return f'<td class="long">{text}</td>' if len(text) > _SHORT else f"<td>{text}</td>"


def note(text: object) -> str:
    """Write a paragraph in the softer colour.

    Example:
        >>> note("1 < 2")
        '<p class="note">1 &lt; 2</p>'
    """
    return f'<p class="note">{clean(text)}</p>'


def folded(summary: object, html: str) -> str:
    """Hide HTML behind a line that opens it.

    Args:
        summary: The line, as text.
        html: What it opens.

    Returns:
        The element, closed at first; nothing where there is nothing to hide.

    Example:
        >>> folded("More", "<p>text</p>"), folded("More", "")
        ('<details><summary>More</summary><p>text</p></details>', '')
    """
    return f"<details><summary>{clean(summary)}</summary>{html}</details>" if html else ""


def figure(title: object, svg: str, caption: object) -> str:
    """Put a plot between its heading, which may be empty, and how to read it.

    Example:
        >>> figure("KL", "<svg/>", "Nats.")
        '<figure><h3>KL</h3><svg/><figcaption>Nats.</figcaption></figure>'
    """
    heading = f"<h3>{clean(title)}</h3>" if title else ""
    return f"<figure>{heading}{svg}<figcaption>{clean(caption)}</figcaption></figure>"


def grid(figures: Iterable[str]) -> str:
    """Put figures beside each other, as many as fit; nothing if there are none.

    Example:
        >>> grid(["<figure></figure>"]), grid([])
        ('<div class="plots"><figure></figure></div>', '')
    """
    inside = "".join(figures)
    return f'<div class="plots">{inside}</div>' if inside else ""


def document(title: str, body: str) -> str:
    """Put HTML into a page that loads nothing and runs nothing.

    Args:
        title: Heading of the page, as text.
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
        f"<title>{clean(title)}</title><style>{_STYLE}</style></head><body><h1>{clean(title)}</h1>"
        f"{body}</body></html>\n"
    )


# A page never scrolls sideways, however narrow: tables do, in their own boxes, with a shadow at the side that goes on.
_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5c5c5c; --line: #dcdcdc; --box: #f5f5f5; --page: #fff;
  --shade: rgba(0, 0, 0, .22); }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --soft: #a5a5a5; --line: #3b3b3b; --box: #222426; --page: #151617;
    --shade: rgba(255, 255, 255, .28); }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
p, dl { max-width: 50rem; } nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; } a { color: inherit; }
.wide { overflow-x: auto; margin: .8rem 0; background:
  linear-gradient(to right, var(--page) 30%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 30%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; vertical-align: top; overflow-wrap: normal; }
th { vertical-align: bottom; font-weight: 600; } td { border-top: 1px solid var(--line); white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
.plots { display: grid; gap: 1.6rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; max-width: 32rem; } figure h3 { margin-top: .4rem; }
figcaption, .note, dd { color: var(--soft); font-size: .94rem; } svg { width: 100%; height: auto; }
.verdict { padding: .6rem 1rem; border-left: .4rem solid; background: var(--box); max-width: 60rem; }
.verdict strong { font-size: 1.1rem; }
.good { border-color: #2b9d4b; } .care { border-color: #d9822b; } .bad { border-color: #cf3a31; }
pre { white-space: pre-wrap; background: var(--box); padding: .5rem; margin: .2rem 0; font-size: .88rem; }
.sides { display: grid; gap: .3rem 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.sample { border-top: 1px solid var(--line); padding: .6rem 0; } .sample div { margin-top: .2rem; }
summary { cursor: pointer; } details { margin: .6rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
.sign { padding-right: .35em; }
@media (max-width: 40rem) {
  table { font-size: .94rem; } th, td { padding-right: .8rem; } td.long { min-width: 11rem; }
}
"""
