"""Make preference pairs of labelled snippets: a positive one is preferred to a negative one. And texts for the base.

python recipes/sentence_polarity/pairs.py --dataset_name snippets.jsonl --output_dir outputs/sentence_polarity/data
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows

PROMPT = "review :"  # what a positive and a negative snippet have in common


@dataclass
class PairsArguments:
    """Source of the snippets, and how they are split and paired."""

    dataset_name: str = field(
        metadata={"help": "Dataset id or local file with the columns `text` and `label` (1 positive, 0 negative)."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to take all snippets from."})
    more_texts: str | None = field(
        default=None, metadata={"help": "Dataset with a column `text` that the base reads too. Labels are not used."}
    )
    output_dir: str = field(default="outputs/sentence_polarity/data", metadata={"help": "A new folder for the rows."})
    pairings: int = field(default=4, metadata={"help": "Times that every snippet is put into a pair, at random."})
    test_size: float = field(default=0.2, metadata={"help": "Share of the snippets held out."})
    seed: int = field(default=0, metadata={"help": "Seed of the split and of the pairing."})


ARGUMENTS = (PairsArguments,)


def main(args: PairsArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Remove it, or give another --output_dir.")
    snippets = read_snippets(args)
    rng = random.Random(args.seed)
    rng.shuffle(snippets)
    held_out = round(args.test_size * len(snippets))
    test, train = snippets[:held_out], snippets[held_out:]

    texts = [{"text": f"{PROMPT} {snippet['text']}"} for snippet in train]
    if args.more_texts is not None:
        texts += [{"text": text} for text in load_rows(args.more_texts)["text"]]
    rows = {"snippets/train": train, "snippets/test": test, "texts/train": texts}
    rows["pairs/train"] = pairs(train, args.pairings, rng)
    rows["pairs/test"] = pairs(test, args.pairings, rng)
    empty = [name for name, lines in rows.items() if not lines]
    if empty:
        raise ValueError(
            f"No row for {', '.join(empty)} in {len(snippets)} snippets of {args.dataset_name}. Give more snippets, "
            "of both labels, at least one pairing, or another test size."
        )
    for name, lines in rows.items():
        write_rows(folder / f"{name}.jsonl", lines)
        print(f"{len(lines):>7} rows in {folder / name}.jsonl")


def read_snippets(args: PairsArguments) -> list[dict[str, Any]]:
    """Read the distinct snippets: a text that comes with both labels is left out."""
    rows = load_rows(args.dataset_name, split=args.dataset_split)
    missing = {"text", "label"} - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{args.dataset_name} needs the columns `text` and `label`; it has {', '.join(rows.column_names)}."
        )
    unknown = set(rows["label"]) - {0, 1}
    if unknown:
        raise ValueError(f"`label` must be 1 (positive) or 0 (negative); found also {sorted(map(str, unknown))}.")
    labels: dict[str, set[int]] = {}
    for text, label in zip(rows["text"], rows["label"], strict=True):
        labels.setdefault(" ".join(text.split()), set()).add(label)
    return [{"text": text, "label": min(kinds)} for text, kinds in labels.items() if text and len(kinds) == 1]


def pairs(snippets: list[dict[str, Any]], pairings: int, rng: random.Random) -> list[dict[str, str]]:
    """Pair positive with negative snippets at random, several times."""
    liked = [snippet["text"] for snippet in snippets if snippet["label"] == 1]
    disliked = [snippet["text"] for snippet in snippets if snippet["label"] == 0]
    couples = []
    for _ in range(pairings):
        rng.shuffle(liked)
        rng.shuffle(disliked)
        couples += zip(liked, disliked, strict=False)
    return [{"prompt": PROMPT, "chosen": f" {better} ", "rejected": f" {worse} "} for better, worse in couples]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
