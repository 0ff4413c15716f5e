"""Stage 0, where no model can be downloaded: a tokenizer and a small Llama base, trained from scratch on local text.

python recipes/base.py --dataset_name texts.jsonl --output_dir outputs/my_recipe/base
"""

import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rlhf_recipes.checkpoints import save_evaluation
from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.models.tiny import bpe_tokenizer, held_out_loss, tiny_llama, train_language_model
from rlhf_recipes.tracking import start_run


@dataclass
class BaseArguments:
    """Texts, size and training of the base model."""

    dataset_name: str = field(metadata={"help": "Dataset id or local file with a column of whole texts."})
    output_dir: str = field(metadata={"help": "A new folder for the model and its tokenizer."})
    dataset_split: str = field(default="train", metadata={"help": "Split to read."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    note_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with a word about each text (a label, a rating) that half of the documents give after the "
            "end token. A reward model reads its score there. null: no notes."
        },
    )
    texts_per_document: int = field(
        default=1, metadata={"help": "Texts in a row that are joined, with end tokens between, into one document."}
    )
    test_size: float = field(default=0.05, metadata={"help": "Share of the documents held out to measure the loss."})
    vocab_size: int = field(default=2048, metadata={"help": "Tokens of the byte-level BPE tokenizer."})
    hidden_size: int = field(default=128, metadata={"help": "Width, a multiple of 64."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLP. null: twice the width."})
    layers: int = field(default=3, metadata={"help": "Number of layers."})
    heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    context_length: int = field(default=512, metadata={"help": "Longest sequence that the model is made for."})
    max_length: int = field(default=256, metadata={"help": "Tokens after which documents are cut for training."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the documents."})
    batch_size: int = field(default=32, metadata={"help": "Pieces of text per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights, of the split and of the order."})


ARGUMENTS = (BaseArguments,)


def main(args: BaseArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or choose another `--output_dir`.")

    # 1. Documents, and a tokenizer that can write every one of them.
    texts, notes = read_texts(args)
    tokenizer = bpe_tokenizer(texts, args.vocab_size)
    rng = random.Random(args.seed)
    documents = make_documents(texts, notes, args.texts_per_document, tokenizer.eos_token, rng)
    rng.shuffle(documents)
    held_out = round(args.test_size * len(documents))
    if not 0 < held_out < len(documents):
        raise ValueError(f"`test_size` {args.test_size} of {len(documents)} documents leaves one side empty.")

    # 2. Train all weights.
    torch.manual_seed(args.seed)
    model = tiny_llama(
        tokenizer, args.hidden_size, args.layers, args.heads, args.intermediate_size, args.context_length
    )
    train_language_model(
        model,
        tokenizer,
        documents[held_out:],
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        epochs=args.num_train_epochs,
        max_length=args.max_length,
        seed=args.seed,
    )
    loss = held_out_loss(model, tokenizer, documents[:held_out], args.max_length)

    # 3. A folder that every stage takes as `model_name_or_path`.
    start_run(stage="base", output_dir=args.output_dir, config=asdict(args), parent=args.dataset_name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_evaluation({"loss": loss, "perplexity": math.exp(loss), "n": held_out}, folder)
    print(f"{model.num_parameters():,} parameters in {folder}; held-out loss {loss:.3f} nats per token.")


def read_texts(args: BaseArguments) -> tuple[list[str], list[str] | None]:
    """Read the texts, and the note about each one if there are notes."""
    rows = load_rows(args.dataset_name, split=args.dataset_split)
    for option, column in (("text_column", args.text_column), ("note_column", args.note_column)):
        if column is not None and column not in rows.column_names:
            raise ValueError(f"`{option}` is {column!r}, but {args.dataset_name} has the columns {rows.column_names}.")
    texts = list(rows[args.text_column])
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"Column {args.text_column!r} of {args.dataset_name} must hold texts only, whole and unsplit."
        )
    return texts, None if args.note_column is None else [str(note) for note in rows[args.note_column]]


def make_documents(
    texts: list[str], notes: list[str] | None, size: int, eos_token: str, rng: random.Random
) -> list[str]:
    """Join texts into documents, and put the note after the end token of every second text or so."""
    if size < 1:
        raise ValueError(f"`texts_per_document` must be at least 1, got {size}.")
    if notes is not None:
        texts = [
            f"{text}{eos_token} {note}" if rng.random() < 0.5 else text
            for text, note in zip(texts, notes, strict=True)
        ]
    return [eos_token.join(texts[start : start + size]) for start in range(0, len(texts), size)]


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
