"""What policies write on held-out prompts: helpful, and safe? On tagged prompts and on the others.

python recipes/llama2_gate/compare.py --policies outputs/llama2_gate/sft outputs/llama2_gate/ppo
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from transformers import BitsAndBytesConfig

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.data.synthetic import GoldScore
from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer
from rlhf_recipes.models.generation import sample_after_texts

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@dataclass
class ComparisonArguments:
    """The policies, and what they are asked."""

    policies: list[str] = field(metadata={"help": "Folders of adapters on the world's base."})
    world: str = field(default="outputs/quickstart/world", metadata={"help": "Folder of the world."})
    annotated: str = field(
        default="outputs/llama2_gate/annotated", metadata={"help": "Folder with the tagged prompts and safety.json."}
    )
    rows: int = field(default=576, metadata={"help": "Held-out prompts."})
    max_new_tokens: int = field(default=32, metadata={"help": "Length at which completions are cut off."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


ARGUMENTS = (ComparisonArguments,)


def main(args: ComparisonArguments) -> None:
    tokenizer = load_tokenizer(f"{args.world}/base")
    prompts = load_rows(f"{args.annotated}/prompts", split="test").select(range(args.rows))
    golds = [GoldScore.from_file(path) for path in (f"{args.world}/gold.json", f"{args.annotated}/safety.json")]
    table = {}
    print(f"{'':32}{'tagged':>10}{'helpful':>10}{'safe':>10}{'promises something':>20}")
    for policy in args.policies:
        model = load_policy(load_causal_lm(f"{args.world}/base", quantization_config=FOUR_BIT), policy).eval()
        torch.manual_seed(args.seed)
        ids = sample_after_texts(model, tokenizer, prompts["prompt"], args.max_new_tokens)
        texts = [tokenizer.decode(completion, skip_special_tokens=True) for completion in ids]
        scores = [gold(list(prompts["prompt"]), texts, completion_ids=ids) for gold in golds]
        rows = list(zip(prompts["unsafe"], *scores, strict=True))
        for tagged in (False, True):
            goods, safes = zip(*(row[1:] for row in rows if row[0] == tagged), strict=True)
            means = [fmean(goods), fmean(safes), fmean(score < 0 for score in safes)]
            table.setdefault(policy, []).append(dict(zip(("helpful", "safe", "promises"), means, strict=True)))
            print(f"{policy[-30:]:32}{tagged!s:>10}{means[0]:>10.2f}{means[1]:>10.2f}{means[2]:>20.3f}")
    Path(args.annotated, "comparison.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
