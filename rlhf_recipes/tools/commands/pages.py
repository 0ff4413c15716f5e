"""The page that `--help` prints for a script's command: our own options, and those of TRL that the recipes set."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rlhf_recipes.tools.commands.fields import Field, read_arguments
from rlhf_recipes.tools.commands.folder import recipes_folder

_HEADER = re.compile(r"# (?:accelerate launch|python) recipes/(\S+\.py) ")
_KEY = re.compile(r"(?m)^(\w+):")


def script_of(config: str) -> str | None:
    """Name the script that a YAML is for, as its first line says: a path in the folder of the recipes.

    Example:
        >>> script_of("# accelerate launch recipes/sft.py --config recipes/quickstart/sft.yaml")
        'sft.py'
    """
    header = _HEADER.match(config)
    return header[1] if header else None


def keys_of_recipes(script: Path) -> Counter[str]:
    """Count the YAMLs of the recipes for a script in which a key is set.

    Example:
        >>> keys_of_recipes(recipes_folder() / "sft.py")["learning_rate"] > 1
        True
    """
    name = script.relative_to(recipes_folder()).as_posix()
    texts = [path.read_text(encoding="utf-8") for path in sorted(recipes_folder().glob("*/*.yaml"))]
    return Counter(key for text in texts if script_of(text) == name for key in _KEY.findall(text))


def add_options(parser: argparse.ArgumentParser, script: Path) -> None:
    """Add the options of a script to a parser whose page is printed, one group for each of its dataclasses.

    Args:
        parser: Gets an option for every field of ours, and for the inherited ones that a YAML of a recipe sets.
        script: A script in the folder of the recipes.
    """
    groups = read_arguments(script)
    for group in groups:
        if group.own:
            _add(parser, f"{group.name}: {group.summary.rstrip('.')}", group.own)
    used = keys_of_recipes(script)
    inherited = [field for group in groups for field in group.inherited if field.name in used]
    if inherited:
        number = sum(len(group.inherited) for group in groups) - len(inherited)
        _add(parser, f"Of TRL and transformers, as set in the recipes ({number} more: --help-all)", inherited)


def _add(parser: argparse.ArgumentParser, title: str, fields: Iterable[Field]) -> None:
    group = parser.add_argument_group(title)
    for field in fields:
        default = "required" if field.default is None else f"default: {field.default or repr('')}"
        # argparse reads its own `%` forms in a help, but none in the values of a default
        text = f"{field.help.rstrip('.')} ({default.replace('%', '%%')})"
        group.add_argument(f"--{field.name}", metavar=field.kind, help=text.lstrip())
