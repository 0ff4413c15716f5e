"""Run the scripts of the recipes as commands: stages by accelerate's launcher, the others as they are."""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_recipes.config import group_options
from rlhf_recipes.tools import planning
from rlhf_recipes.tools.commands.fields import read_fields, summary
from rlhf_recipes.tools.commands.folder import recipes_folder
from rlhf_recipes.tools.commands.pages import add_options

STAGES = {"sft": "sft.py", "reward": "reward.py", "ppo": "ppo.py", "grpo": "grpo.py"}
SCRIPTS = {**STAGES, "certificate": "reward_report.py", "serve": "serve_reward.py", "plan": "ppo.py"}


def describe(command: str) -> str:
    """Say in a line what a command does.

    Args:
        command: One of `SCRIPTS`.

    Returns:
        The first line of its script's docstring.

    Example:
        >>> describe("sft")[:35]
        'Stage 1: supervised fine-tuning. A '
    """
    if command == "plan":
        return "Print what memory and time a PPO run takes, on one GPU or several, before it is started."
    return summary(recipes_folder() / SCRIPTS[command])


def help_page(command: str) -> str:
    """Write the page of a command without importing what its script needs.

    Args:
        command: One of `SCRIPTS`.

    Returns:
        The page: the options of the command, our own of the script, and the inherited ones that the recipes set.

    Example:
        >>> "--kl_coef" in help_page("ppo"), "--num_processes" in help_page("serve")
        (True, False)
    """
    parser = _parser(command)
    add_options(parser, recipes_folder() / SCRIPTS[command])
    return parser.format_help()


def full_help(command: str) -> None:
    """Print the options of a command, and then all that the script's own parser knows, which takes seconds.

    Args:
        command: One of `SCRIPTS`.

    Raises:
        SystemExit: With 0, after the last page.
    """
    sys.stdout.write(f"{_parser(command).format_help()}\n")
    sys.stdout.flush()
    run_script(command, ["--help"])


def run_script(command: str, words: Sequence[str]) -> None:
    """Run a script of the recipes in this process, as Python does.

    Args:
        command: One of `SCRIPTS`.
        words: Its command line.
    """
    script = str(recipes_folder() / SCRIPTS[command])
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def launch(stage: str, words: Sequence[str]) -> int:
    """Run a stage by `accelerate launch`.

    Args:
        stage: One of `STAGES`.
        words: Options of the stage and of `accelerate launch`, in any order; one that both know is the stage's. And
            `--accelerate_config`: a file for accelerate, or the name of one in `recipes/accelerate`.

    Returns:
        0, or 1 if the stage failed.

    Raises:
        FileNotFoundError: If there is no such configuration.
        ValueError: If `--accelerate_config` has not one value, or accelerate refuses its options.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser  # it imports torch

    script = recipes_folder() / STAGES[stage]
    fields = read_fields(script)
    for_accelerate: list[str] = []
    for_stage: list[str] = []
    for first, *values in group_options(words):
        option, equals, inline = first.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name == "accelerate_config":
            for_accelerate += ["--config_file", _accelerate_config([inline, *values] if equals else values)]
        elif name not in {*fields, "config"} and _is_known(launch_command_parser(), [first, *values]):
            for_accelerate += [first, *values]
        else:
            for_stage += [first, *values]
    try:
        launch_command(launch_command_parser().parse_args([*for_accelerate, str(script), *for_stage]))
    except subprocess.CalledProcessError:  # the stage has said why
        return 1
    return 0


def _is_known(parser: argparse.ArgumentParser, group: list[str]) -> bool:
    # What the parser takes for the script shows whether it knows the option and how many words belong to it.
    known, unknown = parser.parse_known_args([*group, "SCRIPT"])
    return not unknown and known.training_script == "SCRIPT"


def _accelerate_config(values: list[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"`--accelerate_config` takes a file or a name, got {' '.join(values) or 'nothing'}.")
    folder = recipes_folder() / "accelerate"
    for path in (Path(values[0]), folder / f"{values[0]}.yaml"):
        if path.is_file():
            return str(path)
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise FileNotFoundError(f"`--accelerate_config` {values[0]!r} is no file, and none of the names {names}.")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"rlhf-recipes {command}",
        usage="%(prog)s [--config FILE] [--field value ...]",
        description=describe(command),
        epilog="Every field is also a key of the YAML. The command line wins; `null` unsets a field.",
        add_help=False,
        # A field of vLLM that a recipe sets is an option of the plan too
        conflict_handler="resolve" if command == "plan" else "error",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page")
    parser.add_argument("--help-all", action="store_true", help="show every field, which takes seconds")
    parser.add_argument("--config", metavar="FILE", help="YAML file with values of the fields")
    if command == "plan":
        planning.add_arguments(parser)
    if command in STAGES:
        group = parser.add_argument_group("Of accelerate (all others of `accelerate launch` can be given too)")
        group.add_argument(
            "--accelerate_config", metavar="FILE", help="its configuration, or a name: single_process, ddp"
        )
        group.add_argument("--num_processes", metavar="int", help="processes, one for each GPU")
    return parser
