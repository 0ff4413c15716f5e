"""What `judge` and `revise` share: the model that is asked, their files, and what it cost."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tqdm import tqdm

from rlhf_recipes.checkpoints import write_whole
from rlhf_recipes.data.dialogues import Row
from rlhf_recipes.evaluation.judges import Budget, EndpointModel, LanguageModel, load_local_model
from rlhf_recipes.statistics.numbers import none_for_nonfinite

Asks = ParamSpec("Asks")
Reply = TypeVar("Reply")


@contextmanager
def progress(ask: Callable[Asks, Reply], most: int) -> Iterator[Callable[Asks, Reply]]:
    """Show on a terminal how often a function was called.

    Args:
        ask: The function.
        most: How often it is called at most.

    Yields:
        The same function, with a bar.

    Example:
        >>> with progress(len, 3) as measure:
        ...     measure("abc")
        3
    """
    with tqdm(total=most, unit="asked", disable=None, leave=False) as bar:

        def asked(*args: Asks.args, **kwargs: Asks.kwargs) -> Reply:
            try:
                return ask(*args, **kwargs)
            finally:
                bar.update()

        yield asked


def budget_of(args: argparse.Namespace) -> Budget:
    """Return the budget that the command line gives.

    Args:
        args: The arguments.

    Raises:
        ValueError: If it is negative.
    """
    return Budget(args.max_calls, args.max_tokens)


def check_model(args: argparse.Namespace) -> None:
    """Refuse arguments that name no model, before anything is read.

    Args:
        args: The arguments.

    Raises:
        ValueError: If an endpoint has no name of its model, a key is not set, or a number is out of range.
    """
    if args.endpoint is not None and args.model is None:
        raise ValueError("`--endpoint` needs `--model`, the name of the model there.")
    if args.key_variable is not None and not os.environ.get(args.key_variable):
        raise ValueError(f"The environment variable {args.key_variable!r} (`--key_variable`) is not set.")
    if args.workers < 1:
        raise ValueError(f"`--workers` must be at least 1, got {args.workers}.")


def load_model(args: argparse.Namespace, budget: Budget) -> tuple[LanguageModel, int]:
    """Load the model that is asked, or connect to it.

    Args:
        args: The arguments.
        budget: Counts calls and tokens.

    Returns:
        The model, and how many questions may be asked at the same time.

    Raises:
        FileNotFoundError: If a local model is not there.
        ValueError: If the endpoint's address is none.
    """
    if args.local is not None:
        return load_local_model(args.local, args.dtype, budget), 1
    key = os.environ[args.key_variable] if args.key_variable else None
    options = {"api_key": key, "timeout": args.timeout, "retries": args.retries, "budget": budget}
    return EndpointModel(args.endpoint, args.model, **options), args.workers


def model_settings(args: argparse.Namespace) -> Row:
    """Return what names the model, for the summary and for the answers that are kept.

    Args:
        args: The arguments.
    """
    if args.local is not None:
        return {"local": args.local, "dtype": args.dtype}
    return {"endpoint": args.endpoint, "model": args.model}


class OutputFiles:
    """The files of a command that can be called again to go on.

    Args:
        output: The jsonl file. Beside it stand the summary, and the answers in the cache.
        cache: File of the answers, if it stands elsewhere.
        settings: All that decides what is written. The same settings may write the file anew.
        others: More files that are written.

    Raises:
        FileExistsError: If a file is there already that other settings wrote.
    """

    def __init__(
        self, output: Path, cache: Path | None, settings: Mapping[str, Any], others: Iterable[Path | None] = ()
    ) -> None:
        self.output, self._settings = output, json.loads(json.dumps(settings))
        self.summary = output.with_suffix(".summary.json")
        self.cache = cache or output.with_suffix(".cache.jsonl")
        self._before = self._written()
        there = [path for path in (output, self.summary, *others) if path is not None and path.exists()]
        if there and self._before.get("settings") != self._settings:
            raise FileExistsError(
                f"{there[0]} is there already, and other settings or rows wrote it. Name another file, or remove it."
            )

    def _written(self) -> Row:
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return summary if isinstance(summary, dict) else {}

    def write(self, rows: Mapping[Path, Iterable[Row]], summary: Mapping[str, Any]) -> None:
        """Write all files, each whole or not at all.

        Args:
            rows: Rows by file.
            summary: What the summary says beside the settings: `rows` is their number.

        Raises:
            FileExistsError: If there would be fewer rows than before.
        """
        if self.output.exists() and summary["rows"] < self._before.get("rows", 0):
            raise FileExistsError(
                f"{self.output} holds {self._before['rows']} rows, and this call got {summary['rows']}: the answers "
                f"of before are not in {self.cache}. Nothing was written. Ask for the rest, or name another file."
            )
        told = none_for_nonfinite({"settings": self._settings, **summary})
        write_whole(self.summary, json.dumps(told, ensure_ascii=False, indent=1) + "\n")
        for path, lines in rows.items():
            write_whole(path, "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in lines))


def cost_of(args: argparse.Namespace, budget: Budget, cached: int, failed: int) -> Row:
    """Sum up what was asked.

    Args:
        args: The arguments.
        budget: What counted it.
        cached: Answers that were known.
        failed: Questions that got no answer.

    Returns:
        `calls`, `prompt_tokens`, `completion_tokens`, `tokens_estimated`, `cached`, `failed`, `seconds`, and `price`
        where prices are given.
    """
    used = budget.usage
    cost: Row = {
        "calls": used.calls,
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "tokens_estimated": used.estimated,
        "cached": cached,
        "failed": failed,
        "seconds": round(used.seconds, 3),
    }
    return cost | ({"price": used.cost(*args.prices)} if args.prices else {})


def cost_line(cost: Mapping[str, Any]) -> str:
    """Write the cost in a line.

    Args:
        cost: From `cost_of`.

    Example:
        >>> numbers = {"calls": 80, "prompt_tokens": 12000, "completion_tokens": 80, "tokens_estimated": False}
        >>> cost_line(numbers | {"cached": 4, "failed": 2, "seconds": 92.1, "price": 0.5})
        'cost: 80 calls, 12,000 tokens read, 80 written, 4 answers known, 2 failed, 92.1 s, price 0.5'
    """
    about = "about " if cost["tokens_estimated"] else ""
    price = f", price {cost['price']:.4g}" if "price" in cost else ""
    return (
        f"cost: {cost['calls']:,} calls, {about}{cost['prompt_tokens']:,} tokens read, {cost['completion_tokens']:,} "
        f"written, {cost['cached']:,} answers known, {cost['failed']:,} failed, {cost['seconds']:.1f} s{price}"
    )
