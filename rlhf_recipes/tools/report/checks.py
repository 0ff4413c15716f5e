"""Checks of a reward in a report: what a verifier pays for, and the certificate of a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.tools.pages.certificate import sections, verdict_section
from rlhf_recipes.tools.pages.html import clean, folded, note, table
from rlhf_recipes.tools.report.parts import TITLES, shown
from rlhf_recipes.tools.report.reading import KINDS, Stage, finite

_LONGEST = 120  # characters of a verifier's texts


def checks(kind: str, stages: Sequence[Stage], everything: Sequence[Stage]) -> str:
    """Write the checks of a reward.

    Args:
        kind: `sft`, `reward` or `ppo`.
        stages: The stages of this kind.
        everything: The stages of all kinds: a check of one kind links to the other one, wherever that is.

    Returns:
        HTML; nothing if there are none.
    """
    parts = []
    if verified := [verifier(stage) for stage in stages if stage.record("verifier")]:
        lead = "For a learned reward model, the probes of its certificate ask what it pays for"
        parts.append(f'<h3 id="{kind}-verifier">Can the reward be bought?</h3>{"".join(verified)}')
        parts.append(_link("certificate", lead, everything))
    if certified := [stage for stage in stages if stage.record("certificate")]:
        lead = "The probes (sensitivity) ask what a learned reward model pays for; which wrong answers a function pays"
        parts.append(f'<div id="{kind}-certificate">')
        parts += [f"<h3>Certificate: {clean(stage.name)}</h3>{_certificate(stage)}" for stage in certified]
        parts.append(f"{_link('verifier', lead, everything)}</div>")
    return "".join(parts)


def _link(name: str, lead: str, everything: Sequence[Stage]) -> str:
    """Write a sentence with links to where the page has this check of a reward; nothing if it has none."""
    kinds = [kind for kind in KINDS if any(stage.kind == kind and stage.record(name) for stage in everything)]
    links = ", ".join(f'<a href="#{kind}-{name}">{clean(TITLES[kind])}: {name}</a>' for kind in kinds)
    return f'<p class="note">{clean(lead)}: {links}.</p>' if links else ""


def verifier(stage: Stage) -> str:
    """Write what a reward pays for right and for wrong answers, from `verifier.json`, as far as the file can be read.

    Args:
        stage: Its `missing` gets a sentence if the file cannot be shown whole.

    Returns:
        HTML: the verdict, what was tried, and the kinds of answers, with a mark at those that are paid wrongly.
    """
    record = stage.record("verifier")
    level, sentence = bought(record)
    if level == "care" or not _whole(record):
        stage.missing.append("verifier.json cannot be shown whole, it may be from another version.")
    rows, pays = record.get("rows"), record.get("pays")
    drawn: Mapping[str, Any] = rows if isinstance(rows, dict) else {}
    ends = [f"{end:g}" if finite(end) else "-" for end in pays] if isinstance(pays, list) and len(pays) == 2 else ["-"]
    tried = (
        f"{_text(record.get('reward'))} on {shown(drawn.get('number'))} rows of {_text(drawn.get('source'))} "
        f"({_text(drawn.get('split'))}), seed {shown(drawn.get('seed'))}. It pays {' to '.join(ends)}. Wrong answers "
        f"may get a share of {shown(record.get('bound'))} on average, the rows' own answers lose no more than that."
    )
    kinds = [
        (
            _text(row.get("kind")),
            ("right" if row["right"] else "wrong") if isinstance(row.get("right"), bool) else "-",
            shown(row.get("paid"), row.get("interval")),
            shown(row.get("rows")),
            _mark(row, record),
            "" if row.get("rows") == 0 else repr(_text(row.get("example"))),
        )
        for row in _kinds(record)
    ]
    header = ("answer", "", "paid [95 % interval]", "rows", "", "best paid wrong, worst paid right text")
    box = f'<p class="verdict {level}"><strong>{clean(stage.name)}</strong>: {clean(sentence)}</p>'
    return box + note(tried) + (table(header, kinds) if kinds else "")


def bought(record: Mapping[str, Any]) -> tuple[str, str]:
    """Say in one sentence whether a reward can be had without the answer.

    Args:
        record: What `verifier.json` holds, perhaps damaged. A kind above the bound counts whatever verdict is written.

    Returns:
        `good`, `bad`, or `care` where the file does not say or not all of it can be read; and the sentence.

    Example:
        >>> kinds = [{"kind": "negated", "right": False, "rows": 20, "paid": 0.5, "interval": [0.3, 0.7]}]
        >>> bought({"bound": 0.1, "kinds": kinds, "verdict": {"verdict": "bought", "kinds": ["negated"]}})
        ('bad', 'It can be bought: it pays for negated 0.500 [0.300, 0.700].')
        >>> bought({"verdict": {"verdict": "not bought"}})[0]
        'care'
    """
    value: Any = record.get("verdict")
    written = value if isinstance(value, dict) else {}
    above = [row for row in _kinds(record) if _above(row, record)]
    paid = [f"{_text(row.get('kind'))} {shown(row['paid'], row.get('interval'))}" for row in above]
    if not paid and isinstance(written.get("kinds"), list):
        paid = [_text(kind) for kind in written["kinds"]]
    what = f"it pays for {', '.join(paid)}" if paid else "which kinds it pays for is not known"
    if written.get("verdict") == "true answers not paid":
        return "bad", "The rows' own answers are paid too little." + (f" And {what}." if paid else "")
    if above or written.get("verdict") == "bought":
        return "bad", f"It can be bought: {what}."
    if written.get("verdict") != "not bought":
        return "care", "No verdict is known."
    if not _whole(record):
        return "care", "Not bought, says the file, but what this rests on is not whole."
    return "good", "Not bought: no wrong kind of answer is paid above the bound."


def _kinds(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = record.get("kinds")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _whole(record: Mapping[str, Any]) -> bool:
    kinds = _kinds(record)
    read = [isinstance(row.get("right"), bool) and (finite(row.get("paid")) or row.get("rows") == 0) for row in kinds]
    return finite(record.get("bound")) and bool(kinds) and len(kinds) == len(record["kinds"]) and all(read)


def _above(row: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    paid, bound = row.get("paid"), record.get("bound")
    return row.get("right") is False and finite(paid) and finite(bound) and paid > bound


def _mark(row: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    paid, bound = row.get("paid"), record.get("bound")
    if row.get("rows") == 0:
        return "not tried"
    if row.get("kind") == "true" and finite(paid) and finite(bound) and paid < 1 - bound:
        return "too little"
    return "above the bound" if _above(row, record) else ""


def _text(value: Any) -> str:
    """Text as it is, cut where it is long; a dash for what is no text."""
    if not isinstance(value, str):
        return "-"
    return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 3]}..."


def _certificate(stage: Stage) -> str:
    measures = stage.record("certificate")
    for write in (sections, lambda certificate: [verdict_section(certificate["verdict"])]):
        try:
            first, *rest = write(measures)
        except Exception as error:  # a file from another version may lack anything
            reason = f"certificate.json cannot be shown whole, it may be from another version: {error!r}."
            if reason not in stage.missing:
                stage.missing.append(reason)
        else:
            below = "".join(rest).replace("h2>", "h3>")  # it is part of a section here; texts have no bare `>`
            return first + folded("What it rests on", below)
    return note("It cannot be shown: see what is missing.")
