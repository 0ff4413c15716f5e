"""`python -m rlhf_recipes.tools.dashboards --entity my-team --project rlhf-recipes`: make the workspaces."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence

import wandb

from rlhf_recipes.tools.dashboards import (
    as_json,
    comparison_workspace,
    ppo_workspace,
    reward_workspace,
    save_workspace,
)

# The part of a workspace's address that does not change, so that it is found again
_WORKSPACES = {
    "rlhfreward": reward_workspace,
    "rlhfppo": ppo_workspace,
    "rlhfcompare": comparison_workspace,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after the command; by default those of the command line.

    Returns:
        0, or 2 after an error, which is written to the standard error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_recipes.tools.dashboards",
        description="Make the workspaces of a project, or bring them up to date.",
    )
    parser.add_argument("--entity", required=True, type=_name, help="user or team on W&B")
    parser.add_argument("--project", default="rlhf-recipes", type=_name, help="project of the runs (%(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="write the workspaces as JSON, and send nothing")
    args = parser.parse_args(arguments)
    workspaces = {slug: make(args.entity, args.project) for slug, make in _WORKSPACES.items()}
    if args.dry_run:
        json.dump({slug: as_json(workspace) for slug, workspace in workspaces.items()}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return 0
    if not wandb.login(prompt=False, verify=False):
        sys.stderr.write(
            "Saving workspaces needs an account on W&B, and there is no API key on this machine. Run `wandb login` or "
            "set WANDB_API_KEY; `--dry_run` shows the workspaces without one.\n"
        )
        return 2
    try:
        for slug, workspace in workspaces.items():
            sys.stdout.write(f"{workspace.name}: {save_workspace(workspace, slug)}\n")
    except (ValueError, wandb.Error) as error:
        sys.stderr.write(
            f"The workspaces could not be saved: {error}\nCheck the network, the key (`wandb login --relogin`), and "
            f"that {args.entity}/{args.project} exists: the first run that is online or synced makes a project.\n"
        )
        return 2
    return 0


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"must be a name of letters, digits, '-', '_' and '.', got {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
