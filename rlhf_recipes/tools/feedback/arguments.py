"""The arguments of `rlhf-recipes judge` and `rlhf-recipes revise`; nothing that takes time is imported for them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rlhf-recipes judge`.

    Args:
        parser: The parser of the command.
    """
    _add_rows(parser, "the pairs: two answers each, or more, with labels of people or without")
    model = _add_model(parser)
    model.add_argument("--function", metavar="FILE.py:NAME", help="a function of prompt and two answers as the judge")
    parser.add_argument("--principles", type=Path, help="text file, a principle a line; one is drawn for each pair")
    parser.add_argument(
        "--words",
        action="store_true",
        help="take the judge's word for a label (1, 0 or 0.5), not the probabilities of its answer",
    )
    parser.add_argument(
        "--reasoning_tokens", type=int, default=0, metavar="N", help="ask for reasons of up to N tokens first"
    )
    parser.add_argument(
        "--clamp",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="keep labels within these bounds (default: 0.4 0.6 with reasons, else none)",
    )
    parser.add_argument(
        "--least_mass",
        type=float,
        default=0.5,
        help="probability of A and B together below which a reply is no answer (default: 0.5)",
    )
    parser.add_argument("--question", type=Path, help="text file with a question of your own")
    _add_cost(parser)
    parser.set_defaults(run=_judge)


def add_revise(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rlhf-recipes revise`.

    Args:
        parser: The parser of the command.
    """
    _add_rows(parser, "the prompts to answer")
    _add_model(parser)
    parser.add_argument(
        "--principles", type=Path, required=True, help="text file with a principle a line; one is drawn for each round"
    )
    parser.add_argument("--rounds", type=int, default=1, help="critiques and revisions of each answer (default: 1)")
    parser.add_argument("--pairs", type=Path, help="also write the revisions as preferred to the first answers")
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="longest answer, critique and revision (default: 256)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for the likeliest texts (default: 1)")
    _add_cost(parser)
    parser.set_defaults(run=_revise)


def _judge(args: argparse.Namespace) -> str:
    from rlhf_recipes.tools.feedback.judging import judge

    return judge(args)


def _revise(args: argparse.Namespace) -> str:
    from rlhf_recipes.tools.feedback.revising import revise

    return revise(args)


def _add_rows(parser: argparse.ArgumentParser, rows: str) -> None:
    parser.add_argument("--data", required=True, help=f"file, folder or dataset id with {rows}")
    parser.add_argument("--split", default="train", help="split of the rows (default: train)")
    parser.add_argument("--drop_bad_rows", action="store_true", help="leave out rows that cannot be used")
    parser.add_argument("--output", type=Path, required=True, help="jsonl file to write; the same command goes on")


def _add_model(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--local", metavar="MODEL", help="hub id or folder of a model, or of an adapter of ours")
    model.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible endpoint, as http://localhost:8000/v1")
    parser.add_argument("--model", help="name of the model at the endpoint")
    parser.add_argument("--dtype", default="auto", help="type of a local model's weights (default: as saved)")
    parser.add_argument("--key_variable", help="environment variable with the endpoint's key")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one request (default: 60)")
    parser.add_argument("--retries", type=int, default=2, help="tries after the first that failed (default: 2)")
    parser.add_argument("--workers", type=int, default=4, help="requests at the same time (default: 4)")
    return model


def _add_cost(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the principles and of drawn texts (default: 0)")
    parser.add_argument("--max_calls", type=int, help="stop before more requests than this")
    parser.add_argument("--max_tokens", type=int, help="stop after this many tokens, read and written")
    parser.add_argument(
        "--prices", nargs=2, type=float, metavar=("READ", "WRITTEN"), help="of a million tokens, for the report"
    )
    parser.add_argument("--cache", type=Path, help="file with all answers (default: beside the output)")
