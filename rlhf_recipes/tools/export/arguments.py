"""Arguments of `rlhf-recipes export`, apart from what it does: other commands need not wait for its imports."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser.

    Args:
        parser: Parser of `rlhf-recipes export`.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["outputs/x/ppo", "--output_dir", "exports/x", "--merge"]).merge
        True
    """
    parser.add_argument("folder", metavar="RUN", help="folder of a finished SFT, reward or PPO stage")
    parser.add_argument("--output_dir", required=True, type=Path, help="a new folder for the export")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--merge", action="store_true", help="merge the adapter into the base's original weights")
    forms.add_argument(
        "--gguf_ready",
        "--gguf-ready",
        action="store_true",
        help="the same, as llama.cpp's convert_hf_to_gguf.py reads it",
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="merge even where the base's only weights are quantized"
    )
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the export to a new private repository of the hub")
    parser.add_argument("--public", action="store_true", help="with --push: everybody may see it")
    parser.add_argument("--trust_remote_code", action="store_true", help="code that comes with the base may run")
