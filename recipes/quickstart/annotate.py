"""Sample pairs of reviews from the SFT model and let the simulated annotator choose: the reward model's training data.

python recipes/quickstart/annotate.py --seed 0
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
from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer
from rlhf_recipes.models.generation import sample_after_texts
from rlhf_recipes.tracking import start_run

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@dataclass
class AnnotationArguments:
    """The writer of the completions, their annotator, and the number of pairs."""

    world: str = field(default="outputs/quickstart/world", metadata={"help": "Folder of the world."})
    sft_adapter: str = field(default="outputs/quickstart/sft", metadata={"help": "Who writes the completions."})
    output_dir: str = field(default="outputs/quickstart/preferences", metadata={"help": "Where the pairs go."})
    pairs: int = field(default=4_500, metadata={"help": "Pairs that are shown to the annotator."})
    temperature: float = field(default=0.4, metadata={"help": "Noise of the annotator's choices, in gold points."})
    lapse: float = field(default=0.03, metadata={"help": "Share of choices that are made without looking."})
    tie_margin: float = field(default=1.0, metadata={"help": "Difference that the annotator does not notice."})
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
    annotator = Annotator(
        GoldScore.from_file(f"{args.world}/gold.json"), args.temperature, args.lapse, args.tie_margin, args.seed
    )
    prompts = load_rows(args.world, split="prompts_train")["prompt"]
    prompts = random.Random(args.seed).choices(list(prompts), k=args.pairs)
    torch.manual_seed(args.seed)
    options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    firsts, seconds = (sample_after_texts(model, tokenizer, prompts, **options) for _ in range(2))

    # The annotator reads texts and sees whether they came to their end; the reward model gets the very tokens, so
    # that a review which was cut off has no end token.
    rows, alike = [], 0
    for prompt, *pair in zip(prompts, firsts, seconds, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in pair]
        completions = [
            Completion(text, ids[-1] == tokenizer.eos_token_id) for text, ids in zip(texts, pair, strict=True)
        ]
        choice = annotator.choose(prompt, *completions)
        if texts[0] == texts[1]:
            alike += 1
            continue
        # A tie is a label of one half; which of the two stands as `chosen` then says nothing.
        row = {"prompt": prompt, "label": 0.5 if choice == "tie" else 1.0}
        for side, index in (("chosen", choice == "second"), ("rejected", choice != "second")):
            row[side] = " " + texts[index]
            row[f"{side}_ids"] = tokenizer(prompt)["input_ids"] + pair[index]
            row[f"gold_{side}"] = sum(annotator.gold.parts(prompt, *completions[index]).values())
        rows.append(row)

    start_run(stage="preferences", output_dir=args.output_dir, config=asdict(args), parent=args.sft_adapter)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = [row for row in rows if row["label"] == 1.0]
    agree = sum(row["gold_chosen"] > row["gold_rejected"] for row in choices) / len(choices)
    print(
        f"{len(choices)} choices and {len(rows) - len(choices)} ties in {folder}, {alike} pairs of the same text left "
        f"out; {agree:.3f} of the choices agree with the gold score."
    )


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
