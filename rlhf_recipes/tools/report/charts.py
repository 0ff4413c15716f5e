"""The charts of a report: which metrics are drawn together, in which colours, on which axis, and how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_recipes.tools.pages.colours import CRITIC, GOLD, INK, KL, POLICY, REWARD


@dataclass(frozen=True)
class Line:
    """One metric in a chart.

    Attributes:
        key: Its name in the log.
        label: What the legend calls it.
        colour: Its colour where one run is drawn; of several, each has its own.
        style: How the line is drawn, as matplotlib writes it.
        ends: Names of the ends of its interval, if there is one.
        measured: What `evaluation.json` calls it, if the value at the end is there with its interval.
    """

    key: str
    label: str
    colour: str = INK
    style: str = "-"
    ends: tuple[str, str] | None = None
    measured: str = ""


@dataclass(frozen=True)
class Chart:
    """Metrics in one plot.

    Attributes:
        name: A word, also the PNG's name.
        title: What is drawn.
        unit: Of the vertical axis.
        lines: The metrics.
        caption: How to read it.
        shows: Values that the vertical axis holds in any case, because they mean something.
        span: The least height of the vertical axis, so that noise does not look like a trend.
        spread: A metric whose median is such a least height too, such as the standard deviation of what is drawn.
        levels: Horizontal lines, with what they mean.
        functions: True if every reward function has a line.
        folded: True if it is hidden until the reader asks for more.
    """

    name: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    caption: str
    shows: tuple[float, ...] = (0.0,)
    span: float = 0.0
    spread: str = ""
    levels: Mapping[float, str] = field(default_factory=dict)
    functions: bool = False
    folded: bool = False


_SHARE = (0.0, 1.0)


def _trained_and_held_out(key: str, colour: str) -> tuple[Line, Line]:
    return Line(key, "training", colour), Line(f"eval_{key}", "held-out", colour, "--")


_RATE = Chart(
    "learning-rate",
    "Learning rate",
    "learning rate",
    (Line("learning_rate", "learning rate"),),
    "As the schedule made it.",
    folded=True,
)
_NORM = Chart(
    "grad-norm",
    "Gradient norm",
    "norm",
    (Line("grad_norm", "gradient norm"),),
    "Before clipping. Spikes are bad rows.",
    span=1.0,
    folded=True,
)
_SFT = (
    Chart("loss", "Loss", "nats per token", _trained_and_held_out("loss", POLICY), "Should fall, then flatten."),
    Chart(
        "accuracy",
        "Token accuracy",
        "share of the tokens",
        _trained_and_held_out("mean_token_accuracy", POLICY),
        "Tokens that the model would have chosen too.",
        shows=_SHARE,
    ),
    Chart(
        "entropy",
        "Entropy",
        "nats per token",
        _trained_and_held_out("entropy", POLICY),
        "How undecided the model is about the next token.",
    ),
    _NORM,
    _RATE,
)
_REWARD = (
    Chart(
        "loss",
        "Loss",
        "nats per pair",
        _trained_and_held_out("loss", REWARD),
        "Should fall below the coin's, then flatten.",
        levels={0.6931: "a coin"},
    ),
    Chart(
        "accuracy",
        "Pair accuracy",
        "share of the pairs",
        (
            Line("accuracy", "training", REWARD),
            Line("eval_accuracy", "held-out [95 %]", REWARD, "--", measured="accuracy"),
        ),
        "Far better in training than held out: it learned the pairs by heart.",
        shows=_SHARE,
        levels={0.5: "a coin"},
    ),
    Chart(
        "margin",
        "Margin",
        "score",
        _trained_and_held_out("margin", REWARD),
        "Mean of chosen minus rejected score. Above 0; how far says little.",
        span=1.0,
    ),
    Chart(
        "scores",
        "Scores",
        "score",
        (
            Line("max_reward", "highest", REWARD, "--"),
            Line("mean_reward", "mean", REWARD),
            Line("min_reward", "lowest", REWARD, ":"),
        ),
        "A mean that drifts away costs PPO nothing, but a spread that grows does.",
        shows=(),
        span=1.0,
    ),
    _NORM,
    _RATE,
)
_PPO = (
    Chart(
        "reward",
        "Reward and gold score",
        "score",
        (Line("reward", "reward", REWARD),),
        "Means of the rollouts. A gold score that falls while the reward rises is reward hacking.",
        shows=(),
        span=1.0,
        spread="reward_std",
        functions=True,
    ),
    Chart(
        "kl",
        "KL to the reference",
        "nats per completion",
        (Line("kl", "KL", KL),),
        "How far the policy has moved: the price of the reward. At 0 it is the reference.",
        span=1.0,
    ),
    Chart(
        "held-out",
        "Held-out reward and gold score",
        "score",
        (
            Line("eval_policy/reward_score", "reward", REWARD),
            Line("eval_policy/gold_score", "gold", GOLD, "--"),
        ),
        "On prompts that PPO does not train on.",
        shows=(),
        span=1.0,
        spread="reward_std",
    ),
    Chart(
        "win-rate",
        "Held-out win rate",
        "share of the prompts",
        (
            Line("eval_win_rate", "win rate", POLICY, ends=("eval_win_rate_low", "eval_win_rate_high")),
            Line("eval_length_controlled_win_rate", "at equal length", POLICY, "--"),
        ),
        "Over the reference; the band is the 95 % interval.",
        shows=_SHARE,
        levels={0.5: "no better than the reference"},
    ),
    Chart(
        "diversity",
        "Held-out diversity",
        "share",
        (
            Line("eval_policy/distinct_2", "distinct 2-grams", POLICY),
            Line("eval_policy/self_bleu", "self-BLEU", POLICY, "--"),
            Line("eval_policy/top_ngram", "with the top 4-gram", POLICY, ":"),
        ),
        "One phrase that takes over: distinct 2-grams fall, the others rise.",
        shows=_SHARE,
    ),
    Chart(
        "length",
        "Length",
        "tokens",
        (
            Line("completions/mean_length", "mean", POLICY),
            Line("completions/max_length", "longest", POLICY, "--"),
        ),
        "Steady growth may be what the reward model likes, not what people like.",
        span=10.0,
    ),
    Chart(
        "truncated",
        "Cut off",
        "share of the completions",
        (Line("completions/clipped_ratio", "cut off", POLICY),),
        "Completions that reached the limit of tokens without an end.",
        shows=_SHARE,
    ),
    Chart(
        "entropy",
        "Entropy",
        "nats per token",
        (Line("entropy", "entropy", POLICY),),
        "How undecided the policy is about the next token. A fall to 0 ends the exploration.",
    ),
    Chart(
        "critic",
        "Critic's explained variance",
        "share of the variance",
        (Line("critic/explained_variance", "explained variance", CRITIC),),
        "1 is perfect, 0 is no better than a constant, below 0 does harm.",
        shows=_SHARE,
        levels={0.0: "a constant"},
    ),
    Chart(
        "clip",
        "Clip fractions",
        "share of the tokens",
        (
            Line("ppo/clip_fraction", "policy", POLICY),
            Line("critic/clip_fraction", "critic", CRITIC, "--"),
        ),
        "Tokens where the update was held back. Often above 0.3: steps too large.",
        shows=_SHARE,
        folded=True,
    ),
    Chart(
        "approx-kl",
        "KL of the updates",
        "nats per token",
        (Line("ppo/approx_kl", "KL", KL),),
        "Between the policy before and after an update. Healthy below 0.02.",
        span=0.02,
        folded=True,
    ),
    Chart(
        "losses",
        "Losses",
        "loss",
        (
            Line("ppo/policy_loss", "policy", POLICY),
            Line("critic/value_loss", "critic", CRITIC, "--"),
        ),
        "The critic's should fall; the policy's says little.",
        span=0.1,
        folded=True,
    ),
    Chart(
        "kl-coef",
        "Weight of the KL penalty",
        "reward per nat",
        (Line("kl_coef", "weight", KL),),
        "Fixed, or as the controller sets it.",
        folded=True,
    ),
    Chart(
        "spread",
        "Spread of the reward",
        "score",
        (Line("reward_std", "standard deviation", REWARD),),
        "Standard deviation over the rollouts. At 0 there is nothing left to learn from.",
        folded=True,
    ),
    Chart(
        "role-norms",
        "Gradient norm per role",
        "norm",
        (
            Line("health/grad_norm_policy", "policy", POLICY),
            Line("health/grad_norm_critic", "critic", CRITIC, "--"),
        ),
        "Where the gradient goes.",
        span=1.0,
        folded=True,
    ),
    _NORM,
    _RATE,
    Chart(
        "seconds",
        "Seconds per step",
        "seconds",
        (
            Line("health/seconds_generate", "generate"),
            Line("health/seconds_score", "score", style="--"),
            Line("health/seconds_train", "train", style=":"),
        ),
        "Where the time goes.",
        folded=True,
    ),
    Chart(
        "speed",
        "Speed",
        "tokens per second",
        (Line("health/tokens_per_second", "tokens"),),
        "Of the whole training.",
        folded=True,
    ),
    Chart(
        "memory",
        "Peak memory",
        "GB",
        (Line("health/peak_memory_gb", "memory"),),
        "Of the accelerator, or the process.",
        folded=True,
    ),
)
CHARTS: dict[str, tuple[Chart, ...]] = {"sft": _SFT, "reward": _REWARD, "ppo": _PPO}
