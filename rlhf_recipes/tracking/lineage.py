"""Lineage of a run: commit, versions, command, and the stages before it, kept as `run.json` in its folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_recipes.tracking.settings import without_secrets

_RUN_FILE = "run.json"
_PACKAGES = (
    "rlhf-recipes",
    "trl",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "torch",
    "wandb",
)


def git_commit(path: str | Path = ".") -> str | None:
    """Name the commit that is checked out in a folder.

    Args:
        path: The repository, or any folder in it.

    Returns:
        The full hash, with `-dirty` at its end if a tracked file was changed since; `None` outside of a repository,
        in one without commits, and where git is not installed.

    Example:
        >>> git_commit("/") is None
        True
    """
    command = ["git", "-C", str(path), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def read_run(output_dir: str | Path) -> dict[str, Any] | None:
    """Read what a stage wrote about its run.

    Args:
        output_dir: Folder of the stage.

    Returns:
        The record, or `None` if the folder holds none (or is a hub id).

    Raises:
        ValueError: If the file is there but is not JSON.

    Example:
        >>> read_run("Qwen/Qwen3-0.6B") is None
        True
    """
    file = Path(output_dir) / _RUN_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} must hold the JSON record of a run, but it does not parse: {error}.") from None
    return record


def write_run(output_dir: str | Path, record: dict[str, Any]) -> None:
    """Write the record of a run into its folder, which is made if it does not exist."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    (Path(output_dir) / _RUN_FILE).write_text(json.dumps(record, indent=2) + "\n")


def describe_run(recipe: str, stage: str, parents: Sequence[str]) -> dict[str, Any]:
    """Collect what identifies this run.

    Args:
        recipe: Name of the recipe.
        stage: Name of the stage.
        parents: Folders or hub ids that the stage starts from.

    Returns:
        A record that JSON can hold: `recipe`, `stage`, `parents` (each with its `path` and, where it is a stage of
        ours, its `stage`, `git_commit`, `wandb_run_id` and `wandb_artifact`), `git_commit`, `command` and `versions`.

    Example:
        >>> describe_run("quickstart", "reward", ["Qwen/Qwen3-0.6B"])["parents"]
        [{'path': 'Qwen/Qwen3-0.6B'}]
    """
    return {
        "recipe": recipe,
        "stage": stage,
        "parents": [_describe_parent(path) for path in parents],
        "git_commit": git_commit(),
        "command": _command(),
        "versions": {"python": platform.python_version(), **_installed_versions()},
    }


def stage_config(*arguments: Any) -> dict[str, Any]:
    """Merge the parsed arguments of a stage into one plain dictionary.

    Args:
        arguments: Dataclasses, as the parser returns them. `TrainingArguments` hide their tokens.

    Returns:
        One entry per field.

    Example:
        >>> from trl import ModelConfig
        >>> stage_config(ModelConfig("Qwen/Qwen3-0.6B"))["model_name_or_path"]
        'Qwen/Qwen3-0.6B'
    """
    config: dict[str, Any] = {}
    for argument in arguments:
        config |= argument.to_dict() if hasattr(argument, "to_dict") else asdict(argument)
    return config


def _command() -> str:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1":
        words = ["python", *sys.orig_argv[1:]]
    else:
        words = ["accelerate", "launch", "--num_processes", processes, *sys.argv]
    return shlex.join(without_secrets(words))


def _describe_parent(path: str) -> dict[str, Any]:
    own = read_run(path) or {}
    record = own or read_run(Path(path).parent) or {}  # the stage's folder, or a checkpoint in it
    described = {key: record[key] for key in ("stage", "git_commit", "wandb_run_id") if key in record}
    # The artifact holds what the stage ended with, not its checkpoints
    return {"path": path} | described | {key: own[key] for key in ("wandb_artifact",) if key in own}


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # bitsandbytes on an unsupported machine; this package on `PYTHONPATH` alone
            continue
    return versions
