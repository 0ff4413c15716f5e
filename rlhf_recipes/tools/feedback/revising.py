"""The command `rlhf-recipes revise`: answers that a model criticises by principles and revises, as rows for SFT."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rlhf_recipes.data import load_rows, to_prompts
from rlhf_recipes.data.dialogues import Row, as_answer
from rlhf_recipes.evaluation.judges import read_principles
from rlhf_recipes.evaluation.judges.asking import Asked, ask_each
from rlhf_recipes.evaluation.judges.cache import AnswerCache, key_of
from rlhf_recipes.evaluation.judges.revision import Revised, Writer
from rlhf_recipes.evaluation.judges.revision import revise as revise_answer
from rlhf_recipes.tools.feedback.asked import (
    OutputFiles,
    budget_of,
    check_model,
    cost_line,
    cost_of,
    load_model,
    model_settings,
    progress,
)

_NUMBER = "number_of_the_row"


def revise(args: argparse.Namespace) -> str:
    """Run the command.

    Args:
        args: What `add_revise` reads.

    Returns:
        The summary, as text.

    Raises:
        FileExistsError: If other settings or rows wrote the output.
        FileNotFoundError: If a file or a local model is not there.
        ValueError: If arguments or rows cannot be used, or no answer was revised.
    """
    check_model(args)
    if args.rounds < 1 or args.max_new_tokens < 1 or args.temperature < 0:
        raise ValueError(
            "`--rounds` and `--max_new_tokens` must be at least 1 and `--temperature` at least 0, got "
            f"{args.rounds}, {args.max_new_tokens} and {args.temperature:g}."
        )
    principles = read_principles(args.principles)
    rows = load_rows(args.data, split=args.split)
    rows = to_prompts(rows.add_column(_NUMBER, list(range(len(rows)))), drop_bad_rows=args.drop_bad_rows)
    prompts, numbers = rows["prompt"][:], rows[_NUMBER][:]
    named = model_settings(args) | {"temperature": args.temperature, "seed": args.seed}
    texts = {"principles": principles, "rounds": args.rounds, "max_new_tokens": args.max_new_tokens}
    settings = {"model": named, **texts, "data": args.data, "split": args.split, "rows": key_of(prompts)}
    files = OutputFiles(args.output, args.cache, settings, [args.pairs])
    budget = budget_of(args)
    model, workers = load_model(args, budget)
    cache = AnswerCache(files.cache, usable=lambda text: isinstance(text, str) and bool(text.strip()))
    write = Writer(model, json.dumps(named, sort_keys=True), cache, args.temperature)
    options: dict[str, Any] = {"rounds": args.rounds, "max_tokens": args.max_new_tokens}

    def ask(number: int) -> Revised:
        return revise_answer(write, prompts[number], principles, **options, seed=args.seed + numbers[number])

    with progress(ask, len(prompts)) as answer:
        asked = ask_each(range(len(prompts)), answer, name="The model", workers=workers)
    done = [(number, revised) for number, revised in enumerate(asked.answers) if revised is not None]
    if not done:
        raise ValueError(f"No answer was revised. {_left_out(asked, 0)}")
    origin = {"model": args.local or args.model, "seed": args.seed, "source": args.data}
    written = {files.output: [_row(prompts[number], revised, numbers[number], origin) for number, revised in done]}
    pairs = [row for number, revised in done if (row := _pair(prompts[number], revised, numbers[number], origin))]
    if args.pairs is not None:
        written[args.pairs] = pairs
    summary: Row = {
        "rows": len(done),
        "prompts": len(prompts),
        "changed": len(pairs),
        "failed": len(prompts) - len(done) - len(asked.not_asked),
        "not_asked": len(asked.not_asked),
        "stopped": asked.stopped,
        "problems": dict(asked.problems),
        "cost": cost_of(args, budget, cache.hits, sum(asked.problems.values())),
    }
    files.write(written, summary)
    lines = [f"{files.output}: {len(done)} rows of {len(prompts)} prompts; {len(pairs)} answers changed"]
    lines += [f"{args.pairs}: {len(pairs)} pairs"] if args.pairs is not None else []
    lines += [_left_out(asked, len(done))] if len(done) < len(prompts) else []
    return "\n".join([*lines, cost_line(summary["cost"])])


def _row(prompt: Any, revised: Revised, number: int, origin: Row) -> Row:
    rounds = [vars(round_) for round_ in revised.rounds]
    completion = _completion(prompt, revised.rounds[-1].revision)
    return {"prompt": prompt, "completion": completion, "first_answer": revised.first, "rounds": rounds} | (
        origin | {"row": number}
    )


def _pair(prompt: Any, revised: Revised, number: int, origin: Row) -> Row | None:
    """The revision as preferred to the first answer; `None` where nothing was changed."""
    last = revised.rounds[-1]
    if last.revision == revised.first:
        return None
    completions = [_completion(prompt, text) for text in (last.revision, revised.first)]
    more = {"label": 1.0, "principle": last.principle, "row": number}
    return {"prompt": prompt, "completions": completions} | origin | more


def _completion(prompt: Any, text: str) -> Any:
    """The answer as it follows the prompt: a message, or text after a space where the prompt ends without one."""
    if isinstance(prompt, str) and not prompt[-1:].isspace():
        return f" {text}"
    return as_answer(text, prompt)


def _left_out(asked: Asked[Revised], done: int) -> str:
    problems = "; ".join(f"{count} x {problem!r}" for problem, count in asked.problems.items())
    stopped = f"; stopped: {asked.stopped}" if asked.stopped else ""
    failed = len(asked.answers) - done - len(asked.not_asked)
    return f"Left out: {failed} prompts failed, {len(asked.not_asked)} not asked about{stopped}. {problems}".strip()
