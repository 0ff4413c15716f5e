"""After SFT: a simulated annotator, who sees the picture, compares two answers of the SFT model to each prompt.

python recipes/llava_rlhf/annotate.py --pairs 1000
"""

import json
import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer
from rlhf_recipes.models.generation import sample_after_texts
from rlhf_recipes.tracking import start_run


@dataclass
class AnnotationArguments:
    """Prompts, model and annotator."""

    world: str = field(default="outputs/llava_rlhf/world", metadata={"help": "Folder of the world."})
    sft_adapter: str = field(default="outputs/llava_rlhf/sft", metadata={"help": "Whose answers are compared."})
    output_dir: str = field(default="outputs/llava_rlhf/preferences", metadata={"help": "A new folder."})
    pairs: int = field(default=1_000, metadata={"help": "Pairs that are sampled. Those of equal texts are left out."})
    temperature: float = field(default=0.5, metadata={"help": "Of the choice: 0 always takes the truer answer."})
    max_new_tokens: int = field(default=16, metadata={"help": "Length at which answers are cut off."})
    seed: int = field(default=0, metadata={"help": "Seed of samples and choices."})


ARGUMENTS = (AnnotationArguments,)


def main(args: AnnotationArguments) -> None:
    from pictures import note  # beside this script

    folder, rng = Path(args.output_dir), random.Random(args.seed)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or choose another `--output_dir`.")
    tokenizer = load_tokenizer(f"{args.world}/base")
    model = load_policy(load_causal_lm(f"{args.world}/base"), args.sft_adapter).eval()
    prompts = load_rows(f"{args.world}/prompts_annotated.jsonl").to_list()[: args.pairs]
    torch.manual_seed(args.seed)
    asked = [row["prompt"] for row in prompts]
    sides = [sample_after_texts(model, tokenizer, asked, args.max_new_tokens) for _ in range(2)]

    rows = []
    for row, *pair in zip(prompts, *sides, strict=True):
        # Both say something and have come to their end, or the reward model would be shown an end that was not there
        if pair[0] == pair[1] or any(len(answer) < 2 or answer[-1] != tokenizer.eos_token_id for answer in pair):
            continue
        texts = [" " + tokenizer.decode(answer, skip_special_tokens=True) for answer in pair]
        notes = [note(text, row["caption_type"], row["facts"]) for text in texts]
        better = rng.random() < 1 / (1 + math.exp((notes[1] - notes[0]) / max(args.temperature, 1e-9)))
        chosen, rejected = texts if better else texts[::-1]
        rows.append(
            {**{name: row[name] for name in ("prompt", "reward_prompt")}, "chosen": chosen, "rejected": rejected}
        )
    start_run(stage="preferences", output_dir=args.output_dir, config=asdict(args), parent=args.sft_adapter)
    for name, left_out in (("with_facts", ()), ("without_facts", ("reward_prompt",))):
        kept = ({key: value for key, value in row.items() if key not in left_out} for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"{len(rows)} choices in {folder}, with facts and without.")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
