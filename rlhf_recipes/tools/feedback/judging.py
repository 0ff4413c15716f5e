"""The command `rlhf-recipes judge`: a preference table whose labels a judge gives."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.data.dialogues import Row
from rlhf_recipes.data.loading import load_records
from rlhf_recipes.data.preferences import (
    are_preferences,
    check_preferences,
    from_labelled_pairs,
    to_pairs,
    to_preference_table,
)
from rlhf_recipes.data.preferences.pairs import find_sides
from rlhf_recipes.data.preferences.reading import column_names
from rlhf_recipes.data.preferences.schema import JUDGEMENTS, quoted
from rlhf_recipes.evaluation.judges import QUESTION, REASONED, Budget, LanguageJudge, clamped, read_principles
from rlhf_recipes.evaluation.judges.cache import key_of
from rlhf_recipes.evaluation.judges.pairs import PairJudge, Verdicts
from rlhf_recipes.messages import as_text
from rlhf_recipes.statistics.agreement import people_agreement
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
from rlhf_recipes.tools.functions import named_function

WRITTEN = ("judge", "principle", "in_both_orders", "human_label")
"""Columns that are written beside those of a preference table."""


def judge(args: argparse.Namespace) -> str:
    """Run the command.

    Args:
        args: What `add_judge` reads.

    Returns:
        The summary, as text.

    Raises:
        FileExistsError: If other settings or rows wrote the output.
        FileNotFoundError: If a file or a local model is not there.
        ValueError: If arguments or rows cannot be used, or no pair got a label.
    """
    check_model(args)
    principles = read_principles(args.principles) if args.principles else []
    bounds = tuple(args.clamp) if args.clamp else REASONED if args.reasoning_tokens else None
    clamped(0.5, bounds)  # refuses bounds that are none
    named = _named(args, principles)
    pairs, human = read_pairs(args.data, args.split, args.drop_bad_rows)
    digest = key_of(*(json.dumps(row, default=str) for row in pairs))
    settings = {"judge": named, "clamp": bounds, "data": args.data, "split": args.split, "rows": digest}
    files = OutputFiles(args.output, args.cache, settings)
    budget = budget_of(args)
    asked, workers = _judge(args, principles, budget)
    prompts, answers = [row["prompt"] for row in pairs], [tuple(row["completions"]) for row in pairs]
    name = f"{_shown(args)} ({key_of(named)[:16]})"
    with progress(asked, 2 * len(pairs)) as ask:
        verdicts = PairJudge(ask, name, files.cache, workers).compare(prompts, answers)
    if verdicts.judgement is None:
        raise ValueError(f"No pair got a label. {_left_out(verdicts)}")
    labels = [clamped(label, bounds) for label in verdicts.judgement.labels]
    rows = [
        _row(pairs[number], human[number], label, both, asked, args)
        for number, label, both in zip(verdicts.rows, labels, verdicts.answers, strict=True)
    ]
    summary = _summary(rows, verdicts) | {
        "cost": cost_of(args, budget, verdicts.cached, sum(verdicts.problems.values()))
    }
    files.write({files.output: rows}, summary)
    return _text(files.output, summary, verdicts)


def read_pairs(name: str, split: str = "train", drop_bad_rows: bool = False) -> tuple[list[Row], list[float | None]]:
    r"""Read pairs of answers, judged by people or not.

    Args:
        name: File, folder or dataset id: preferences of any form, or the same without what judges them. More than two
            answers become all pairs of them.
        split: Split to load.
        drop_bad_rows: Whether to leave out rows that cannot be used.

    Returns:
        Rows with `prompt` and two `completions`, and all else that stands beside them; and the people's label of
        each, the probability that the first is better, or `None` where people gave none.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        ValueError: If the rows cannot be used, or have columns that are written here.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
        >>> _ = path.write_text('{"prompt": "Hi", "response_a": "No.", "response_b": "Hello!"}\n')
        >>> rows, human = read_pairs(str(path))
        >>> rows[0]["completions"], human
        (['No.', 'Hello!'], [None])
    """
    records = load_records(name, split=split)
    names = column_names(records)
    if taken := [column for column in WRITTEN if column in names]:
        raise ValueError(f"{quoted(taken)} would stand beside a column that is written. Rename it.")
    judged = are_preferences(names)
    try:
        if judged:
            table = to_preference_table(records, drop_bad_rows=drop_bad_rows)
        elif "completions" in names:
            counts = [len(row["completions"]) if isinstance(row.get("completions"), list) else 0 for row in records]
            ties = [row | {"ranks": [1] * count} for row, count in zip(records, counts, strict=True)]
            table = check_preferences(ties, drop_bad_rows=drop_bad_rows)
        else:
            find_sides(names)
            table = from_labelled_pairs([row | {"label": 0.5} for row in records], drop_bad_rows=drop_bad_rows)
        pairs = to_pairs(table).with_format(None).to_list()
    except ValueError as error:
        raise ValueError(str(error).replace("`drop_bad_rows: true`", "`--drop_bad_rows`")) from error
    rows = [
        {key: value for key, value in row.items() if value is not None and key not in (*JUDGEMENTS, "margin")}
        for row in pairs
    ]
    return rows, [row["label"] if judged else None for row in pairs]


def _named(args: argparse.Namespace, principles: Sequence[str]) -> Row:
    """What decides the judge's answers: its name in the cache and in the rows."""
    if args.function is not None:
        place = args.function.partition(":")[0]
        digest = hashlib.sha256(Path(place).read_bytes()).hexdigest() if place.endswith(".py") else None
        return {"function": args.function, "sha256": digest}
    return model_settings(args) | {
        "words": args.words,
        "reasoning_tokens": args.reasoning_tokens,
        "least_mass": args.least_mass,
        "principles": list(principles),
        "seed": args.seed,
        "question": args.question.read_text(encoding="utf-8") if args.question else QUESTION,
    }


