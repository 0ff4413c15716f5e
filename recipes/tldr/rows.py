"""Make the rows of TL;DR: posts, cut at whole paragraphs, with a summary by people, or with two that were compared.

python recipes/tldr/rows.py --model Qwen/Qwen2.5-0.5B
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import fit_paragraphs
from rlhf_recipes.data.bad_rows import BadRows
from rlhf_recipes.data.loading import load_records
from rlhf_recipes.data.preferences import check_preferences, confidence_margin
from rlhf_recipes.models import load_tokenizer

TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
FIELDS = ("subreddit", "title", "post")
SPLITS = {"train": "train", "validation": "test"}  # of the data sets, and of the rows here


@dataclass
class RowArguments:
    """The data sets, and how long a prompt may be."""

    model: str = field(metadata={"help": "Model whose tokens are counted."})
    summaries: str = field(
        default="vwxyzjn/summarize_from_feedback_tldr_3_filtered",
        metadata={"help": "Posts with a summary: `subreddit`, `title`, `post`, `summary`."},
    )
    comparisons: str = field(
        default="vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144",
        metadata={"help": "Compared summaries: `info` (the post), `summaries`, `choice`, `extra`."},
    )
    output_dir: str = field(default="outputs/tldr/data", metadata={"help": "A new folder for the rows."})
    max_tokens: int = field(default=512, metadata={"help": "Tokens of a prompt, at most."})
    max_rows: int | None = field(default=None, metadata={"help": "Rows of each split, at most. null: all."})


ARGUMENTS = (RowArguments,)


def main(args: RowArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or give another --output_dir.")
    tokenizer = load_tokenizer(args.model)
    rows = {}
    for theirs, ours in SPLITS.items():
        posts = load_records(args.summaries, split=theirs)[: args.max_rows]
        rows[f"summaries/{ours}"] = with_prompts(posts, demonstration, tokenizer, args.max_tokens)
        compared = load_records(args.comparisons, split=theirs)[: args.max_rows]
        # Comparisons of news articles have no post
        of_posts = [{**row, **row["info"]} for row in compared if (row.get("info") or {}).get("post")]
        pairs = with_prompts(of_posts, comparison, tokenizer, args.max_tokens)
        table = check_preferences(
            pairs, source=args.comparisons, drop_bad_rows=True
        )  # two equal summaries say nothing
        rows[f"comparisons/{ours}"] = table.select_columns(["prompt", "completions", "label", "margin"]).to_list()
    for name, lines in rows.items():
        write_rows(folder / f"{name}.jsonl", lines)
        print(f"{len(lines):>7} rows in {folder / name}.jsonl")


def with_prompts(rows: list[dict], make, tokenizer, max_tokens: int) -> list[dict]:
    """Make rows with their prompts. Posts that cannot fit are left out, with a warning that counts them."""
    made, bad = [], BadRows()
    for row in rows:
        fields = {name: str(row.get(name) or "") for name in FIELDS}
        try:
            prompt = fit_paragraphs(TEMPLATE, fields, "post", tokenizer, max_tokens)
        except ValueError:
            bad.add(f"title and subreddit alone have more than {max_tokens} tokens", f"row {row['row']}")
            continue
        made.append({"prompt": prompt, **make(row)})
    bad.settle(len(rows), len(made), drop_bad_rows=True)
    return made


def demonstration(row: dict) -> dict:
    return {"completion": f" {row['summary'].strip()}"}


def comparison(row: dict) -> dict:
    """Two summaries, which one was chosen, and how sure the labeller was."""
    first, second = (f" {summary['text'].strip()}" for summary in row["summaries"])
    if row["choice"] not in (0, 1):
        raise ValueError(f"Row {row['row']} of the comparisons: `choice` must be 0 or 1, got {row['choice']!r}.")
    confidence = (row.get("extra") or {}).get("confidence")
    try:
        margin = None if confidence is None else confidence_margin(confidence)
    except ValueError as error:
        raise ValueError(f"Row {row['row']} of the comparisons: {error}") from None
    return {"completions": [first, second], "label": float(row["choice"] == 0), "margin": margin}


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
