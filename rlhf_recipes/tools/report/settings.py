"""The section about settings: those of each stage, and where several runs differ."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.tools.pages.html import clean, folded, note, table
from rlhf_recipes.tools.report.parts import TITLES
from rlhf_recipes.tools.report.reading import KINDS, Stage
from rlhf_recipes.tracking import differing_settings, read_settings

_LONGEST = 120  # characters of a value
_VALUES = reprlib.Repr()  # however long or deep they are
_VALUES.maxlevel, _VALUES.maxlist, _VALUES.maxdict, _VALUES.maxstring, _VALUES.maxother = 2, 20, 20, _LONGEST, _LONGEST


def settings(stages: Sequence[Stage]) -> str:
    """Settings of the stages that differ from the defaults, and those in which stages of one kind differ."""
    known: dict[str, tuple[Stage, Mapping[str, Any]]] = {}
    for stage in stages:
        try:
            values = read_settings(stage.folder)
        except (OSError, ValueError) as error:
            stage.missing.append(f"config.yaml is damaged: {str(error).splitlines()[0]}")
            continue
        if values is not None:
            known[stage.name] = stage, {name: value for name, value in values.items() if name != "output_dir"}
    parts = []
    for kind in (*KINDS, "other"):
        alike = {name: values for name, (stage, values) in known.items() if stage.kind == kind}
        if differing := differing_settings(alike.values()):
            rows = [(field, *(_setting(values, field) for values in alike.values())) for field in differing]
            parts.append(f"<h3>Differences: {clean(TITLES.get(kind, kind))}</h3>{table(('', *alike), rows)}")
    for name, (_, own) in known.items():
        rows = [(field, _setting(own, field)) for field in own]
        parts.append(folded(name, table(("setting", "value"), rows)))
    return "".join(parts) or note("No settings are known: a stage writes config.yaml when it starts.")


def _setting(values: Mapping[str, Any], field: str) -> str:
    return _VALUES.repr(values[field]) if field in values else "default"
