"""Make the world of the recipe: a base model, demonstrations, and prompts with and without facts.

python recipes/llava_rlhf/world.py --seed 0 --output_dir outputs/llava_rlhf/world
"""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rlhf_recipes.config import parse_stage
from rlhf_recipes.models.tiny import tiny_llama, train_language_model, word_tokenizer


@dataclass
class WorldArguments:
    """Everything that defines a world; the same values make the same world again."""

    output_dir: str = field(default="outputs/llava_rlhf/world", metadata={"help": "A new folder for the world."})
    seed: int = field(default=0, metadata={"help": "Seed of objects, texts and base model."})
    corpus_size: int = field(default=60_000, metadata={"help": "Documents that the base model reads, each once."})
    sft_size: int = field(default=1_000, metadata={"help": "Demonstrations for supervised fine-tuning."})
    prompts: int = field(default=2_000, metadata={"help": "Prompts of PPO, each of a picture of its own."})
    test_prompts: int = field(default=400, metadata={"help": "The same of viewers that no stage trains on."})
    questions: float = field(default=0.25, metadata={"help": "Share of the prompts that are yes/no questions."})
    annotated: int = field(default=6, metadata={"help": "Objects that annotators are shown."})
    batch_size: int = field(default=32, metadata={"help": "Documents per step of the base model."})


ARGUMENTS = (WorldArguments,)


def main(world: WorldArguments) -> None:
    from pictures import OBJECTS, VIEWERS, WORDS, document, draw_attributes, example  # beside this script

    folder, rng = Path(world.output_dir), random.Random(world.seed)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or choose another `--output_dir`.")
    objects = {name: draw_attributes(rng) for name in OBJECTS}
    viewers, new_viewers = VIEWERS[:-3], VIEWERS[-3:]

    # 1. The base has read descriptions without facts, of which half is true, and those of other worlds' pictures, with
    #    facts and a note after the end token that compares the two: it can check a text against facts.
    tokenizer = word_tokenizer(WORDS)
    torch.manual_seed(world.seed)
    model = tiny_llama(tokenizer, hidden_size=64, layers=2, heads=4)
    documents = [document(objects, world.questions, tokenizer.eos_token, rng) for _ in range(world.corpus_size)]
    losses = train_language_model(model, tokenizer, documents, batch_size=world.batch_size, seed=world.seed)

    # 2. Demonstrations are right half of the time; annotators see few of the objects; PPO sees them all.
    few = dict(list(objects.items())[: world.annotated])
    rows = {
        "sft": [example(objects, viewers, world.questions, rng) for _ in range(world.sft_size)],
        "prompts_annotated": [example(few, viewers, world.questions, rng) for _ in range(world.prompts)],
        "prompts_train": [example(objects, viewers, world.questions, rng) for _ in range(world.prompts)],
        "prompts_test": [example(objects, new_viewers, world.questions, rng) for _ in range(world.test_prompts)],
    }
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, part in rows.items():
        if name != "sft":
            part = [{key: value for key, value in row.items() if key != "completion"} for row in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "world.json").write_text(json.dumps({"settings": asdict(world), "objects": objects}, indent=1) + "\n")
    print(
        f"Made {folder}: {model.num_parameters():,} parameters, final loss {sum(losses[-10:]) / 10:.3f} nats a token."
    )


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
