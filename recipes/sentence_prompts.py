"""Cut prompts from texts: from behind the first full stop to the last one within a number of tokens.

python recipes/sentence_prompts.py --dataset_name stanfordnlp/imdb --model Qwen/Qwen2.5-0.5B --output_dir prompts
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.data import load_rows, to_sentence_prompts
from rlhf_recipes.models import load_tokenizer


@dataclass
class PromptArguments:
    """Where the prompts are cut."""

    model: str = field(metadata={"help": "Model whose tokens are counted."})
    output_dir: str = field(metadata={"help": "A new folder for the prompts."})
    max_tokens: int = field(default=64, metadata={"help": "Tokens of a prompt, at most."})
    stop: str = field(default=".", metadata={"help": "Text of the one token that ends a sentence."})


ARGUMENTS = (PromptArguments, DataArguments)


def main(args: PromptArguments, data_args: DataArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or give another --output_dir.")
    texts = load_rows(data_args.dataset_name, config=data_args.dataset_config, split=data_args.dataset_train_split)
    if data_args.max_train_rows is not None:
        texts = texts.select(range(min(data_args.max_train_rows, len(texts))))
    prompts = to_sentence_prompts(texts, load_tokenizer(args.model), args.max_tokens, args.stop)["prompt"]
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    print(f"{len(prompts)} prompts of {len(texts)} texts in {folder}")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
