"""Arguments of the PPO stage beside the trainer's: what it starts from, and how it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class PPOArguments:
    """What PPO starts from, and how it is judged."""

    sft_adapter: str | None = field(
        default=None, metadata={"help": "Adapter to start from, which is also the reference. null: the bare base."}
    )
    reward_adapter: str | None = field(
        default=None, metadata={"help": "Reward model: an adapter trained on the same base, or any classifier."}
    )
    reward_adapters: list[str] | None = field(
        default=None, metadata={"help": "Reward models of an ensemble: adapters trained on the same base."}
    )
    reward_ensemble: Literal["mean", "min", "mean_minus_std"] = field(
        default="mean", metadata={"help": "What makes one reward of the scores of `reward_adapters`."}
    )
    reward_ensemble_k: float = field(
        default=1.0, metadata={"help": "With `mean_minus_std`: how many standard deviations are taken off."}
    )
    reward_url: str | None = field(
        default=None, metadata={"help": "Address of a reward server, such as recipes/serve_reward.py."}
    )
    gold_score: str | None = field(
        default=None,
        metadata={"help": "Judge that PPO does not see: gold.json of the embedded task, or another reward model."},
    )
    critic_model: str | None = field(
        default=None, metadata={"help": "With `critic: model`: the critic to start from, a sequence classifier."}
    )
    ptx_dataset: str | None = field(
        default=None, metadata={"help": "With `ptx_coef`: pretraining texts, rows with a column `text`."}
    )
    prompt_words: int | None = field(
        default=None, metadata={"help": "Make prompts of the first words of `text` rows, this many."}
    )
    evaluation_rows: int = field(
        default=512, metadata={"help": "Completions of the policy, and of its reference, in the final evaluation."}
    )
    evaluation_steps: int | None = field(
        default=None, metadata={"help": "Evaluate the policy also while it trains, every this many steps."}
    )
    alarm: Literal["off", "warn", "lower_learning_rate", "raise_kl", "stop"] = field(
        default="warn", metadata={"help": "What to do when the policy games its reward."}
    )
    alarm_kl_budget: float | None = field(
        default=None, metadata={"help": "KL to the reference, in nats per completion, that the alarm allows."}
    )
