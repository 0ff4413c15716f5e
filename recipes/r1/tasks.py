"""Stage 0: questions of a task of reasoning-gym with their answers and, for a small base, worked examples with slips.

python recipes/r1/tasks.py --output_dir outputs/r1/tasks
"""

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_recipes.config import parse_stage
from rlhf_recipes.rewards import gym_rows


@dataclass
class TaskArguments:
    """The task, how many questions are drawn, and the texts that a small base learns from."""

    output_dir: str = field(default="outputs/r1/tasks", metadata={"help": "A new folder for the rows."})
    task: str = field(default="chain_sum", metadata={"help": "Name of the task."})
    options: str = field(
        default='{"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}',
        metadata={"help": "Options of the task, as JSON."},
    )
    prompt: str = field(
        default="{expression} =\n",
        metadata={"help": "Template of the prompts, with `{question}` or other texts of the task."},
    )
    train_rows: int = field(default=3072, metadata={"help": "Questions to draw for the training."})
    test_rows: int = field(default=512, metadata={"help": "Questions to draw for the evaluation; none is trained on."})
    texts: int = field(default=0, metadata={"help": "Worked examples for a base of its own, of `chain_sum` only."})
    slips: float = field(default=0.2, metadata={"help": "Share of the steps in those texts that are wrong by one."})
    untagged: float = field(default=0.3, metadata={"help": "Share of those texts without the tags."})
    seed: int = field(default=0, metadata={"help": "Seed of the questions; those of the evaluation are far from it."})


ARGUMENTS = (TaskArguments,)


def main(args: TaskArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Remove it, or give another --output_dir.")
    if args.texts and args.task != "chain_sum":
        raise ValueError(
            f"`texts` are worked sums, of the task chain_sum, but `task` is {args.task!r}. Leave it at 0."
        )
    options = json.loads(args.options)

    # The questions of the evaluation occur neither in the training nor in the texts.
    test = gym_rows(args.task, args.test_rows, args.seed + 1_000_000, args.prompt, **options)
    held_out = [row["prompt"] for row in test]
    train = gym_rows(args.task, args.train_rows, args.seed, args.prompt, held_out, **options)
    rows = {"train": train, "test": test}
    if args.texts:
        rng = random.Random(args.seed)
        rows["texts"] = [worked(rng.choice(train), rng, args.slips, args.untagged) for _ in range(args.texts)]
    folder.mkdir(parents=True)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        print(f"{len(lines):>7} rows in {folder / name}.jsonl")


def worked(row: dict[str, str], rng: random.Random, slips: float, untagged: float) -> dict[str, str]:
    """Write a text that sums up from left to right, as somebody does who slips now and then and forgets the form."""
    first, *rest = re.findall(r"[-+]? ?\d+", json.loads(row["metadata"])["expression"])
    total, steps = int(first.replace(" ", "")), []
    for term in rest:
        right = total + int(term.replace(" ", ""))
        found = right + (rng.choice((-1, 1)) if rng.random() < slips else 0)
        steps.append(f"{total} {term} = {found}")
        total = found
    if rng.random() < untagged:
        return {"text": f"{row['prompt']}It is {total}."}
    return {"text": f"{row['prompt']}<think>{', '.join(steps)}</think><answer>{total}</answer>"}


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
