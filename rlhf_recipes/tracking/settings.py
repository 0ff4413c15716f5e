"""Settings of a run, kept as `config.yaml` in its folder: with `--config` they give the run again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from rlhf_recipes.config import given_settings, read_config, write_config

FILE = "config.yaml"
_SECRET = ("hub_token",)
_OF_ONE_START = ("resume_from_checkpoint",)  # another folder holds no checkpoint to go on from


def resolve_settings(*arguments: Any) -> dict[str, Any]:
    """Merge what the dataclasses of a stage were made of into one mapping that `--config` takes.

    Args:
        arguments: Dataclasses, as `parse_stage` returns them.

    Returns:
        The values that differ from the defaults, by field, paths as they were given. `resume_from_checkpoint` is left
        out: the run that comes out starts at its first step.

    Example:
        >>> from rlhf_recipes.config import DataArguments
        >>> resolve_settings(DataArguments("pairs.jsonl", test_size=0.2))
        {'dataset_name': 'pairs.jsonl', 'test_size': 0.2}
    """
    settings: dict[str, Any] = {}
    for argument in arguments:
        settings |= given_settings(argument)
    return {name: value for name, value in settings.items() if name not in _OF_ONE_START}


def write_settings(output_dir: str | Path, settings: Mapping[str, Any], python: Iterable[Any] = ()) -> Path:
    """Write `config.yaml` into the folder of a run, which is made if it does not exist. Secrets are left out.

    Args:
        output_dir: The folder.
        settings: What `resolve_settings` returned.
        python: Objects that the script set in Python (reward functions, a placement). Those that do not come from this
            library are named at the head of the file, which cannot hold them.

    Returns:
        Path of the file.

    Example:
        >>> import tempfile
        >>> print(write_settings(tempfile.mkdtemp(), {"seed": 3, "hub_token": "hf_x"}, [len]).read_text(), end="")
        # Settings that differ from the defaults. The same run again: --config config.yaml --output_dir NEW
        # Set in Python, so that only the same script has it: len
        # Left out, because it is secret: hub_token
        seed: 3
    """
    secret = [name for name, value in settings.items() if _is_secret(name, value)]
    own = [_name(each) for each in python if _is_own(each)]
    lines = ["# Settings that differ from the defaults. The same run again: --config config.yaml --output_dir NEW"]
    lines += [f"# Set in Python, so that only the same script has it: {', '.join(own)}"] if own else []
    lines += [f"# Left out, because it is secret: {', '.join(secret)}"] if secret else []
    kept = {name: value for name, value in settings.items() if name not in secret}
    path = Path(output_dir, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, write_config(kept)]), encoding="utf-8")
    return path


def read_settings(output_dir: str | Path) -> dict[str, Any] | None:
    """Read the settings of a run.

    Args:
        output_dir: Folder of the stage.

    Returns:
        The values by field, or `None` if the folder holds no `config.yaml`.

    Raises:
        ValueError: If the file is damaged.

    Example:
        >>> read_settings("no/such/folder") is None
        True
    """
    path = Path(output_dir, FILE)
    if not path.is_file():
        return None
    try:
        settings = read_config(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold the settings of a run, one `field: value` a line.")
    return {str(name): value for name, value in settings.items()}


def differing_settings(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Find the settings in which runs differ.

    Args:
        runs: The settings of each run, as `read_settings` returns them.

    Returns:
        For each field its value in every run, in their order; `None` also where a run has the default.

    Example:
        >>> differing_settings([{"seed": 0, "kl_coef": 0.1}, {"seed": 0, "kl_coef": 0.0, "critic": "head"}])
        {'kl_coef': [0.1, 0.0], 'critic': [None, 'head']}
    """
    runs = list(runs)
    columns = {name: [run.get(name) for run in runs] for run in runs for name in run}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def without_secrets(words: Sequence[str]) -> list[str]:
    """Put `***` in the place of what is secret among the words of a command.

    Example:
        >>> without_secrets(["ppo.py", "--hub_token", "hf_x", "--reward_url=https://me:key@host/", "--seed", "1"])
        ['ppo.py', '--hub_token', '***', '--reward_url=***', '--seed', '1']
    """
    shown, option = [], ""
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else (option, "", word)
        option = name if word.startswith("--") and not equals else ""
        secret = bool(value) and _is_secret(name.removeprefix("--").replace("-", "_"), value)
        shown.append((f"{name}=***" if equals else "***") if secret else word)
    return shown


def _is_secret(name: str, value: Any) -> bool:
    """A token, or an address with a password in it."""
    return name in _SECRET or (isinstance(value, str) and "://" in value and "@" in urlsplit(value).netloc)


def _is_own(value: Any) -> bool:
    module = getattr(value, "__module__", None)  # text, None and lists have none
    return module is not None and module.partition(".")[0] != __name__.partition(".")[0]


def _name(value: Any) -> str:
    name = getattr(value, "__name__", type(value).__name__)
    return "".join(character if character.isprintable() else "?" for character in str(name))
