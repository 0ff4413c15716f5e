"""Memory of a run, computed before it starts and without its weights."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a plan takes beside the fields of the PPO stage."""
    parser.add_argument("--budget_gib", type=float, metavar="float", help="memory that the run may take, in GiB")
    parser.add_argument(
        "--prompt_length", type=int, metavar="int", help="tokens of the longest prompt (default: the rows are read)"
    )
