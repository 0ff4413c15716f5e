"""Arguments of the stages that train on rewards, beside the trainer's: what they start from, how they are judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class PolicyArguments:
    """What a training on rewards starts from, and how it is judged."""

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
    gate_adapter: str | None = field(
        default=None,
        metadata={"help": "Safety model that gates `reward_adapter`: its score counts where a completion is unsafe."},
    )
    gate_threshold: float | None = field(
        default=None,
        metadata={"help": "With `gate_adapter`: sigmoid of its score below which a completion is unsafe, in (0, 1)."},
    )
    gate_column: str | None = field(
        default=None,
        metadata={"help": "With `gate_adapter`: column of the rows, true where a prompt asks for unsafe completions."},
    )
    reward_url: str | None = field(
        default=None, metadata={"help": "Address of a reward server, such as recipes/serve_reward.py."}
    )
    gold_score: str | None = field(
        default=None,
        metadata={"help": "Judge beside the reward, not in it: gold.json of the embedded task, or a reward model."},
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

    def __post_init__(self) -> None:
        """Refuse a gate that lacks a part."""
        if self.gate_adapter is None:
            if given := [name for name in ("gate_threshold", "gate_column") if getattr(self, name) is not None]:
                raise ValueError(f"`{given[0]}` is of a gate, but there is none: set `gate_adapter`, or remove it.")
            return
        if self.reward_adapter is None:
            raise ValueError(
                "`gate_adapter` gates `reward_adapter`, which is not set: a gate chooses between two rewards. Set it, "
                "or give the one reward as `reward_adapter`."
            )
        if self.gate_threshold is None or not 0.0 < self.gate_threshold < 1.0:
            raise ValueError(
                "`gate_adapter` needs `gate_threshold`, a probability between 0 and 1, both excluded, got "
                f"{self.gate_threshold}: below it the score of safety counts. Llama 2's is 0.15."
            )

    def rewards(self) -> list[Any]:
        """List the rewards of `reward_adapter` (gated or not), `reward_adapters` and `reward_url`, for the trainers.

        Example:
            >>> PolicyArguments(reward_adapter="outputs/quickstart/reward").rewards()
            ['outputs/quickstart/reward']
        """
        # Slow to import: `--help` does without
        from rlhf_recipes.rewards import EnsembleReward, GatedReward, RemoteReward

        rewards: list[Any] = [] if self.reward_adapter is None else [self.reward_adapter]
        if self.reward_adapter is not None and self.gate_adapter is not None and self.gate_threshold is not None:
            rewards = [GatedReward(self.reward_adapter, self.gate_adapter, self.gate_threshold, self.gate_column)]
        if self.reward_adapters is not None:
            rewards.append(EnsembleReward(self.reward_adapters, self.reward_ensemble, self.reward_ensemble_k))
        if self.reward_url is not None:
            rewards.append(RemoteReward(self.reward_url))
        return rewards

    def judge(self) -> Any:
        """Load the judge of `gold_score`: the gold score of the embedded task, or the path of a reward model.

        Example:
            >>> PolicyArguments(gold_score="outputs/judge").judge(), PolicyArguments().judge()
            ('outputs/judge', None)
        """
        from rlhf_recipes.data.synthetic import GoldScore

        if self.gold_score is not None and self.gold_score.endswith(".json"):
            return GoldScore.from_file(self.gold_score)
        return self.gold_score


@dataclass
class PPOArguments(PolicyArguments):
    """What PPO starts from, and how it is judged."""

    policy_adapter: str | None = field(
        default=None,
        metadata={"help": "Adapter to go on from, of an earlier PPO run, while `sft_adapter` stays the reference."},
    )
    critic_model: str | None = field(
        default=None,
        metadata={
            "help": "With `critic: model`: the critic to start from, a sequence classifier. Else the folder `critic` "
            "of an earlier run, whose critic goes on."
        },
    )
    ptx_dataset: str | None = field(
        default=None, metadata={"help": "With `ptx_coef`: pretraining texts, rows with a column `text`."}
    )

    def __post_init__(self) -> None:
        """Refuse a start without its reference.

        Raises:
            ValueError: If `policy_adapter` is given without `sft_adapter`.
        """
        super().__post_init__()
        if self.policy_adapter is not None and self.sft_adapter is None:
            raise ValueError(
                "`policy_adapter` goes on from an earlier run, and `sft_adapter`, which is the reference, is missing. "
                "Give both."
            )


@dataclass
class GroupArguments(PolicyArguments):
    """What GRPO or RLOO starts from, how it is judged, and which of the two it is."""

    algorithm: Literal["grpo", "rloo"] = field(
        default="grpo", metadata={"help": "TRL's trainer: grpo or rloo. It also decides which other fields there are."}
    )
