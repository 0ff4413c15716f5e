"""Run by tests of evaluations, also on two processes: what is logged at several batch sizes."""

import json
import sys

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig

from rlhf_recipes.models import load_causal_lm, load_sequence_classifier
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer
from rlhf_recipes.supervised import CompletionTrainer

NOUNS = "film story actor ending scene plot music film story".split()
TEXTS = [" very good", " bad and so dark", " not bad", " so so"]
# Nine rows: the last batch is not full at most sizes. The numbers of completions and of pairs differ.
PAIRS = [
    {"prompt": f"the {noun} was", "chosen": TEXTS[n % 4], "rejected": TEXTS[(n + 1 + n // 4) % 4], "margin": n / 4}
    for n, noun in enumerate(NOUNS)
]
GROUPS = [
    {"prompt": row["prompt"], "completions": TEXTS[: 2 + n % 3], "ranks": [1, 1 + (n % 2), 3, 2][: 2 + n % 3]}
    for n, row in enumerate(PAIRS)
]
STEPS = [
    {"prompt": row["prompt"], "completions": row["completions"], "ratings": [1.0, -1.0, 0.5, 0.0][: 2 + n % 3]}
    for n, row in enumerate(GROUPS)
]
KINDS = {
    "plain": (PAIRS, {"center_rewards_coefficient": 0.1}),
    "labels": ([{**row, "label": (1.0, 0.5, 0.2)[n % 3]} for n, row in enumerate(PAIRS)], {}),
    "ranking": (GROUPS, {"objective": "ranking", "ties": "drop"}),
    "token": (STEPS, {"objective": "token"}),
}


def make(kind, batch_size, model_path, folder):
    """A trainer that evaluates the rows of a kind, the same one each time."""
    rows, fields = KINDS[kind]
    set_seed(0)
    trainer = PreferenceTrainer(
        model=load_sequence_classifier(model_path),
        args=PreferenceConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            per_device_eval_batch_size=batch_size,
            **fields,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.05
    return trainer


COMPLETIONS = [{"prompt": row["prompt"], "completion": TEXTS[n % 4] * (1 + n % 3)} for n, row in enumerate(PAIRS)]


def make_sft(batch_size, model_path, folder):
    """A trainer that evaluates completions of different lengths."""
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    options |= {"per_device_eval_batch_size": batch_size, "disable_tqdm": True}
    return CompletionTrainer(
        model=load_causal_lm(model_path),
        args=SFTConfig(output_dir=str(folder), **options),
        train_dataset=Dataset.from_list(COMPLETIONS),
        eval_dataset=Dataset.from_list(COMPLETIONS),
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )


def numbers(trainer):
    """What an evaluation logs, without times."""
    logged = trainer.evaluate()
    names = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "entropy", "mean_token_accuracy")
    return {name: logged[f"eval_{name}"] for name in names if f"eval_{name}" in logged}


if __name__ == "__main__":
    model_path, folder = sys.argv[1:]
    found = {}
    for kind in ("sft", *KINDS):
        trainer = make_sft(1, model_path, folder) if kind == "sft" else make(kind, 1, model_path, folder)
        found[kind] = {}
        for size in (1, 2, 4):
            trainer.args.per_device_eval_batch_size = size
            found[kind][str(size)] = numbers(trainer)
    if PartialState().is_main_process:
        found["processes"] = PartialState().num_processes
        with open(f"{folder}/evaluations.json", "w") as file:
            json.dump(found, file)
