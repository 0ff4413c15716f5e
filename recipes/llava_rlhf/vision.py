"""LLaVA-RLHF on pictures: SFT, a reward model that sees the picture and reads facts, PPO; on a model made by code.

python recipes/llava_rlhf/vision.py --output_dir outputs/llava_rlhf/vision [--model qwen2_5_vl]
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image, ImageDraw
from transformers import set_seed

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.checkpoints import save_evaluation
from rlhf_recipes.config import parse_stage
from rlhf_recipes.evaluation import evaluate_policy, write_evaluation
from rlhf_recipes.models import (
    language_layers,
    load_image_classifier,
    load_image_model,
    load_policy,
    load_processor,
)
from rlhf_recipes.models.images import ImageReader, chat_with_images
from rlhf_recipes.models.tiny_vision import tiny_llava, tiny_qwen2_5_vl
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer, evaluate_pairs, pairs_table
from rlhf_recipes.supervised import CompletionConfig, CompletionTrainer, completions_table, evaluate_completions

COLOURS, NUMBERS = "red green blue black".split(), "one two three".split()
QUESTION = "what is there ?"
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "logging_steps": 4,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class VisionArguments:
    """Sizes and lengths of the run."""

    output_dir: str = field(default="outputs/llava_rlhf/vision", metadata={"help": "Folder of all stages."})
    model: Literal["llava", "qwen2_5_vl"] = field(default="llava", metadata={"help": "What the base is."})
    seed: int = field(default=0, metadata={"help": "Seed of pictures, model and training."})
    captions: int = field(
        default=16_000, metadata={"help": "Captioned pictures that the base learns from, each once."}
    )
    demonstrations: int = field(default=800, metadata={"help": "Captions for supervised fine-tuning."})
    pairs: int = field(default=2_000, metadata={"help": "Choices that the reward model learns from."})
    max_steps: int = field(default=60, metadata={"help": "Optimizer steps of PPO."})
    evaluation_rows: int = field(default=256, metadata={"help": "Rows of each stage's evaluation."})


ARGUMENTS = (VisionArguments,)


def main(args: VisionArguments) -> None:
    """A stage whose folder is complete is not run again: remove it to repeat it."""
    out = Path(args.output_dir)
    stages = {
        "base/processor_config.json": make_base,
        "sft/evaluation.json": fine_tune,
        "reward/evaluation.json": train_reward_model,
        "ppo/evaluation.json": train_policy,
    }
    for number, (last_file, stage) in enumerate(stages.items()):
        if (out / last_file).exists():
            print(f"== {out / last_file} is there: nothing to do.")
            continue
        print(f"== making {out / last_file}")
        set_seed(args.seed)
        stage(args, out, random.Random(1000 * args.seed + number))


def make_base(args: VisionArguments, out: Path, rng: random.Random) -> None:
    """A base that has read captions of which half is guessed, and true ones where facts stand before the question."""
    words = [*COLOURS, *NUMBERS, *f"{QUESTION} facts : squares , .".split()]
    make = tiny_qwen2_5_vl if args.model == "qwen2_5_vl" else tiny_llava
    model, processor = make(list(dict.fromkeys(word for word in words if word != ":")), hidden_size=64)
    learn_captions(model, processor, [example(rng, truth=0.5) for _ in range(args.captions)])
    model.save_pretrained(out / "base")
    processor.save_pretrained(out / "base")


def fine_tune(args: VisionArguments, out: Path, rng: random.Random) -> None:
    """SFT on demonstrations of which a third is guessed."""
    model, processor = load_base(out)
    train, test = (rows_of(rng, size, demonstration) for size in (args.demonstrations, args.evaluation_rows))
    trainer = CompletionTrainer(
        model=model,
        args=CompletionConfig(
            str(out / "sft"), seed=args.seed, max_length=None, num_train_epochs=2, learning_rate=2e-3, **SETTINGS
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=language_layers(model)),
    )
    trainer.train()
    trainer.save_model()
    evaluation = evaluate_completions(trainer)
    print(completions_table(evaluation))
    save_evaluation(evaluation, out / "sft")


def train_reward_model(args: VisionArguments, out: Path, rng: random.Random) -> None:
    """The reward model sees the picture and reads the facts, and learns which of two captions has more true in it."""
    model, (_, processor) = load_image_classifier(str(out / "base")), load_base(out)
    train, test = (rows_of(rng, size, choice) for size in (args.pairs, args.evaluation_rows))
    trainer = PreferenceTrainer(
        model=model,
        args=PreferenceConfig(str(out / "reward"), seed=args.seed, num_train_epochs=2, learning_rate=3e-3, **SETTINGS),
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        peft_config=LoraConfig(
            task_type="SEQ_CLS", r=16, target_modules=language_layers(model), modules_to_save=["score"]
        ),
    )
    trainer.train()
    trainer.save_model()
    evaluation = evaluate_pairs(trainer)
    print(pairs_table(evaluation))
    save_evaluation(evaluation, out / "reward")


def train_policy(args: VisionArguments, out: Path, rng: random.Random) -> None:
    """PPO: the policy sees the picture, the reward model the facts too; the truth judges, with weight 0."""
    base, processor = load_base(out)
    train, test = (rows_of(rng, size, prompt) for size in (512, args.evaluation_rows // 2))
    trainer = PPOTrainer(
        model=load_policy(base, out / "sft"),
        reward_funcs=[str(out / "reward"), true_statements],
        args=PPOConfig(
            str(out / "ppo"),
            seed=args.seed,
            reward_weights=[1.0, 0.0],
            steps_per_generation=2,
            num_iterations=2,
            max_steps=args.max_steps,
            max_completion_length=8,
            learning_rate=2e-3,
            kl_coef=0.05,
            critic_init="reward",
            missing_eos_penalty=4.0,
            **SETTINGS,
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    evaluation = evaluate_policy(trainer, test, gold="true_statements", rows=args.evaluation_rows)
    print(write_evaluation(evaluation, str(out / "ppo")))


def load_base(out: Path):
    return load_image_model(str(out / "base")), load_processor(str(out / "base"))


def picture(rng: random.Random) -> tuple[Image.Image, str, str]:
    """Draw one to three squares of one colour at random places; their colour and number in words."""
    colour, number = rng.choice(COLOURS), rng.randrange(len(NUMBERS))
    image = Image.new("RGB", (28, 28), "white")
    pen = ImageDraw.Draw(image)
    for place in rng.sample(range(4), number + 1):  # in patches of their own
        left, top = 14 * (place % 2) + rng.randrange(3), 14 * (place // 2) + rng.randrange(3)
        pen.rectangle((left, top, left + 9, top + 9), fill=colour)
    return image, colour, NUMBERS[number]


def example(rng: random.Random, truth: float) -> dict:
    """A picture, and a caption whose words are looked up with probability `truth` and guessed else."""
    image, colour, number = picture(rng)
    return {"images": [image], "colour": colour, "number": number, "caption": caption(rng, colour, number, truth)}


def caption(rng: random.Random, colour: str, number: str, truth: float) -> str:
    pairs = ((number, NUMBERS), (colour, COLOURS))
    said = [word if rng.random() < truth else rng.choice(words) for word, words in pairs]
    return f"{said[0]} squares , {said[1]} ."


def ask(before: str = "") -> list[dict]:
    return [{"role": "user", "content": f"{before}{QUESTION}"}]


def facts(row: dict) -> str:
    return f"facts : {row['number']} {row['colour']} . "


def demonstration(rng: random.Random) -> dict:
    row = example(rng, truth=0.67)
    answer = [{"role": "assistant", "content": row["caption"]}]
    return {"prompt": ask(), "completion": answer, "images": row["images"]}


def choice(rng: random.Random) -> dict:
    """Two captions of one picture, the one with more true in it first."""
    while True:
        row = example(rng, truth=0.5)
        said = [row["caption"], caption(rng, row["colour"], row["number"], truth=0.5)]
        answers = [[{"role": "assistant", "content": text}] for text in said]
        gold = true_statements(answers, [row["colour"]] * 2, [row["number"]] * 2)
        if gold[0] != gold[1]:
            chosen, rejected = answers if gold[0] > gold[1] else answers[::-1]
            pair = {"chosen": chosen, "rejected": rejected, "images": row["images"]}
            return {"prompt": ask(), "reward_prompt": ask(facts(row)), **pair}


def prompt(rng: random.Random) -> dict:
    row = example(rng, truth=1.0)
    del row["caption"]
    return {"prompt": ask(), "reward_prompt": ask(facts(row)), **row}


def rows_of(rng: random.Random, size: int, make) -> Dataset:
    return Dataset.from_list([make(rng) for _ in range(size)])


def true_statements(completions, colour, number, **kwargs):
    """True minus false statements about the picture: from -2 to 2."""
    words = [answer[0]["content"].split() for answer in completions]
    return [
        float(sum(1 if word in truth else -1 for word in set(said) & {*COLOURS, *NUMBERS}))
        for said, *truth in zip(words, colour, number, strict=True)
    ]


def learn_captions(model, processor, examples: list[dict], batch_size: int = 32) -> None:
    """Train all weights on captions; every second batch has facts before the question, and captions that are true."""
    optimizer, reader = torch.optim.AdamW(model.parameters(), lr=1e-3), ImageReader(processor, model)
    model.train()
    for number, start in enumerate(range(0, len(examples) - batch_size + 1, batch_size)):
        batch = examples[start : start + batch_size]
        known = number % 2 == 1
        asked = [{"prompt": ask(facts(row) if known else ""), "images": row["images"]} for row in batch]
        prompts = processor.apply_chat_template(
            list(map(chat_with_images, asked)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        said = [f"{row['number']} squares , {row['colour']} ." if known else row["caption"] for row in batch]
        texts = [f"{text} {processor.tokenizer.eos_token}" for text in said]
        answers = processor.tokenizer(texts, return_tensors="pt")["input_ids"]
        ids = torch.cat([prompts["input_ids"], answers], dim=1)
        labels = torch.cat([torch.full_like(prompts["input_ids"], -100), answers], dim=1)
        pictures = {name: values for name, values in prompts.items() if name in reader.fields}
        model(input_ids=ids, labels=labels, **reader.network_fields(ids, [pictures])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
