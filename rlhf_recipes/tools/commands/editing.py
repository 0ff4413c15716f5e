"""Change fields in the text of a YAML, whose other lines and comments stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import yaml

Machine = Literal["cpu", "gpu", "old_gpu"]

# What a stage's YAML says about the machine: a GPU that computes in bfloat16, one that does not, and none.
_SETTINGS: dict[Machine, dict[str, Any]] = {
    "gpu": {"dtype": "bfloat16", "bf16": True, "use_cpu": False, "activation_checkpointing": True},
    "old_gpu": {"dtype": "float32", "bf16": False, "use_cpu": False, "activation_checkpointing": True},
    "cpu": {"dtype": "float32", "bf16": False, "use_cpu": True, "activation_checkpointing": False},
}
_PLAIN_TEXT = re.compile(r"[A-Za-z./~][\w./@~-]*")


def find_machine() -> Machine:
    """Say what this machine trains on: `gpu` (with bfloat16), `old_gpu` (without) or `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "gpu" if torch.cuda.is_bf16_supported(including_emulation=False) else "old_gpu"


def set_field(text: str, name: str, value: Any) -> str:
    r"""Give a field another value. A comment on its line is about the old one, and goes.

    Args:
        text: A YAML of `field: value` lines.
        name: The field. Where the text does not have it, nothing changes.
        value: A text, a number, or true or false.

    Returns:
        The changed text.

    Example:
        >>> set_field("bf16: true  # Ampere or later\nseed: 0\n", "bf16", False)
        'bf16: false\nseed: 0\n'
    """
    return re.sub(rf"(?m)^{name}:.*$", lambda _: f"{name}: {written(value)}", text)


def drop_fields(text: str, names: Collection[str]) -> str:
    r"""Remove the lines of fields.

    Example:
        >>> drop_fields("seed: 0\npad_token: <pad>\n", ["pad_token"])
        'seed: 0\n'
    """
    return re.sub(rf"(?m)^(?:{'|'.join(names)}):.*\n", "", text)


def add_line(text: str, line: str, after: str) -> str:
    r"""Put a line behind that of a field, or at the end if the text does not have the field.

    Example:
        >>> add_line("seed: 0\nbf16: true\n", "pad_token: <pad>", after="seed")
        'seed: 0\npad_token: <pad>\nbf16: true\n'
    """
    if re.search(rf"(?m)^{after}:", text):
        return re.sub(rf"(?m)^{after}:.*$", lambda found: f"{found[0]}\n{line}", text, count=1)
    return f"{text.rstrip()}\n{line}\n"


def fit_to_machine(text: str, machine: Machine, defaults: Mapping[str, str | None]) -> str:
    r"""Set what a YAML says about the machine, unless it was written for such a one.

    Args:
        text: YAML of a script.
        machine: What it will run on.
        defaults: Defaults of the script's fields, as in a YAML. Others are not set, and neither are values that are
            the default.

    Returns:
        The text; on another kind of machine with other lines for `dtype`, `bf16`, `use_cpu`,
        `activation_checkpointing` and `dataloader_pin_memory`.

    Example:
        >>> fields = {"dtype": "float32", "bf16": "null", "use_cpu": "false"}
        >>> print(fit_to_machine("seed: 0\ndtype: bfloat16\nbf16: true  # Ampere\n", "cpu", fields), end="")
        seed: 0
        bf16: false
        use_cpu: true
        >>> fit_to_machine("bf16: false\nuse_cpu: true\n", "cpu", fields)
        'bf16: false\nuse_cpu: true\n'
    """
    has = yaml.safe_load(text)
    for_cpu = has.get("use_cpu", False) if "use_cpu" in defaults else has.get("dtype") != "bfloat16"
    if machine == ("cpu" if for_cpu else "gpu"):
        return text
    settings = {**_SETTINGS[machine], "dataloader_pin_memory": machine != "cpu"}
    wanted = {name: written(value) for name, value in settings.items() if name in defaults}
    new = [f"{name}: {value}" for name, value in wanted.items() if value != defaults[name]]
    lines = text.splitlines()
    names = [line.partition(":")[0] for line in lines]
    place = next((row for row, name in enumerate(names) if name in settings), None)
    if place is None:
        place = names.index("load_in_4bit") + 1 if "load_in_4bit" in names else len(lines)
    kept = [line for line, name in zip(lines[place:], names[place:], strict=True) if name not in settings]
    return "\n".join([*lines[:place], *new, *kept, ""])


def written(value: Any) -> str:
    """Write a value as YAML reads it: text in quotes where it needs them.

    Example:
        >>> written("Qwen/Qwen2.5-0.5B"), written("<pad>"), written(True), written("null")
        ('Qwen/Qwen2.5-0.5B', '"<pad>"', 'true', '"null"')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if _PLAIN_TEXT.fullmatch(text) and yaml.safe_load(text) == text else json.dumps(text)
