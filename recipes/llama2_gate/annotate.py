"""Pairs of reviews with four grades, by two annotators: one for helpfulness, one for safety. And tagged prompts.

python recipes/llama2_gate/annotate.py --seed 0

Helpfulness is the world's gold score. Unsafe are promises that nobody can keep, such as `perfect`, which the gold
score pays for as for any praise. Prompts about rides are tagged: there safety counts always.
"""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.data.preferences import LLAMA2_LARGE_MARGINS
from rlhf_recipes.data.synthetic import Annotator, Completion, GoldScore
from rlhf_recipes.data.synthetic.grammar import topic_of
from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer
from rlhf_recipes.models.generation import sample_after_texts
from rlhf_recipes.tracking import start_run

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
PROMISES = ("perfect", "superb", "excellent", "brilliant", "splendid", "adored")  # half of the words of praise
TAGGED = "ride"  # topic of the prompts for which safety counts always
GRADES = {2.0: "significantly better", 1.0: "better", 0.5: "slightly better", 0.0: "negligibly better"}  # from points


@dataclass
class AnnotationArguments:
    """The writer of the completions, their annotators, and the number of pairs."""

    world: str = field(default="outputs/quickstart/world", metadata={"help": "Folder of the world."})
    sft_adapter: str = field(default="outputs/llama2_gate/sft", metadata={"help": "Who writes the completions."})
    output_dir: str = field(default="outputs/llama2_gate/annotated", metadata={"help": "Where the rows go."})
    pairs: int = field(default=1_500, metadata={"help": "Pairs that are shown to either annotator."})
    margins: Literal["small", "large"] = field(default="small", metadata={"help": "Llama 2's margins of the grades."})
    temperature: float = field(default=0.4, metadata={"help": "Noise of the annotators' choices, in points."})
    lapse: float = field(default=0.03, metadata={"help": "Share of choices that are made without looking."})
    max_new_tokens: int = field(default=24, metadata={"help": "Length at which completions are cut off."})
    batch_size: int = field(default=256, metadata={"help": "Completions that are sampled at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, samples and choices."})


ARGUMENTS = (AnnotationArguments,)


def main(args: AnnotationArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or choose another `--output_dir`.")
    tokenizer = load_tokenizer(f"{args.world}/base")
    model = load_policy(load_causal_lm(f"{args.world}/base", quantization_config=FOUR_BIT), args.sft_adapter).eval()
    all_prompts = list(load_rows(args.world, split="prompts_train")["prompt"])
    prompts = random.Random(args.seed).choices(all_prompts, k=args.pairs)
    torch.manual_seed(args.seed)
    options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    pairs = list(zip(*(sample_after_texts(model, tokenizer, prompts, **options) for _ in range(2)), strict=True))

    start_run(stage="preferences", output_dir=args.output_dir, config=asdict(args), parent=args.sft_adapter)
    (folder / "safety.json").write_text(json.dumps(safety_of(f"{args.world}/gold.json"), indent=1) + "\n")
    for name, path in {"helpfulness": f"{args.world}/gold.json", "safety": f"{folder}/safety.json"}.items():
        annotator = Annotator(GoldScore.from_file(path), args.temperature, args.lapse, tie_margin=0.0, seed=args.seed)
        rows = [
            row
            for prompt, pair in zip(prompts, pairs, strict=True)
            if (row := compare(annotator, tokenizer, prompt, pair, args.margins)) is not None
        ]
        write_rows(folder / name / "train.jsonl", rows)
        print(f"{len(rows)} pairs by {name} in {folder / name}")
    for split in ("train", "test"):
        rows = load_rows(args.world, split=f"prompts_{split}")
        tagged = [{"prompt": prompt, "unsafe": topic_of(prompt) == TAGGED} for prompt in rows["prompt"]]
        write_rows(folder / "prompts" / f"{split}.jsonl", tagged)


def safety_of(gold: str) -> dict:
    """Definition of a score that knows nothing but promises: 0 without, and -3 at most."""
    definition = json.loads(Path(gold).read_text())
    weights = {name: 0 if name == "free_words" else 0.0 for name in definition["weights"]}
    weights |= {"sentiment": 3.0, "substance_cap": 0}
    return definition | {"positive": [], "negative": PROMISES, "weights": weights}


def compare(annotator: Annotator, tokenizer, prompt: str, pair, margins: str) -> dict | None:
    """Let an annotator choose between two reviews and say by how much; nothing of two that are alike to them."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in pair]
    completions = [Completion(text, ids[-1] == tokenizer.eos_token_id) for text, ids in zip(texts, pair, strict=True)]
    scores = [sum(annotator.gold.parts(prompt, *completion).values()) for completion in completions]
    if scores[0] == scores[1]:
        return None
    chosen = annotator.choose(prompt, *completions) == "second"
    strength = next(grade for points, grade in GRADES.items() if abs(scores[0] - scores[1]) >= points)
    large = {"margin": LLAMA2_LARGE_MARGINS[strength]}
    row = {"prompt": prompt} | ({"strength": strength} if margins == "small" else large)  # the reader knows the small
    for side, index in (("chosen", chosen), ("rejected", not chosen)):
        row |= {side: f" {texts[index]}", f"{side}_ids": tokenizer(prompt)["input_ids"] + pair[index]}
    return row


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
