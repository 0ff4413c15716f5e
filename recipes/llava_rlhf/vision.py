"""PPO with pictures: a small LLaVA that says of which colour and how many squares are, paid for what is true of them.

python recipes/llava_rlhf/vision.py --output_dir outputs/llava_rlhf/vision
"""

import random
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image, ImageDraw

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.config import parse_stage
from rlhf_recipes.evaluation import evaluate_policy, write_evaluation
from rlhf_recipes.models.images import chat_with_images, language_layers
from rlhf_recipes.models.tiny_vision import tiny_llava

COLOURS, NUMBERS = "red green blue black".split(), "one two three".split()
QUESTION = [{"role": "user", "content": "what is there ?"}]


@dataclass
class VisionArguments:
    """Sizes and lengths of the run."""

    output_dir: str = field(default="outputs/llava_rlhf/vision", metadata={"help": "Folder of the policy."})
    seed: int = field(default=0, metadata={"help": "Seed of pictures, model and training."})
    captions: int = field(
        default=16_000, metadata={"help": "Captioned pictures that the base learns from, each once."}
    )
    max_steps: int = field(default=60, metadata={"help": "Optimizer steps of PPO."})
    evaluation_rows: int = field(default=256, metadata={"help": "Completions of either side in the evaluation."})


ARGUMENTS = (VisionArguments,)


def main(args: VisionArguments) -> None:
    # 1. A base that has read captions of which two thirds are true.
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    model, processor = tiny_llava([*COLOURS, *NUMBERS, *"what is there ? squares , .".split()], hidden_size=64)
    learn_captions(model, processor, [picture(rng) for _ in range(args.captions)], rng)

    # 2. PPO: LoRA on the language part; policy, reference and critic see the picture, and the reward knows the truth.
    train, test = (Dataset.from_list([row(*picture(rng)) for _ in range(number)]) for number in (512, 128))
    trainer = PPOTrainer(
        model=model,
        reward_funcs=[true_statements],
        args=PPOConfig(
            args.output_dir,
            seed=args.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=32,
            steps_per_generation=2,
            num_iterations=2,
            max_steps=args.max_steps,
            max_completion_length=8,
            learning_rate=2e-3,
            kl_coef=0.02,
            critic_init="policy",
            per_device_eval_batch_size=64,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=language_layers(model)),
    )
    trainer.train()
    trainer.save_model()

    # 3. Pictures that PPO has not seen.
    evaluation = evaluate_policy(trainer, test, gold="true_statements", rows=args.evaluation_rows)
    print(write_evaluation(evaluation, args.output_dir))


def picture(rng: random.Random) -> tuple[Image.Image, str, str]:
    """Draw one to three squares of one colour at random places; their colour and number in words."""
    colour, number = rng.choice(COLOURS), rng.randrange(len(NUMBERS))
    image = Image.new("RGB", (28, 28), "white")
    pen = ImageDraw.Draw(image)
    for place in rng.sample(range(4), number + 1):  # in patches of their own
        left, top = 14 * (place % 2) + rng.randrange(3), 14 * (place // 2) + rng.randrange(3)
        pen.rectangle((left, top, left + 9, top + 9), fill=colour)
    return image, colour, NUMBERS[number]


def row(image: Image.Image, colour: str, number: str) -> dict:
    return {"prompt": QUESTION, "images": [image], "colour": colour, "number": number}


def true_statements(completions, colour, number, **kwargs):
    """True minus false statements about the picture: from -2 to 2."""
    words = [answer[0]["content"].split() for answer in completions]
    return [
        float(sum(1 if word in truth else -1 for word in set(said) & {*COLOURS, *NUMBERS}))
        for said, *truth in zip(words, colour, number, strict=True)
    ]


def learn_captions(model, processor, pictures, rng: random.Random, batch_size: int = 32) -> None:
    """Train all weights on captions, whose words are true with probability 2/3."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for start in range(0, len(pictures) - batch_size + 1, batch_size):
        batch = pictures[start : start + batch_size]
        chats = [chat_with_images(row(*each)) for each in batch]
        prompts = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        said = [
            [word if rng.random() < 2 / 3 else rng.choice(words) for word, words in ((n, NUMBERS), (c, COLOURS))]
            for _, c, n in batch
        ]
        texts = [f"{number} squares , {colour} . {processor.tokenizer.eos_token}" for number, colour in said]
        answers = processor.tokenizer(texts, return_tensors="pt")["input_ids"]
        ids = torch.cat([prompts["input_ids"], answers], dim=1)
        labels = torch.cat([torch.full_like(prompts["input_ids"], -100), answers], dim=1)
        model(input_ids=ids, pixel_values=prompts["pixel_values"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
