"""Make choices of OpenAI's labels: the best of four completions each, written back from GPT-2's tokens to text.

python recipes/lm_human_preferences/labels.py --labels offline_5k.json
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data.preferences import from_choices


@dataclass
class LabelArguments:
    """The file with the labels, and the tokenizer that wrote it."""

    labels: str = field(metadata={"help": "JSON list of `query`, `sample0`, `sample1`, ..., `best`."})
    tokenizer: str = field(default="openai-community/gpt2", metadata={"help": "Tokenizer of the ids in the file."})
    output_dir: str = field(
        default="outputs/lm_human_preferences/openai_labels", metadata={"help": "A new folder for the choices."}
    )


ARGUMENTS = (LabelArguments,)


def main(args: LabelArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or give another --output_dir.")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    labels = json.loads(Path(args.labels).read_text(encoding="utf-8"))
    if not isinstance(labels, list) or not all(isinstance(row, dict) for row in labels):
        raise ValueError(f"{args.labels} is no list of labels. Give a file such as offline_5k.json of OpenAI's.")
    # Which of four is best cannot be said of equal ones: such rows, a few, are left out
    choices = from_choices([choice(row, tokenizer) for row in labels], drop_bad_rows=True, source=args.labels)
    folder.mkdir(parents=True)
    kept = choices.select_columns(["prompt", "completions", "best"])
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    print(f"{len(choices)} of {len(labels)} labels in {folder}")


def choice(row: dict, tokenizer) -> dict:
    """A row of `from_choices`. The ids behind the vocabulary are padding."""
    names = sorted(name for name in row if name.startswith("sample"))
    if "query" not in row or "best" not in row or len(names) < 2:
        raise ValueError(f"A label needs `query`, `sample0`, `sample1` and `best`; one has {', '.join(sorted(row))}.")
    words = [[token for token in row[name] if token < len(tokenizer)] for name in ("query", *names)]
    prompt, *completions = tokenizer.batch_decode(words)
    return {"prompt": prompt, "completions": completions, "best": row["best"]}


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
