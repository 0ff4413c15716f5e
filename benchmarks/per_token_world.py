"""What all sides of the learning-per-token benchmark share: a task's files, the reward model's score, kept weights.

It runs in two environments, so only `make_task` needs this project.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
ROLLOUT = 128  # completions
MINIBATCHES, EPOCHS = 8, 2  # the optimizer steps of a rollout are their product


@dataclass(frozen=True)
class Task:
    """Where a recipe's outputs lie, and what its PPO is set to."""

    outputs: str
    rows: tuple[str, str, str]  # data set, training split, test split
    prompt_words: int | None
    judge: str  # below `outputs`: an adapter, or the definition of the gold score
    base: str
    completion_length: int
    missing_eos_penalty: float | None
    nats: tuple[float, ...]  # KL within which gold scores are compared
    rollouts: int = 40
    kl_coef: float = 0.1


TASKS = {
    "quickstart": Task(
        "outputs/quickstart",
        ("world", "prompts_train", "prompts_test"),
        None,
        "world/gold.json",
        "world/base",
        32,
        None,
        (2, 3, 4),
    ),
    "movie_sentiment": Task(
        "outputs/movie_sentiment_cpu",
        ("reviews/texts", "train", "test"),
        8,
        "judge",
        "base",
        48,
        1.0,
        (4, 8, 12, 16),
    ),
}


def make_task(folder: Path, name: str, outputs: Path) -> Path:
    """Collect what the trainers need, unless it is there: base, adapters, prompts, settings.

    The base is the recipe's 4-bit one with its weights written out in float32, so that every trainer computes with the
    same numbers.
    """
    from rlhf_recipes.data import to_prompts
    from rlhf_recipes.data.loading import load_rows
    from rlhf_recipes.models import load_causal_lm, load_tokenizer

    task, place = TASKS[name], folder / name
    if (place / "task.json").exists():
        return place
    base = load_causal_lm(str(outputs / task.base), quantization_config=FOUR_BIT).dequantize()
    base.save_pretrained(place / "base")
    tokenizer = load_tokenizer(str(outputs / task.base))
    tokenizer.save_pretrained(place / "base")
    adapters = ["sft", "reward"] + ["judge"] * (not task.judge.endswith(".json"))
    for adapter in adapters:
        shutil.copytree(outputs / adapter, place / adapter, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin"))
        config = place / adapter / "adapter_config.json"
        written = json.loads(config.read_text()) | {"base_model_name_or_path": str(place / "base")}
        config.write_text(json.dumps(written))
    if "judge" not in adapters:
        shutil.copy(outputs / task.judge, place / "gold.json")
    data, *splits = task.rows
    for split, out in zip(splits, ("train", "test"), strict=True):
        prompts = to_prompts(load_rows(str(outputs / data), split=split), prompt_words=task.prompt_words)["prompt"]
        chosen = [prompt for prompt in dict.fromkeys(prompts) if tokenizer(prompt)["input_ids"]][:8192]
        (place / f"{out}.json").write_text(json.dumps(chosen))
    (place / "task.json").write_text(json.dumps(asdict(task)))
    return place


def read_task(place: Path) -> Task:
    return Task(**json.loads((place / "task.json").read_text()))


def load_tokenizer_of(place: Path):
    return AutoTokenizer.from_pretrained(place / "base", padding_side="left")


def load_writer(place: Path, trainable: bool = False) -> PeftModel:
    """The SFT model: the policy at its start, and the reference."""
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, place / "sft", is_trainable=trainable)


def load_scorer(place: Path, adapter: str = "reward", trainable: bool = False) -> PeftModel:
    """The reward model or the judge."""
    base = AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=1, dtype=torch.float32)
    return PeftModel.from_pretrained(base, place / adapter, is_trainable=trainable).eval()


@torch.no_grad()
def scores(scorer: PeftModel, prompt_ids: list[list[int]], completion_ids: list[list[int]], pad: int) -> list[float]:
    """What a reward model gives to texts, read at their last token."""
    found = []
    for start in range(0, len(prompt_ids), 64):
        rows = [
            torch.tensor(prompt + completion)
            for prompt, completion in zip(
                prompt_ids[start : start + 64], completion_ids[start : start + 64], strict=True
            )
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.size(1)) < lengths[:, None]).long()
        found += scorer(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return found


class Keep(TrainerCallback):
    """Write a policy's LoRA weights every few rollouts, with the tokens and the processor time until then."""

    def __init__(self, policy: PeftModel, run: Path, steps_per_rollout: int, every: int):
        self.run, self.steps_per_rollout, self.every = run, steps_per_rollout, every
        self.weights = {name: one for name, one in policy.named_parameters() if ".default." in name}
        self.tokens, self.rows, self.started = 0, [], time.process_time()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        rollout, rest = divmod(state.global_step, self.steps_per_rollout)
        if rest == 0 and rollout % self.every == 0:
            kept = {name: one.detach().clone() for name, one in self.weights.items()}
            save_file(kept, self.run / f"rollout_{rollout:04d}.safetensors")
            seconds = time.process_time() - self.started
            self.rows.append({"rollout": rollout, "tokens": self.tokens, "seconds": round(seconds, 1)})

    def finish(self, **facts):
        """Write `run.json`, by which the benchmark knows that a run is whole."""
        (self.run / "run.json").write_text(json.dumps(facts | {"rows": self.rows}))
