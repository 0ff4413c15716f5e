"""Sample 4 to 9 reviews of each prompt from the SFT model and let the simulated annotator rank them.

python recipes/instructgpt/rank.py --seed 0

It also writes texts like those that the base has read, for PPO-ptx.
"""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.data.synthetic import Annotator, Completion, GoldScore
from rlhf_recipes.data.synthetic.grammar import Style, write_review
from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer
from rlhf_recipes.models.generation import sample_after_texts
from rlhf_recipes.tracking import start_run

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@dataclass
class RankingArguments:
    """The writer of the completions, their annotator, and how many are ranked together."""

    world: str = field(default="outputs/quickstart/world", metadata={"help": "Folder of the world."})
    sft_adapter: str = field(default="outputs/instructgpt/sft", metadata={"help": "Who writes the completions."})
    output_dir: str = field(default="outputs/instructgpt/rankings", metadata={"help": "Where the rankings go."})
    prompts: int = field(default=700, metadata={"help": "Prompts that are shown to the annotator."})
    min_completions: int = field(default=4, metadata={"help": "Fewest completions that are ranked together."})
    max_completions: int = field(default=9, metadata={"help": "Most completions that are ranked together."})
    texts: int = field(default=4_000, metadata={"help": "Pretraining texts."})
    temperature: float = field(default=0.4, metadata={"help": "Noise of the annotator's ranking, in gold points."})
    lapse: float = field(default=0.03, metadata={"help": "Share of rankings that are made without looking."})
    tie_margin: float = field(default=0.3, metadata={"help": "Difference that the annotator does not notice."})
    max_new_tokens: int = field(default=24, metadata={"help": "Length at which completions are cut off."})
    batch_size: int = field(default=256, metadata={"help": "Completions that are sampled at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, samples and rankings."})

    def __post_init__(self) -> None:
        if not 2 <= self.min_completions <= self.max_completions:
            raise ValueError(
                "A ranking compares 2 or more completions: give `min_completions` of at least 2, and "
                f"`max_completions` of at least as many, got {self.min_completions} and {self.max_completions}."
            )


ARGUMENTS = (RankingArguments,)


def main(args: RankingArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or choose another `--output_dir`.")
    tokenizer, rng = load_tokenizer(f"{args.world}/base"), random.Random(args.seed)
    model = load_policy(load_causal_lm(f"{args.world}/base", quantization_config=FOUR_BIT), args.sft_adapter).eval()
    gold = GoldScore.from_file(f"{args.world}/gold.json")
    annotator = Annotator(gold, args.temperature, args.lapse, args.tie_margin, args.seed)
    prompts = list(load_rows(args.world, split="prompts_train")["prompt"])
    shown = rng.choices(prompts, k=args.prompts)
    sizes = [rng.randint(args.min_completions, args.max_completions) for _ in shown]
    torch.manual_seed(args.seed)
    repeated = [prompt for prompt, size in zip(shown, sizes, strict=True) for _ in range(size)]
    ids = sample_after_texts(model, tokenizer, repeated, args.max_new_tokens, batch_size=args.batch_size)
    samples = iter(ids)

    # The annotator reads texts and sees whether they came to their end; the reward model gets the very tokens, so that
    # a review which was cut off has no end token. The same review twice is shown once.
    rows = []
    for prompt, size in zip(shown, sizes, strict=True):
        ids = list(dict.fromkeys(tuple(next(samples)) for _ in range(size)))
        if len(ids) < args.min_completions:
            continue
        texts = [tokenizer.decode(completion, skip_special_tokens=True) for completion in ids]
        completions = [
            Completion(text, completion[-1] == tokenizer.eos_token_id)
            for text, completion in zip(texts, ids, strict=True)
        ]
        row = {"prompt": prompt, "completions": [f" {text}" for text in texts]}
        row["completion_ids"] = [tokenizer(prompt)["input_ids"] + list(completion) for completion in ids]
        rows.append(row | {"ranks": annotator.rank(prompt, completions)})

    start_run(stage="preferences", output_dir=args.output_dir, config=asdict(args), parent=args.sft_adapter)
    write_rows(folder / "train.jsonl", rows)
    (folder / "pretraining").mkdir()
    read = rng.choices(prompts, k=args.texts)
    documents = [{"text": f"{prompt} {write_review(prompt, Style(), rng)}"} for prompt in read]
    write_rows(folder / "pretraining" / "train.jsonl", documents)
    pairs = sum(len(row["ranks"]) * (len(row["ranks"]) - 1) // 2 for row in rows)
    print(
        f"{len(rows)} rankings of {sum(len(row['ranks']) for row in rows)} completions, {pairs} pairs, in {folder}; "
        f"{args.prompts - len(rows)} prompts with too few different completions are left out."
    )


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
