"""The command `rlhf-recipes`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf_recipes.reward_modeling.certificate.page import printable
from rlhf_recipes.tracking.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after `rlhf-recipes`; by default those of the command line.

    Returns:
        0, or 2 after an error, which is written to the standard error.
    """
    parser = argparse.ArgumentParser(prog="rlhf-recipes", description="Tools for runs of the recipes.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="make one HTML file of what runs left on disk")
    report.add_argument("folders", nargs="+", help="folders of recipes or of single stages; several are compared")
    report.add_argument("--output_dir", help="where the files go (default: report/ in the first folder)")
    commands.add_parser(
        "plan",
        help="print what memory a PPO run takes, before it is started",
        usage="%(prog)s --config FILE [--field value] [--budget_gib GIB] [--prompt_length TOKENS]",
    )
    given, words = parser.parse_known_args(arguments)
    try:
        if given.command == "plan":
            sys.stdout.write(_plan(words))
            return 0
        if words:
            parser.error(f"unrecognized arguments: {' '.join(words)}")
        path = write_report(given.folders, given.output_dir)
    except (OSError, ValueError) as error:
        if given.command == "report" and isinstance(error, ValueError):
            raise
        sys.stderr.write(f"rlhf-recipes {given.command}: {printable(error)}\n")
        return 2
    sys.stdout.write(f"{printable(path)}\n")
    return 0


def _plan(words: list[str]) -> str:
    from rlhf_recipes.planning.report import write_plan  # it imports TRL, which takes seconds

    return write_plan(words)
