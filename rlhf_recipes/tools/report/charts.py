"""The charts of a report: which metrics are drawn together, and how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """Metrics in one plot.

    Attributes:
        name: A word, also the PNG's name.
        title: What is drawn.
        keys: Labels by the metric's name; a name that ends in `*` stands for all that begin so.
        caption: How to read it.
    """

    name: str
    title: str
    keys: Mapping[str, str]
    caption: str


_RATE = Chart("learning-rate", "Learning rate", {"learning_rate": "learning rate"}, "As the schedule made it.")
_NORM = Chart("grad-norm", "Gradient norm", {"grad_norm": "gradient norm"}, "Before clipping. Spikes are bad rows.")
CHARTS: dict[str, tuple[Chart, ...]] = {
    "sft": (
        Chart("loss", "Loss", {"loss": "training", "eval_loss": "held-out"}, "Nats per token, should fall."),
        Chart(
            "accuracy",
            "Token accuracy",
            {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held-out"},
            "Share of the tokens that the model would have chosen.",
        ),
        Chart("entropy", "Entropy", {"entropy": "training", "eval_entropy": "held-out"}, "Nats per token."),
        _NORM,
        _RATE,
    ),
    "reward": (
        Chart("loss", "Loss", {"loss": "training", "eval_loss": "held-out"}, "0.693 is a coin for pairs."),
        Chart(
            "accuracy",
            "Pair accuracy",
            {"accuracy": "training", "eval_accuracy": "held-out"},
            "0.5 is a coin. Far better in training than held out: it learned the pairs by heart.",
        ),
        Chart("margin", "Margin", {"margin": "training", "eval_margin": "held-out"}, "Chosen minus rejected score."),
        Chart(
            "scores",
            "Scores",
            {"mean_reward": "mean", "min_reward": "lowest", "max_reward": "highest"},
            "A mean that drifts away costs PPO nothing, but a spread that grows does.",
        ),
        _NORM,
        _RATE,
    ),
    "ppo": (
        Chart(
            "reward",
            "Reward and gold score",
            {"reward": "reward", "rewards/*": ""},
            "Of the rollouts. A gold score that falls while the reward rises is reward hacking.",
        ),
        Chart(
            "held-out",
            "Held-out reward and gold score",
            {"eval_policy/reward_score": "reward", "eval_policy/gold_score": "gold"},
            "On prompts that PPO does not train on.",
        ),
        Chart(
            "win-rate",
            "Win rate against the reference",
            {
                "eval_win_rate": "win rate",
                "eval_win_rate_low": "low",
                "eval_win_rate_high": "high",
                "eval_length_controlled_win_rate": "at equal length",
            },
            "Held-out, with the ends of the 95 % interval. 0.5 is no better than the reference.",
        ),
        Chart(
            "diversity",
            "Held-out diversity",
            {
                "eval_policy/distinct_2": "distinct 2-grams",
                "eval_policy/self_bleu": "self-BLEU",
                "eval_policy/top_ngram": "with the top 4-gram",
            },
            "One phrase that takes over: distinct 2-grams fall, the others rise.",
        ),
        Chart("kl", "KL to the reference", {"kl": "KL"}, "Nats per completion."),
        Chart(
            "length",
            "Length",
            {"completions/mean_length": "mean", "completions/max_length": "longest"},
            "Tokens. Steady growth may be what the reward model likes, not what people like.",
        ),
        Chart("truncated", "Cut off", {"completions/clipped_ratio": "share"}, "Completions without an end."),
        Chart("entropy", "Entropy", {"entropy": "entropy"}, "Nats per token. A collapse ends the exploration."),
        Chart(
            "critic",
            "Critic's explained variance",
            {"critic/explained_variance": "explained variance"},
            "1 is perfect, 0 knows nothing, below 0 does harm.",
        ),
        Chart(
            "clip",
            "Clip fractions",
            {"ppo/clip_fraction": "policy", "critic/clip_fraction": "critic"},
            "Share of the tokens where the update was held back.",
        ),
        Chart("approx-kl", "KL of the updates", {"ppo/approx_kl": "KL"}, "Between the policy before and after."),
        Chart(
            "losses",
            "Losses",
            {"ppo/policy_loss": "policy", "critic/value_loss": "critic"},
            "The critic's should fall; the policy's says little.",
        ),
        Chart("kl-coef", "Weight of the KL penalty", {"kl_coef": "weight"}, "Fixed, or as the controller sets it."),
        Chart(
            "role-norms",
            "Gradient norm per role",
            {"health/grad_norm_policy": "policy", "health/grad_norm_critic": "critic"},
            "Where the gradient goes.",
        ),
        Chart(
            "seconds",
            "Seconds per step",
            {"health/seconds_generate": "generate", "health/seconds_score": "score", "health/seconds_train": "train"},
            "Where the time goes.",
        ),
        Chart("speed", "Tokens per second", {"health/tokens_per_second": "tokens"}, "Of the whole training."),
        Chart("memory", "Peak memory, GB", {"health/peak_memory_gb": "GB"}, "Of the accelerator, or the process."),
        Chart("spread", "Spread of the reward", {"reward_std": "std"}, "At 0 there is nothing left to learn from."),
        _NORM,
        _RATE,
    ),
}
