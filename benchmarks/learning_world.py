"""What both sides of the learning benchmark share: settings, model files, the reward rule, weights kept along a run.

It runs in two environments, so nothing here needs TRL; only `make_world` needs this project.
"""

import json
import random
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

WORLD_SEED = 0


@dataclass(frozen=True)
class Settings:
    """What both trainers are set to. Completions end at the end token or after `completion_length` tokens."""

    updates: int = 40  # rollouts, each followed by `epochs` x `minibatches` optimizer steps
    batch: int = 64  # completions in a rollout
    minibatches: int = 4
    epochs: int = 4
    completion_length: int = 24
    learning_rate: float = 1e-4  # of policy and value model, constant
    score_scale: float = 10.0  # the score is this times the share of praise
    kl_coef: float = 0.05
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    vf_coef: float = 0.1
    whiten_rewards: bool = False
    temperature: float = 1.0
    adam_epsilon: float = 1e-8
    evaluate_every: int = 5  # updates
    held_out: int = 512  # prompts
    hidden_size: int = 128
    layers: int = 2
    reviews: int = 6000  # texts that the policy is pretrained on

    def __post_init__(self):
        """Refuse what does not divide evenly, where the two sides would do different things."""
        if self.batch % self.minibatches:
            raise ValueError(f"`minibatches` ({self.minibatches}) must divide `batch` ({self.batch}).")
        if self.updates % self.evaluate_every:
            raise ValueError(f"`evaluate_every` ({self.evaluate_every}) must divide `updates` ({self.updates}).")

    @property
    def minibatch(self):
        return self.batch // self.minibatches

    @property
    def steps_per_update(self):
        return self.epochs * self.minibatches


def read_settings(folder):
    return Settings(**json.loads((Path(folder) / "settings.json").read_text()))


def make_world(folder: Path, settings: Settings) -> None:
    """Write policy, value model, prompts, reward rule and settings, or check that what is there fits the settings."""
    if (folder / "settings.json").exists():
        there = read_settings(folder)
        changed = [one.name for one in fields(there) if getattr(there, one.name) != getattr(settings, one.name)]
        if changed:
            raise ValueError(f"{folder} holds runs with other {', '.join(changed)}. Give another `--output`.")
        return
    from rlhf_recipes.data.synthetic import grammar
    from rlhf_recipes.models.tiny import tiny_llama, train_language_model, word_tokenizer

    rng = random.Random(WORLD_SEED)
    torch.manual_seed(WORLD_SEED)
    train, test = (_some_longer(prompts, rng) for prompts in grammar.split_prompts(0.25, rng))
    tokenizer = word_tokenizer(grammar.vocabulary())
    policy = tiny_llama(tokenizer, settings.hidden_size, settings.layers, max_position_embeddings=128)
    texts = [f"{prompt} {grammar.write_review(prompt, grammar.Style(), rng)}" for prompt in _cycle(train, settings)]
    train_language_model(policy, tokenizer, texts, seed=WORLD_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("policy", "value"):
        tokenizer.save_pretrained(folder / name)
    policy.save_pretrained(folder / "policy")
    value = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1, dtype=torch.float32)
    nn.init.zeros_(value.score.weight)
    value.save_pretrained(folder / "value")

    words = sorted(grammar.ADJECTIVES[grammar.POSITIVE] + grammar.VERBS[grammar.POSITIVE])
    reward = {"praise": words, "token_ids": tokenizer.convert_tokens_to_ids(words)}
    (folder / "reward.json").write_text(json.dumps(reward))
    for name, prompts in (("train", train), ("test", test[: settings.held_out])):
        padded = tokenizer(prompts, padding=True, padding_side="left").input_ids
        rows = [{"prompt": prompt, "input_ids": ids} for prompt, ids in zip(prompts, padded, strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))


def _some_longer(prompts, rng):
    """Name a second place in every other prompt, so that the others need padding."""
    from rlhf_recipes.data.synthetic.grammar import PLACES

    return [
        prompt.replace(" :", f" and the {rng.choice(PLACES)} :") if index % 2 else prompt
        for index, prompt in enumerate(prompts)
    ]


def _cycle(prompts, settings):
    return (prompts[index % len(prompts)] for index in range(settings.reviews))


def read_prompts(folder, name):
    """Rows with `prompt`, a text, and `input_ids`, padded on the left to one length."""
    return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]


def read_praise(folder) -> set[int]:
    return set(json.loads((Path(folder) / "reward.json").read_text())["token_ids"])


def load_policy(folder):
    return AutoModelForCausalLM.from_pretrained(Path(folder) / "policy", dtype=torch.float32)


def load_value(folder):
    return AutoModelForSequenceClassification.from_pretrained(
        Path(folder) / "value", num_labels=1, dtype=torch.float32
    )


def load_tokenizer(folder):
    return AutoTokenizer.from_pretrained(Path(folder) / "policy", padding_side="left")


def praise_share(token_ids: list[int], praise: set[int]) -> float:
    """The reward rule: the share of a completion's tokens, its end token included, that are words of praise."""
    return sum(token in praise for token in token_ids) / max(len(token_ids), 1)


class PraiseModel(nn.Module):
    """The reward rule as the reward model that TRL 1.12 asks for: a backbone, and a `score` of its last layer.

    The "hidden state" at a position is the share up to it, so that the one at the last token is the reward.
    """

    base_model_prefix = "backbone"

    def __init__(self, praise: Iterable[int], vocabulary: int, prompt_length: int, scale: float):
        super().__init__()
        self.scale = scale
        self.backbone = _RunningShare(praise, vocabulary, prompt_length)

    def score(self, hidden_states):
        return self.scale * hidden_states


class _RunningShare(nn.Module):
    def __init__(self, praise, vocabulary, prompt_length):
        super().__init__()
        self.prompt_length = prompt_length
        self.register_buffer("praised", torch.zeros(vocabulary).index_fill(0, torch.tensor(sorted(praise)), 1.0))

    def forward(self, input_ids, attention_mask, **kwargs):
        counts = attention_mask.float()
        counts[:, : self.prompt_length] = 0.0
        share = (self.praised[input_ids] * counts).cumsum(1) / counts.cumsum(1).clamp(min=1.0)
        return SimpleNamespace(hidden_states=[share.unsqueeze(-1)])


class KeepWeights(TrainerCallback):
    """Write a policy's weights every few updates, and the length of the run at its end."""

    def __init__(self, policy: nn.Module, run: Path, settings: Settings, steps_per_update: int):
        self.policy, self.run, self.settings = policy, run, settings
        self.steps_per_update = steps_per_update  # of the trainer's `global_step`
        self.names = [name for name, _ in policy.named_parameters()]  # before a trainer adds modules of its own
        self.started = time.perf_counter()
        run.mkdir(parents=True, exist_ok=True)

    def on_train_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        update, rest = divmod(state.global_step, self.steps_per_update)
        if rest == 0 and update % self.settings.evaluate_every == 0:
            weights = dict(self.policy.named_parameters())
            kept = {name: weights[name].detach().clone() for name in self.names}
            save_file(kept, self.run / f"update_{update:04d}.safetensors")

    def finish(self, optimizer: torch.optim.Optimizer, **facts):
        """Write `run.json`, by which the benchmark knows that a run is whole."""
        steps = max(int(state["step"]) for state in optimizer.state.values())
        expected = self.settings.updates * self.settings.steps_per_update
        assert steps == expected, f"{steps} optimizer steps were made, {expected} expected"
        facts |= {"optimizer_steps": steps, "seconds": round(time.perf_counter() - self.started, 1)}
        (self.run / "run.json").write_text(json.dumps(facts))
