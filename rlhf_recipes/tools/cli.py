"""The command `rlhf-recipes`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_recipes.config import show_bars_on_terminals_only
from rlhf_recipes.tools.commands.folder import recipe_names
from rlhf_recipes.tools.commands.scripts import SCRIPTS, STAGES, describe, full_help, help_page, launch, run_script
from rlhf_recipes.tools.export.arguments import add_arguments as add_export
from rlhf_recipes.tools.feedback.arguments import add_judge, add_revise
from rlhf_recipes.tools.functions import named_function
from rlhf_recipes.tools.labeling.command import add_arguments as add_label
from rlhf_recipes.tools.pages.html import printable

if TYPE_CHECKING:
    from rlhf_recipes.rewards.verifier import PaidAnswers

_LOADING = ("export", "judge", "rank", "rate", "revise", "verifier")  # with the progress bars of the libraries below
_TRACED = ("report", "certificate", "serve")  # a ValueError of theirs is a bug, or has a traceback in the script too
_SEED = 0  # of the draw of rows that a verifier is tried on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after `rlhf-recipes`; by default those of the command line.

    Returns:
        0; 1 for a stage that failed or a verifier that can be bought; 2 after an error. What is wrong is written to
        the standard error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="rlhf-recipes", description="Train with the recipes, and look at runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_new(commands.add_parser("new", help="copy a recipe into a folder of your own, to edit and to run"))
    for name in SCRIPTS:  # their words are read by their scripts
        commands.add_parser(name, help=describe(name), add_help=False)
    _add_report(commands.add_parser("report", help="make one HTML file of what runs left on disk"))
    _add_verifier(commands.add_parser("verifier", help="try which wrong answers a reward function pays"))
    _add_rank(commands.add_parser("rank", help="rank the items of a table of votes"))
    _add_rate(commands.add_parser("rate", help="turn rankings of completions into ratings, to fit a reward model to"))
    add_label(commands.add_parser("label", help="compare answers on a local page, and export the preferences"))
    add_judge(commands.add_parser("judge", help="let a model label pairs of answers, as preferences"))
    add_revise(commands.add_parser("revise", help="let a model answer, criticise by principles, and revise"))
    exporting = commands.add_parser("export", help="make an adapter or a merged model of a run, with a model card")
    add_export(exporting)
    exporting.set_defaults(run=_export)
    args, unknown = parser.parse_known_args(words)
    try:
        if args.command in SCRIPTS:
            return _run_script(args.command, words[1:])
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        if args.command in _LOADING:
            show_bars_on_terminals_only()
        if args.command == "verifier":
            return _verifier(args)
        sys.stdout.write(f"{printable(args.run(args))}\n")
    except (ModuleNotFoundError, OSError, ValueError) as error:
        if args.command in _TRACED and isinstance(error, ValueError):
            raise
        sys.stderr.write(f"rlhf-recipes {args.command}: {printable(error)}\n")
        return 2
    return 0


def _run_script(command: str, words: list[str]) -> int:
    if not {"-h", "--help"}.isdisjoint(words):
        sys.stdout.write(help_page(command))
    elif "--help-all" in words:
        full_help(command)
    elif command == "plan":
        from rlhf_recipes.tools.planning.report import write_plan  # it imports TRL, which takes seconds

        sys.stdout.write(write_plan(words))
    elif command in STAGES:
        return launch(command, words)
    else:
        run_script(command, words)
    return 0


def _add_new(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(recipe_names())
    parser.add_argument("name", help="folder to make here; its runs go to outputs/NAME")
    parser.add_argument("--from", dest="recipe", required=True, metavar="RECIPE", help=f"recipe to copy: {names}")
    parser.add_argument("--model", help="hub id or folder of the model to train, in place of the recipe's")
    parser.add_argument("--data", help="file, folder or dataset id to read, in place of the recipe's")
    parser.set_defaults(run=_new)


def _new(args: argparse.Namespace) -> str:
    from rlhf_recipes.tools.commands.new import new_recipe

    return new_recipe(args.name, args.recipe, model=args.model, data=args.data)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="folders of recipes or of single stages; several are compared")
    parser.add_argument("--output_dir", help="where the files go (default: report/ in the first folder)")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> Path:
    from rlhf_recipes.tools.report import write_report

    return write_report(args.folders, args.output_dir)


def _add_verifier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reward", help="FILE.py:NAME or package.module:NAME of the reward function")
    parser.add_argument("rows", help="file, folder or dataset id with the rows")
    parser.add_argument("--split", default="train", help="split of the rows (default: train)")
    parser.add_argument("--answer_column", default="answer", help="column of the true answers (default: answer)")
    parser.add_argument("--template", default="{answer}", help="what a completion looks like (default: {answer})")
    parser.add_argument("--constant", default="0", help="the answer that is tried in every row (default: 0)")
    parser.add_argument(
        "--pays",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("LEAST", "MOST"),
        help="what the reward pays at least and at most (default: 0 1)",
    )
    parser.add_argument(
        "--bound", type=float, default=0.1, help="share of it that wrong answers may get (default: 0.1)"
    )
    parser.add_argument("--number", type=int, default=200, help="rows to try, drawn at random (default: 200)")
    parser.add_argument("--output_dir", type=Path, help="folder that gets verifier.json, for the report")


def _add_rank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("votes", help="file, folder or dataset id with `winner`, `loser`, `tie`, `group`, `annotator`")
    parser.add_argument("--split", default="train", help="split of the votes (default: train)")
    parser.add_argument("--next", type=int, metavar="N", help="also name the N pairs to ask about next")
    parser.set_defaults(run=_rank)


def _rank(args: argparse.Namespace) -> str:
    from rlhf_recipes.data import load_rows
    from rlhf_recipes.tools.ranking.report import rank_votes

    return rank_votes(load_rows(args.votes, split=args.split), args.next)


def _add_rate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rankings", help="file, folder or dataset id with `prompt`, `completions` and `ranks`")
    parser.add_argument("output", type=Path, help="jsonl file to write, with `ratings` in place of `ranks`")
    parser.add_argument("--split", default="train", help="split of the rankings (default: train)")
    parser.add_argument(
        "--pool",
        choices=("row", "prompt", "all"),
        default="row",
        help="what is rated together: one ranking, all of a prompt, or the whole table (default: row)",
    )
    parser.set_defaults(run=_rate)


def _rate(args: argparse.Namespace) -> Path:
    from rlhf_recipes.data import load_rows
    from rlhf_recipes.tools.ranking.ratings import rate_rankings

    if args.output.exists():
        raise FileExistsError(f"{args.output} is there already. Name another file, or remove it.")
    rated = rate_rankings(load_rows(args.rankings, split=args.split), pool=args.pool)
    rated.to_json(args.output)
    return args.output  # type: ignore[no-any-return]


def _export(args: argparse.Namespace) -> str:
    from rlhf_recipes.tools.export.command import export

    return export(args)


def _verifier(args: argparse.Namespace) -> int:
    from rlhf_recipes.data import load_rows
    from rlhf_recipes.rewards.verifier import check_verifier, paid_table, refuse_if_bought

    if args.number < 1 or not 0 <= args.bound < 1:
        raise ValueError(
            f"Expected `number` from 1 on and `bound` from 0 to below 1, got {args.number} and {args.bound:g}."
        )
    rows = load_rows(args.rows, split=args.split).shuffle(seed=_SEED)
    sample = rows.select(range(min(args.number, len(rows))))
    try:
        results = check_verifier(
            named_function(args.reward), sample, args.answer_column, args.template, args.constant, tuple(args.pays)
        )
    except (AttributeError, ImportError, RuntimeError, TypeError) as error:
        raise ValueError(error) from error
    sys.stdout.write(f"{printable(paid_table(results))}\n")
    if args.output_dir is not None:
        _record_verifier(args, len(sample), results)
    try:
        refuse_if_bought(results, args.bound)
    except ValueError as error:
        sys.stderr.write(f"rlhf-recipes verifier: {printable(str(error).splitlines()[0])}\n")
        return 1
    return 0


def _record_verifier(args: argparse.Namespace, number: int, results: Sequence[PaidAnswers]) -> None:
    from rlhf_recipes.evaluation.records import write_records
    from rlhf_recipes.rewards.verifier import paid_verdict

    verdict, bought = paid_verdict(results, args.bound)
    record = {
        "reward": args.reward,
        "rows": {"source": args.rows, "split": args.split, "number": number, "seed": _SEED},
        "answer_column": args.answer_column,
        "template": args.template,
        "constant": args.constant,
        "pays": args.pays,
        "bound": args.bound,
        "kinds": [asdict(entry) for entry in results],
        "verdict": {"verdict": verdict, "kinds": [entry.kind for entry in bought]},
    }
    path = args.output_dir / "verifier.json"
    write_records(path, record)
    sys.stdout.write(f"{printable(path)}\n")
