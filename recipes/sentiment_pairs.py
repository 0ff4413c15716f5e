"""Make rows from texts labelled by their sentiment: passages to imitate and to continue, and preference pairs.

python recipes/sentiment_pairs.py --dataset_name stanfordnlp/imdb --output_dir outputs/movie_sentiment/data
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows

# Every passage starts with it. It is the prompt that a positive and a negative passage have in common.
LEAD = "Film review:"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?![.!?])")


@dataclass
class PairsArguments:
    """Source of the labelled texts, and how they are cut."""

    dataset_name: str = field(
        default="stanfordnlp/imdb",
        metadata={"help": "Dataset id or local file with the columns `text` and `label` (1 positive, 0 negative)."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to take all rows from."})
    output_dir: str = field(default="outputs/movie_sentiment/data", metadata={"help": "A new folder for the rows."})
    min_words: int = field(default=10, metadata={"help": "Shortest passage, in words."})
    max_words: int = field(default=48, metadata={"help": "Longest passage, in words. Passages are whole sentences."})
    passages_per_text: int = field(default=1, metadata={"help": "Passages, at most, from the start of each text."})
    test_size: float = field(default=0.1, metadata={"help": "Share of the texts held out from every stage."})
    judge_size: float = field(
        default=0.5, metadata={"help": "Share of the training texts whose pairs are for a judge. 0: no judge."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split and of the pairing."})

    def __post_init__(self):
        if not 0.0 <= self.judge_size < 1.0:
            raise ValueError(f"`judge_size` must be at least 0 and below 1, got {self.judge_size}.")


ARGUMENTS = (PairsArguments,)


def main(args: PairsArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Remove it, or give another --output_dir.")
    passages = read_passages(args)
    random.Random(args.seed).shuffle(passages)

    # The reward model and the judge learn from different texts, and are measured on the same held-out ones.
    held_out = round(args.test_size * len(passages))
    test, train = passages[:held_out], passages[held_out:]
    middle = len(train) - int(args.judge_size * len(train) + 0.5)
    rng = random.Random(args.seed)
    rows = {"texts/train": texts(train), "texts/test": texts(test), "pairs/train": pairs(train[:middle], rng)}
    rows["pairs/test"] = pairs(test, rng)
    if args.judge_size > 0:
        rows["judge_pairs/test"] = rows["pairs/test"]
        rows["judge_pairs/train"] = pairs(train[middle:], rng)
    empty = [name for name, lines in rows.items() if not lines]
    if empty:
        raise ValueError(
            f"No row for {', '.join(empty)}: {len(passages)} texts of {args.dataset_name} have a passage of "
            f"{args.min_words} to {args.max_words} words. More texts, of both labels, are needed, or other limits."
        )
    for name, lines in rows.items():
        write_rows(folder / f"{name}.jsonl", lines)
        print(f"{len(lines):>7} rows in {folder / name}.jsonl")


def read_passages(args: PairsArguments) -> list[tuple[int, list[str]]]:
    """Read the distinct texts and cut them: a list of (label, passages) with one entry per text."""
    rows = load_rows(args.dataset_name, split=args.dataset_split)
    missing = {"text", "label"} - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{args.dataset_name} needs the columns `text` and `label`; it has {', '.join(rows.column_names)}."
        )
    labels = dict(zip(rows["text"], rows["label"], strict=True))
    unknown = set(labels.values()) - {0, 1}
    if unknown:
        raise ValueError(f"`label` must be 1 (positive) or 0 (negative); found also {sorted(map(str, unknown))}.")
    passages_of = [(label, cut(text, args)) for text, label in labels.items()]
    return [(label, passages) for label, passages in passages_of if passages]


def cut(text: str, args: PairsArguments) -> list[str]:
    """Cut a text into passages of whole sentences. A sentence that is too long ends a passage and is left out."""
    passages: list[list[str]] = [[]]
    for sentence in SENTENCE_END.split(" ".join(text.replace("<br />", " ").split())):
        words = sentence.split()
        if len(words) > args.max_words:
            passages.append([])
        elif len(passages[-1]) + len(words) > args.max_words:
            passages.append(words)
        else:
            passages[-1].extend(words)
    long_enough = [" ".join(words) for words in passages if len(words) >= args.min_words]
    return long_enough[: args.passages_per_text]


def texts(labelled: Iterable[tuple[int, list[str]]]) -> list[dict[str, str]]:
    return [{"text": f"{LEAD} {passage}"} for _, passages in labelled for passage in passages]


def pairs(labelled: Iterable[tuple[int, list[str]]], rng: random.Random) -> list[dict[str, str]]:
    """Pair positive with negative passages at random, each once."""
    sides: dict[int, list[str]] = {0: [], 1: []}
    for label, passages in labelled:
        sides[label].extend(passages)
    for side in sides.values():
        rng.shuffle(side)
    couples = zip(sides[1], sides[0], strict=False)
    return [{"prompt": LEAD, "chosen": f" {liked}", "rejected": f" {disliked}"} for liked, disliked in couples]


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
