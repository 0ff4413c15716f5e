"""Who answers the questions of a round, and what the answers say: people on the page, a judge, or simulated.

The page and the simulated annotator write into one database for all rounds, `labels.sqlite`, in which every answer is
on the disk before the next question comes.
"""

import argparse
import fcntl
import json
import random
import shlex
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rlhf_recipes.data.synthetic import Annotator, Completion, GoldScore
from rlhf_recipes.reward_modeling.evaluation import pairwise_evaluation
from rlhf_recipes.statistics.metrics import proportion_interval
from rlhf_recipes.tools.feedback.arguments import add_judge
from rlhf_recipes.tools.labeling.database import create
from rlhf_recipes.tools.labeling.export import preference_rows
from rlhf_recipes.tools.labeling.items import check_items
from rlhf_recipes.tools.labeling.records import Answer, Item
from rlhf_recipes.tools.labeling.results import compute_results
from rlhf_recipes.tools.labeling.store import Store
from rlhf_recipes.tracking.console import table as laid_out

ANNOTATOR = "simulated annotator"
SECONDS_BETWEEN_LOOKS = 2.0
RANKS = {"first": [1, 2], "second": [2, 1], "tie": [1, 1]}
Row = dict[str, Any]


def check_labeller(args: Any, ppo: Any) -> None:
    """Refuse a labeller that could not answer, before anything is trained."""
    if args.labeller == "gold" and not str(ppo.gold_score).endswith(".json"):
        raise ValueError(
            f"`labeller: gold` reads the gold score of the world, and `gold_score` of {args.ppo_config} is "
            f"{ppo.gold_score}. Name the file gold.json there, or take another labeller."
        )
    gold_of(ppo)
    if args.labeller == "page":
        import rlhf_recipes.tools.labeling.app  # noqa: F401  # says it if the extra `label` is missing
    if args.labeller == "judge":
        _judge_arguments(args, Path("queries.jsonl"), Path("judged.jsonl"))


def gold_of(ppo: Any) -> GoldScore | None:
    """Load the gold score that PPO's YAML names, if it is one that is known and not a model."""
    return GoldScore.from_file(ppo.gold_score) if str(ppo.gold_score).endswith(".json") else None


def put_up(rounds: Any, number: int) -> None:
    """Add the questions of a round to the database; a page that is open shows them. A judge reads their file."""
    if rounds.args.labeller == "judge":
        return
    database, source = rounds.folder / "labels.sqlite", f"round {number}"
    items = check_items(rounds.asked(number))
    if not database.exists():
        create(database, items, source, rounds.args.seed)
    with closing(Store(database)) as store:
        store.add(items, source)


def answered(rounds: Any, number: int) -> list[Row]:
    """Have all questions up to this round answered.

    Returns:
        A row for each choice and each tie. What could not be compared, or was skipped, is in none.
    """
    if rounds.args.labeller == "judge":
        return [_training_row(row) for each in range(1, number + 1) for row in _judged(rounds, each)]
    with closing(Store(rounds.folder / "labels.sqlite")) as store:
        if rounds.args.labeller == "gold":
            store.judge_all(ANNOTATOR, _simulated(rounds.args, gold_of(rounds.start)))
        else:
            _wait(store, rounds, number)
        kept, _ = preference_rows(store.items(), store.judgements())
    return [_training_row(row) for row in kept if row["round"] <= number]


def _training_row(row: Row) -> Row:
    return {name: row[name] for name in ("prompt", "completions", "completion_ids", "label", "round")}


def _simulated(args: Any, gold: GoldScore) -> Any:
    """Make an annotator whose answer depends on the question alone, so that it is the same after an interruption."""

    def say(number: int, item: Item) -> Answer:
        rng = random.Random(f"{args.seed} annotator {number}")
        if rng.random() < args.incomparable:
            return Answer("incomparable")
        # Half of the choices that are made without looking are right
        annotator = Annotator(gold, 0.0, 2 * args.error, args.tie_margin, seed=rng.randrange(2**31))
        return Answer("ranked", RANKS[annotator.choose(item.row["prompt"], *_completions(item.row, gold))])

    return say


def _completions(row: Row, gold: GoldScore) -> list[Completion]:
    both = zip(row["completions"], row["completion_ids"], strict=True)
    return [Completion(text, ids[-1] == gold.eos_token_id) for text, ids in both]


