"""Sample completions from the base, cut them at a full stop, and let the simulated annotator choose the best of four.

python recipes/lm_human_preferences/annotate.py --seed 0
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, set_seed

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.data.synthetic import Annotator, Completion, GoldScore
from rlhf_recipes.models import load_causal_lm, load_tokenizer
from rlhf_recipes.models.generation import sample_after
from rlhf_recipes.rewards import Truncation


@dataclass
class AnnotationArguments:
    """What is sampled, which completions count, and how the annotator chooses."""

    world: str = field(default="outputs/lm_human_preferences/world", metadata={"help": "Folder of the world."})
    output_dir: str = field(
        default="outputs/lm_human_preferences/labels", metadata={"help": "A new folder for choices and samples."}
    )
    choices: int = field(default=1_000, metadata={"help": "Prompts that are shown to the annotator, at most."})
    choose_from: int = field(default=4, metadata={"help": "Completions of a prompt, of which the best is chosen."})
    samples: int = field(default=256, metadata={"help": "Completions that the reward model is normalised on."})
    max_new_tokens: int = field(default=24, metadata={"help": "Tokens of a completion."})
    truncate_token: str = field(default=".", metadata={"help": "Token behind which a completion is cut."})
    truncate_after: int = field(default=16, metadata={"help": "First position, from 0, at which it counts."})
    temperature: float = field(default=0.7, metadata={"help": "Temperature of the sampling."})
    annotator_temperature: float = field(default=0.4, metadata={"help": "Noise of the choices, in gold points."})
    lapse: float = field(default=0.03, metadata={"help": "Share of choices that are made without looking."})
    batch_size: int = field(default=256, metadata={"help": "Completions that are sampled at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, samples and choices."})

    def __post_init__(self):
        if self.choose_from < 2:
            raise ValueError(f"`choose_from` must be at least 2, got {self.choose_from}: of one there is no choice.")
        if not 0 <= self.truncate_after < self.max_new_tokens:
            raise ValueError(
                f"`truncate_after` must lie in [0, {self.max_new_tokens - 1}], the positions of a completion, got "
                f"{self.truncate_after}."
            )


ARGUMENTS = (AnnotationArguments,)
TRIES = 2  # times as many completions are sampled as are shown, because some cannot be cut


def main(args: AnnotationArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or give another --output_dir.")
    tokenizer = load_tokenizer(f"{args.world}/base")
    cut = Truncation(tokenizer, [tokenizer.eos_token_id], [args.truncate_token], args.truncate_after)
    annotator = Annotator(GoldScore.from_file(f"{args.world}/gold.json"), args.annotator_temperature, args.lapse)
    model = load_causal_lm(f"{args.world}/base")
    set_seed(args.seed)
    prompts = list(load_rows(args.world, split="prompts_train")["prompt"])
    random.Random(args.seed).shuffle(prompts)
    rows, samples = [], []
    for start in range(0, len(prompts), args.batch_size):
        if len(rows) >= args.choices:
            break
        batch = prompts[start : start + args.batch_size]
        found = sample(model, tokenizer, batch, cut, args)
        samples += [(prompt, each[0]) for prompt, each in zip(batch, found, strict=True) if each]
        rows += [
            choice(tokenizer, annotator, prompt, each[: args.choose_from])
            for prompt, each in zip(batch, found, strict=True)
            if len({tuple(ids) for _, ids in each[: args.choose_from]}) == args.choose_from
        ]
    if not rows or len(samples) < args.samples:
        raise ValueError(
            f"{len(rows)} prompts have {args.choose_from} different completions with {args.truncate_token!r} at or "
            f"after position {args.truncate_after}, and {len(samples)} have one (of {len(prompts)}; {args.samples} "
            "are needed). Lower `truncate_after`, or make a larger world."
        )
    folder.mkdir(parents=True)
    write_rows(folder / "choices.jsonl", rows[: args.choices])
    texts = [{"prompt": prompt, "completion": f" {text}"} for prompt, (text, _) in samples[: args.samples]]
    write_rows(folder / "samples.jsonl", texts)
    print(f"{min(len(rows), args.choices)} choices and {args.samples} samples in {folder}.")


@torch.no_grad()
def sample(model, tokenizer, prompts, cut: Truncation, args: AnnotationArguments) -> list[list[tuple[str, list[int]]]]:
    """Sample several completions of each prompt; those that can be cut, as text and token ids."""
    config = GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_k=0,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompt_ids = tokenizer(prompts)["input_ids"]
    found = [[] for _ in prompts]
    for _ in range(TRIES * args.choose_from):
        sampled = sample_after(model, prompt_ids, config, args.temperature, [tokenizer.eos_token_id])
        for each, text, ids, done in zip(found, *cut([""] * len(sampled), sampled), strict=True):
            if done:
                each.append((text, ids))
    return found


def choice(tokenizer, annotator: Annotator, prompt: str, completions: list[tuple[str, list[int]]]) -> dict:
    """A row of `from_choices`, with the token ids that were sampled."""
    ids = tokenizer(prompt)["input_ids"]
    return {
        "prompt": prompt,
        "completions": [f" {text}" for text, _ in completions],
        "completion_ids": [ids + own for _, own in completions],
        "best": annotator.choose_best(prompt, [Completion(text) for text, _ in completions]),
    }


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
