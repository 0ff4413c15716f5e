"""Make the embedded world of the quickstart: corpus, tokenizer, small base model, prompts, SFT data, gold score.

python recipes/quickstart/world.py --seed 0 --output_dir outputs/quickstart/world
"""

import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data.synthetic import write_gold
from rlhf_recipes.data.synthetic.grammar import Style, rating, split_prompts, vocabulary, write_review
from rlhf_recipes.models.tiny import tiny_llama, train_language_model, word_tokenizer

# What the base model has read, and the demonstrations: fewer of them take sides, and none ends with a rating.
CORPUS = Style()
DEMONSTRATIONS = Style(positive=0.25, negative=0.25)


@dataclass
class WorldArguments:
    """Everything that defines a world; the same values make the same world again."""

    output_dir: str = field(default="outputs/quickstart/world", metadata={"help": "Folder of the world."})
    seed: int = field(default=0, metadata={"help": "Seed of the corpus, of the splits and of the base model."})
    corpus_size: int = field(default=20_000, metadata={"help": "Reviews that the base model reads, each once."})
    sft_size: int = field(default=1_500, metadata={"help": "Demonstrations for supervised fine-tuning."})
    held_out: float = field(
        default=0.25, metadata={"help": "Share of the (place, thing) combinations that no stage trains on."}
    )
    rated_share: float = field(
        default=0.5, metadata={"help": "Share of the base model's documents with a star rating after the end token."}
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of the base model, a multiple of 64."})
    layers: int = field(default=2, metadata={"help": "Layers of the base model."})
    heads: int = field(default=4, metadata={"help": "Attention heads of the base model."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate of the base model."})
    batch_size: int = field(default=32, metadata={"help": "Reviews per step of the base model."})


ARGUMENTS = (WorldArguments,)


def main(world: WorldArguments) -> None:
    folder = Path(world.output_dir)
    if is_finished(folder, world):
        print(f"Using the world in {folder}, made before with the same settings.")
        return
    # Built beside its final place and moved there when complete: a world that exists is whole.
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)

    rng = random.Random(world.seed)
    train, test = split_prompts(world.held_out, rng)
    write_rows(unfinished / "prompts_train.jsonl", ({"prompt": prompt} for prompt in train))
    write_rows(unfinished / "prompts_test.jsonl", ({"prompt": prompt} for prompt in test))

    # A leading space, because prompt and completion are joined as they are.
    prompts = [rng.choice(train) for _ in range(world.sft_size)]
    rows = ({"prompt": prompt, "completion": " " + write_review(prompt, DEMONSTRATIONS, rng)} for prompt in prompts)
    write_rows(unfinished / "sft.jsonl", rows)

    tokenizer = word_tokenizer(vocabulary())
    write_gold(unfinished / "gold.json", tokenizer.eos_token_id)

    torch.manual_seed(world.seed)
    model = tiny_llama(tokenizer, world.hidden_size, world.layers, world.heads)
    chosen = rng.choices(train, k=world.corpus_size)
    documents = [document(prompt, world.rated_share, tokenizer.eos_token, rng) for prompt in chosen]
    losses = train_language_model(
        model, tokenizer, documents, batch_size=world.batch_size, learning_rate=world.learning_rate, seed=world.seed
    )
    model.save_pretrained(unfinished / "base")
    tokenizer.save_pretrained(unfinished / "base")

    (unfinished / "world.json").write_text(json.dumps(settings(world), indent=1) + "\n")
    unfinished.rename(folder)
    last = losses[-10:]
    print(
        f"Made {folder}: {len(train)} training and {len(test)} held-out prompts, {len(tokenizer)} words, "
        f"{model.num_parameters():,} parameters, final loss {sum(last) / len(last):.3f} nats per token."
    )


def is_finished(folder: Path, world: WorldArguments) -> bool:
    """Return whether the world exists; refuse a folder that holds anything else."""
    if not folder.exists():
        return False
    record = folder / "world.json"
    if record.is_file() and json.loads(record.read_text()) == settings(world):
        return True
    raise FileExistsError(
        f"{folder} holds a world with other settings, or something else. Delete it, or give another --output_dir."
    )


def settings(world: WorldArguments) -> dict[str, object]:
    return {name: value for name, value in asdict(world).items() if name != "output_dir"}


def document(prompt: str, rated_share: float, eos_token: str, rng: random.Random) -> str:
    """Write a document for the base model: prompt and review, in part followed by a rating after the end token.

    A reward model reads its score at the end token. A base that never had to say anything there has no summary of the
    review at that place, and a reward model on it learns almost nothing. Real pretraining text is full of such lines.
    """
    review = write_review(prompt, CORPUS, rng)
    note = f" {eos_token} {rating(review)}" if rng.random() < rated_share else ""
    return f"{prompt} {review}{note}"


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