def _wait(store: Store, rounds: Any, number: int) -> None:
    items, said = store.items(), None
    while left := sum(items[item].row["round"] <= number for item in store.open_items()):
        if said is None:
            print(
                f"Round {number} waits for labels. Unless the page is open already, open it:\n"
                f"rlhf-recipes label --db {shlex.quote(str(store.path))}"
            )
        if said != left:
            print(f"{left} questions are open.", flush=True)
        said = left
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _judged(rounds: Any, number: int) -> list[Row]:
    """Ask the judge what it has not answered yet: its answers are in a file beside the output, one by one."""
    output = rounds.round(number) / "judged.jsonl"
    if not output.exists():
        args = _judge_arguments(rounds.args, rounds.round(number) / "queries.jsonl", output)
        print(args.run(args))
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def _judge_arguments(args: Any, queries: Path, output: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="`judge`: rlhf-recipes judge", exit_on_error=False, add_help=False)
    add_judge(parser)
    words = ["--data", str(queries), "--output", str(output), *shlex.split(args.judge)]
    try:
        return parser.parse_args(words)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"`judge: {args.judge}` are no options of `rlhf-recipes judge`: {error}.") from error


def summary(rounds: Any, number: int, samples: list[Row], leads: Any) -> Row:
    """Say what was asked and answered in a round, and how often labellers, ensemble and gold agree.

    Args:
        rounds: The run.
        number: The round.
        samples: Pairs of the policy that the round made.
        leads: By how much the round's ensemble prefers the first of each, shape `(N,)`.
    """
    import torch

    answers, counts = _judged_answers(rounds, number) if rounds.args.labeller == "judge" else _answers(rounds, number)
    asked = rounds.args.labels()
    record = {"asked": asked[number - 1], "labels": sum(asked[:number]), **counts}
    zeros = torch.zeros(len(answers))
    labels = torch.tensor([row["label"] for row in answers], dtype=torch.float64)
    if number > 1 and (labels != 0.5).any():
        before = torch.tensor([row["lead"] for row in answers])
        record |= _accuracy("new_labels", pairwise_evaluation(before, zeros, labels=labels))
    if (gold := gold_of(rounds.start)) is not None:
        differences = [_difference(row, gold) for row in answers]
        right = [
            (row["label"] > 0.5) == (difference > 0)
            for row, difference in zip(answers, differences, strict=True)
            if row["label"] != 0.5 and difference
        ]
        record |= {"agreement_with_gold": None, "agreement_with_gold_ci": None}
        if right:
            interval = proportion_interval(sum(right), len(right))
            record |= {"agreement_with_gold": sum(right) / len(right), "agreement_with_gold_ci": list(interval)}
        known = torch.tensor([_difference(row, gold) for row in samples]).sign().double() / 2 + 0.5
        if (known != 0.5).any():
            found = pairwise_evaluation(leads, torch.zeros(len(samples)), labels=known)
            record |= _accuracy("newest_policy", found)
    return record


def _accuracy(name: str, found: Row) -> Row:
    pairs = found["n"] - found["ties"]
    return {f"{name}_accuracy": found["accuracy"], f"{name}_accuracy_ci": found["accuracy_ci"], f"{name}_n": pairs}


def _difference(row: Row, gold: GoldScore) -> float:
    first, second = (sum(gold.parts(row["prompt"], *each).values()) for each in _completions(row, gold))
    return first - second


def _answers(rounds: Any, number: int) -> tuple[list[Row], Row]:
    with closing(Store(rounds.folder / "labels.sqlite")) as store:
        items, judgements = store.items(), store.judgements()
    own = [judgement for judgement in judgements if items[judgement.item].row["round"] == number]
    verdicts = [judgement.answer.verdict for judgement in own if judgement.undone_at is None]
    kept = preference_rows(items, own)[0] if any(verdict == "ranked" for verdict in verdicts) else []
    found = compute_results(items, own)
    counts = _counts(kept) | {name: verdicts.count(name) for name in ("incomparable", "skipped")}
    return kept, counts | {"alpha": found.alpha if found.shared else None}


def _judged_answers(rounds: Any, number: int) -> tuple[list[Row], Row]:
    rows = _judged(rounds, number)
    failed = len(rounds.asked(number)) - len(rows)
    return rows, _counts(rows) | {"incomparable": failed, "skipped": 0, "alpha": None}


def _counts(rows: list[Row]) -> Row:
    ties = sum(row["label"] == 0.5 for row in rows)
    return {"choices": len(rows) - ties, "ties": ties}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a folder for one process; the lock is gone with the process, however it ends."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"Another process works in {folder}. Wait until it ends, or end it.") from error
        yield


COLUMNS = {
    "round": "round",
    "labels": "labels",
    "ties": "ties",
    "incomparable": "no answer",
    "agreement_with_gold": "with gold",
    "new_labels_accuracy": "on new labels",
    "newest_policy_accuracy": "on new samples",
    "gold_score": "gold",
    "kl": "KL",
}


def table(rounds: Any) -> str:
    """Lay out the rounds so far."""
    done = sorted(rounds.folder.glob("round_*/round.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in done]
    rows = [[_shown(record.get(name)) for name in COLUMNS] for record in records]
    return laid_out([list(COLUMNS.values()), *rows])


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
