"""Make the small world of this recipe: passages of several reviews, a base model that has read them, a gold score.

python recipes/lm_human_preferences/world.py --seed 0
"""

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import to_sentence_prompts
from rlhf_recipes.data.loading import load_rows
from rlhf_recipes.data.synthetic import write_gold
from rlhf_recipes.data.synthetic.grammar import STOP, Style, rating, split_prompts, vocabulary, write_review
from rlhf_recipes.models.tiny import tiny_llama, train_language_model, word_tokenizer

REVIEWS = range(5, 9)  # in a passage
AFTER_A_STOP = ("article", "pronoun")  # word classes that begin a sentence


@dataclass
class WorldArguments:
    """What the world is made of."""

    output_dir: str = field(default="outputs/lm_human_preferences/world", metadata={"help": "Folder of the world."})
    seed: int = field(default=0, metadata={"help": "Seed of the passages and of the base model."})
    corpus_size: int = field(default=6_000, metadata={"help": "Passages that the base model reads, each once."})
    passages: int = field(default=3_000, metadata={"help": "Further passages, from which prompts are cut."})
    max_tokens: int = field(default=64, metadata={"help": "Tokens of a prompt, at most."})


ARGUMENTS = (WorldArguments,)


def main(world: WorldArguments) -> None:
    folder = Path(world.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or give another --output_dir.")
    unfinished = folder.with_name(folder.name + ".unfinished")  # what has its name is whole
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    rng = random.Random(world.seed)
    topics, _ = split_prompts(0.5, rng)

    tokenizer = word_tokenizer(vocabulary())
    torch.manual_seed(world.seed)
    model = tiny_llama(tokenizer)
    corpus = [document(rng.choice(topics), tokenizer.eos_token, rng) for _ in range(world.corpus_size)]
    losses = train_language_model(model, tokenizer, corpus, batch_size=32, learning_rate=2e-3, seed=world.seed)
    model.save_pretrained(unfinished / "base")
    tokenizer.save_pretrained(unfinished / "base")

    texts = [" ".join(passage(rng.choice(topics), rng)) for _ in range(world.passages)]
    write_rows(unfinished / "passages.jsonl", [{"text": text} for text in texts])
    prompts = to_sentence_prompts(load_rows(str(unfinished / "passages.jsonl")), tokenizer, world.max_tokens)
    held_out = len(prompts) // 6
    write_rows(unfinished / "prompts_test.jsonl", prompts.select(range(held_out)))
    write_rows(unfinished / "prompts_train.jsonl", prompts.select(range(held_out, len(prompts))))
    gold = unfinished / "gold.json"
    write_gold(gold, tokenizer.eos_token_id)
    definition = json.loads(gold.read_text())
    definition["allowed_bigrams"] += [[STOP, begins] for begins in AFTER_A_STOP]  # a text has several sentences here
    gold.write_text(json.dumps(definition, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(folder)
    last = losses[-10:]
    print(f"Made {folder}: {len(prompts)} prompts, final loss {sum(last) / len(last):.3f} nats per token.")


def passage(topic: str, rng: random.Random) -> list[str]:
    """Write several reviews of one thing, each in a mood of its own."""
    return [write_review(topic, Style(), rng) for _ in range(rng.choice(REVIEWS))]


def document(topic: str, eos_token: str, rng: random.Random) -> str:
    """Write a passage for the base model, half of them with the stars of its last two reviews behind the end token.

    A reward model reads its score at the end token. A base that never had to say anything there has no summary of the
    text at that place.
    """
    reviews = passage(topic, rng)
    note = f" {eos_token} {rating(' '.join(reviews[-2:]))}" if rng.random() < 0.5 else ""
    return " ".join(reviews) + note


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