def _shown(args: argparse.Namespace) -> str:
    return str(args.function or args.local or args.model)


def _judge(args: argparse.Namespace, principles: Sequence[str], budget: Budget) -> tuple[Any, int]:
    if args.function is not None:
        if principles or args.reasoning_tokens or args.question:
            raise ValueError("A function takes no `--principles`, `--reasoning_tokens` or `--question`. Remove them.")
        try:
            return named_function(args.function), 1
        except (AttributeError, ImportError, TypeError) as error:
            raise ValueError(str(error)) from error
    model, workers = load_model(args, budget)
    question = args.question.read_text(encoding="utf-8") if args.question else QUESTION
    options = {"soft": not args.words, "least_mass": args.least_mass, "reasoning_tokens": args.reasoning_tokens}
    return LanguageJudge(model, question, **options, principles=principles, seed=args.seed), workers


def _row(
    pair: Row, human: float | None, label: float, both: tuple[Any, Any], asked: Any, args: argparse.Namespace
) -> Row:
    row = pair | {"label": label, "judge": _shown(args), "in_both_orders": list(both)}
    if isinstance(asked, LanguageJudge):
        principle = asked.principle(*map(as_text, (pair["prompt"], *pair["completions"])))
        row |= {} if principle is None else {"principle": principle}
    return row if human is None else row | {"human_label": human}


def _summary(rows: Sequence[Row], verdicts: Verdicts) -> Row:
    labels = [row["label"] for row in rows]
    judgement: Any = verdicts.judgement
    summary = {
        "rows": len(rows),
        "pairs": len(rows) + verdicts.failures,
        "first_better": sum(label > 0.5 for label in labels),
        "second_better": sum(label < 0.5 for label in labels),
        "ties": labels.count(0.5),
        "mean_label": sum(labels) / len(labels),
        "failed": verdicts.failures - verdicts.not_asked,
        "not_asked": verdicts.not_asked,
        "stopped": verdicts.stopped,
        "problems": verdicts.problems,
        "agreement_of_orders": judgement.agreement,
        "position_bias": judgement.position_bias,
        "position_bias_p_value": judgement.position_bias_p_value,
    }
    judged = [row for row in rows if row.get("human_label") is not None]
    if any(row["human_label"] != 0.5 for row in judged):
        texts = [(as_text(row["completions"][0]), as_text(row["completions"][1])) for row in judged]
        ours, theirs = ([row[name] for row in judged] for name in ("label", "human_label"))
        summary["people"] = people_agreement(ours, theirs, texts)
    return summary


def _left_out(verdicts: Verdicts) -> str:
    problems = "; ".join(f"{count} x {problem!r}" for problem, count in verdicts.problems.items())
    stopped = f"; stopped: {verdicts.stopped}" if verdicts.stopped else ""
    failed = verdicts.failures - verdicts.not_asked
    return f"Left out: {failed} pairs failed, {verdicts.not_asked} not asked about{stopped}. {problems}".strip()


def _text(output: Path, summary: Row, verdicts: Verdicts) -> str:
    lines = [
        f"{output}: {summary['rows']} rows of {summary['pairs']} pairs",
        f"labels: {summary['first_better']} for the first, {summary['second_better']} for the second, "
        f"{summary['ties']} ties; mean {summary['mean_label']:.3f}",
        f"orders: {summary['agreement_of_orders']:.3f} agree; position bias {summary['position_bias']:+.3f} "
        f"(p = {summary['position_bias_p_value']:.2g})",
    ]
    if verdicts.failures:
        lines.append(_left_out(verdicts))
    if "people" in summary:
        lines.append(people_line(summary["people"]))
    return "\n".join([*lines, cost_line(summary["cost"])])


def people_line(people: Row) -> str:
    """Write the agreement with people in a line.

    Args:
        people: From `people_agreement`.
    """
    named = (("judge", "judge"), ("the longer answer", "longer"), ("the shorter", "shorter"))
    parts = [
        f"{name} {people[key]['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        for name, key in named
        for low, high in [people[key]["accuracy_ci"]]
    ]
    over = people["over_length_ci"]
    interval = f" [{over[0]:+.3f}, {over[1]:+.3f}]" if over else ""
    return (
        f"people, {people['pairs']} pairs: right are {', '.join(parts)}, chance 0.5 (p = "
        f"{people['chance_p_value']:.2g}); over the better rule {people['over_length']:+.3f}{interval}; kappa "
        f"{people['kappa']:.3f}"
    )
