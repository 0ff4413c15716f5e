"""Write a certificate into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.statistics.numbers import none_for_nonfinite
from rlhf_recipes.tools.pages.certificate import page

if TYPE_CHECKING:
    from collections.abc import Mapping

JSON_FILE, HTML_FILE = "certificate.json", "certificate.html"


def write_certificate(measures: Mapping[str, Any], folder: str | Path, title: str) -> None:
    """Write `certificate.json` and `certificate.html`.

    Args:
        measures: What `certify` measured, perhaps with `reward_bench`. The JSON leaves out the single scores that the
            plots are drawn from, and has `null` for numbers that are not finite.
        folder: Where the files go.
        title: Heading of the page.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    record = {"title": title, **plain(measures)}
    Path(folder, JSON_FILE).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    Path(folder, HTML_FILE).write_text(page(measures, title), encoding="utf-8", errors="replace")


def plain(value: Any) -> Any:
    """Convert measures to what JSON can hold: no `values` of plots, and `None` for numbers that are not finite.

    Example:
        >>> plain({"temperature": float("inf"), "scores": {"values": [1.0], "n": 1}})
        {'temperature': None, 'scores': {'n': 1}}
    """
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key != "values"}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else none_for_nonfinite(value)
