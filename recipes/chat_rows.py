"""Make chats of dialogues written as "\\n\\nHuman: ...\\n\\nAssistant: ...", for models with a chat template.

python recipes/chat_rows.py --dataset_name Anthropic/hh-rlhf --output_dir outputs/smollm2_chat/data
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows

ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass
class ChatArguments:
    """Source of the preferences, and which of them are kept."""

    dataset_name: str = field(
        default="Anthropic/hh-rlhf",
        metadata={"help": "Dataset id or local file with whole dialogues in `chosen` and `rejected`."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to take all rows from."})
    output_dir: str = field(default="outputs/smollm2_chat/data", metadata={"help": "A new folder for the rows."})
    max_words: int = field(default=60, metadata={"help": "Longest prompt, and longest answer, in words."})


ARGUMENTS = (ChatArguments,)


def main(args: ChatArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Remove it, or give another --output_dir.")
    rows = load_rows(args.dataset_name, split=args.dataset_split)
    missing = {"chosen", "rejected"} - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{args.dataset_name} needs the columns `chosen` and `rejected`; it has {', '.join(rows.column_names)}."
        )
    chats = [chat for row in rows if (chat := as_chat(row["chosen"], row["rejected"], args.max_words)) is not None]
    if not chats:
        raise ValueError(
            f"No row of {args.dataset_name} has two dialogues of Human and Assistant that differ in the last answer "
            f"alone, with at most {args.max_words} words."
        )
    folder.mkdir(parents=True)
    path = folder / "train.jsonl"  # every stage holds out the same tenth of the prompts
    path.write_text("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats), encoding="utf-8")
    print(f"{len(chats):>7} of {len(rows)} rows in {path}")


def as_chat(chosen: str, rejected: str, max_words: int) -> dict[str, Any] | None:
    """Bring a row into messages, or return `None` for one that compares nothing, is empty somewhere or too long."""
    better, worse = turns(chosen), turns(rejected)
    prompt = better[:-1]
    usable = (
        bool(prompt)
        and prompt == worse[:-1]
        and better[-1] != worse[-1]
        and all(message["content"] for message in [*better, *worse])
        and [message["role"] for message in better] == ["user", "assistant"] * (len(better) // 2)
        and worse[-1]["role"] == "assistant"
    )
    lengths = [sum(map(words, prompt)), *(words(side[-1]) for side in (better, worse) if side)]
    if not usable or max(lengths) > max_words:
        return None
    return {"prompt": prompt, "chosen": better[-1:], "rejected": worse[-1:]}


def turns(dialogue: str) -> list[dict[str, str]]:
    start, *parts = TURN.split(dialogue)
    if start.strip():
        return []
    return [{"role": ROLES[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)]


def words(message: dict[str, str]) -> int:
    return len(message["content"].split())


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
