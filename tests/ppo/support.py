"""What the tests of the PPO trainer share: completions that do not depend on chance, and what a run left behind."""

from collections import Counter

import pytest
import torch

from rlhf_recipes import PPOConfig
from rlhf_recipes.models.rows import Texts
from rlhf_recipes.rewards.record import COLUMN

EOS = 1  # of the tiny tokenizer
WORDS = range(6, 30)  # ids of plain words in it


def worker_config(folder, **fields):
    """Settings of a short training in a process of its own."""
    short = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return PPOConfig(folder, **short | fields)


def slow_but(values, *often):
    """Parameters of a test, of which the default suite tries only a few that are unlike each other."""
    return [value if value in often else pytest.param(value, marks=pytest.mark.slow) for value in values]


def answer(prompt, repeat=0, longest=8):
    """A made-up completion of a prompt: ragged, and some without an end token."""
    seed = sum((position + 1) * token for position, token in enumerate(prompt)) * 31 + repeat
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, longest + 1, (), generator=generator))
    tokens = torch.randint(WORDS.start, WORDS.stop, (length,), generator=generator).tolist()
    return [*tokens[:-1], EOS] if length < longest else tokens


def without_chance(trainer, make=answer):
    """Let a trainer "sample" completions that depend on nothing but the prompt and how often it came before."""

    def generate(prompt_ids, *args, **kwargs):
        seen = Counter()
        rows = []
        for prompt in map(tuple, prompt_ids):
            rows.append(make(prompt, seen[prompt]))
            seen[prompt] += 1
        return rows, None

    trainer._generate_single_turn = generate
    return trainer


def rollout(trainer, rows=8, prepare=lambda model: None):
    """One rollout of the trainer, in training mode and in the order of generation, as a later epoch finds it."""
    prepare(trainer.model.train())
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(rows)])
    trainer.kept_pass.keep(None)
    return batch


def rollout_and_record(trainer, rows=8, prepare=lambda model: None):
    """The same, and what the reward functions recorded of it."""
    records, calculate = [], trainer._calculate_rewards

    def recorded(inputs, *others):
        records.append(inputs[0][COLUMN])
        return calculate(inputs, *others)

    trainer._calculate_rewards = recorded
    batch = rollout(trainer, rows, prepare)
    trainer._calculate_rewards = calculate
    return batch, records[0]


def texts_of_ids(ids, prompt_length, mask=None):
    """Texts `(B, L)` without padding, of which the first tokens are prompts."""
    mask = torch.ones_like(ids) if mask is None else mask
    return Texts(
        prompt_ids=ids[:, :prompt_length],
        prompt_mask=mask[:, :prompt_length],
        completion_ids=ids[:, prompt_length:],
        completion_mask=mask[:, prompt_length:],
    )


def unpadded(batch, row):
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
    return prompt, completion


def trained(trainer):
    """A copy of all weights that are trained, by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
