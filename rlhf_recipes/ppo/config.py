"""Configuration of the PPO trainer: TRL's rollout engine and optimizer settings, and PPO's own fields."""

import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import GRPOConfig

from rlhf_recipes.config import ChosenDefaults, validate_fields
from rlhf_recipes.models.roles import checkpoint_contexts
from rlhf_recipes.ppo.functional import AdvantageEstimator
from rlhf_recipes.ppo.unused import check_unused
from rlhf_recipes.ppo.vllm.settings import VLLMSettings
from rlhf_recipes.shaping import RewardPlacement

logger = logging.getLogger(__name__)

_SHARES = ("gamma", "gae_lambda", "critic_lambda", "attention_weight")  # in [0, 1]
_NOT_NEGATIVE = (
    *("kl_coef", "vf_coef", "ptx_coef", "critic_warmup_steps"),
    *("missing_eos_penalty", "length_penalty", "overlong_penalty", "ngram_penalty", "truncate_after"),
)
_POSITIVE = (
    "temperature",
    *("value_clip", "score_clip", "overlong_buffer", "placement_gamma", "kl_target", "kl_horizon"),
    *("gae_lambda_alpha", "target_kl", "ratio_threshold", "critic_learning_rate", "ptx_batch_size", "ptx_max_length"),
    *("critic_layers", "adapter_tolerance"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("steps_per_generation", "generation_batch_size", "num_generations", "num_generations_eval", "num_iterations"),
)
# Mappings, which TRL also takes as the text of a JSON object.
_MAPPINGS = (
    *("generation_kwargs", "chat_template_kwargs", "model_init_kwargs", "lr_scheduler_kwargs"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)
_MOST_NATS_PER_TOKEN = 1.0  # more is the KL of a whole completion in the field for a token's


@dataclass
class PPOConfig(ChosenDefaults, VLLMSettings, GRPOConfig):
    r"""Configuration for `PPOTrainer`.

    The fields of TRL's `GRPOConfig` that steer generation, batches, the optimizer and logging keep their meaning.
    A PPO step generates `generation_batch_size` completions (by default `per_device_train_batch_size x
    gradient_accumulation_steps x processes`) and makes `num_iterations` passes over them (PPO epochs), in
    `steps_per_generation / gradient_accumulation_steps` minibatches each. `max_steps` counts optimizer steps.

    Source: Proximal Policy Optimization, https://huggingface.co/papers/1707.06347, with the token rewards of
    https://huggingface.co/papers/1909.08593, section 2.

    Raises:
        ValueError: If a value has the wrong type, is no word that its field knows or is out of range, fields
            contradict each other, or a field of GRPO that PPO does not honour was changed.

    Example:
        >>> config = PPOConfig("outputs/ppo", kl_coef=0.1, bf16=False, use_cpu=True)
        >>> config.num_generations, config.gae_lambda
        (1, 0.95)
    """

    # 1. What is judged of a completion
    truncate_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens, such as '.', at the first of which a completion is cut before it is judged; without one "
            "it counts as cut off. The policy is trained on all its tokens."
        },
    )
    truncate_after: int = field(
        default=0, metadata={"help": "First position in a completion, from 0, at which `truncate_tokens` count."}
    )
    # 2. Scores of the completions, transformed in this order before they are placed
    score_scaling: Literal["none", "batch", "running"] = field(
        default="none",
        metadata={"help": "Scores to mean 0 and variance 1: over each rollout, or over all rollouts so far."},
    )
    subtract_reference_mean: bool = field(
        default=False,
        metadata={"help": "Subtract the mean score of the first rollout, whose completions are the reference's."},
    )
    score_clip: float | None = field(default=None, metadata={"help": "Clip scores to [-score_clip, score_clip]."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Price of a completion that was cut off before its end token."}
    )
    missing_eos_mode: Literal["subtract", "replace"] = field(
        default="subtract",
        metadata={"help": "Subtract `missing_eos_penalty` from the score, or put its negative in the score's place."},
    )
    length_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score per token of the completion."}
    )
    overlong_buffer: int | None = field(
        default=None,
        metadata={"help": "Last tokens before `max_completion_length` in which `overlong_penalty` grows from 0."},
    )
    overlong_penalty: float = field(
        default=1.0, metadata={"help": "Subtracted from a completion of `max_completion_length` tokens."}
    )
    ngram_penalty: float | None = field(
        default=None, metadata={"help": "Times the share of a completion's trigrams that occurred before in it."}
    )
    # 3. Token rewards
    reward_placement: RewardPlacement = field(
        default="terminal",
        metadata={
            "help": "Where the score r of a completion of T tokens goes: all on its last token; r/T on each; more "
            "on later ones; all of it on every token (so that it counts T times); as differences of the reward "
            "adapter's score over prefixes; or by the reward adapter's attention."
        },
    )
    placement_gamma: float = field(
        default=0.95, metadata={"help": "For `discounted`: how much less the token before gets, in (0, 1]."}
    )
    attention_weight: float = field(
        default=0.8, metadata={"help": "For `attention`: share that goes by attention; the rest is terminal."}
    )
    # 4. KL
    kl_coef: float = field(
        default=0.05,
        metadata={"help": "Weight of the per-token KL penalty, in reward units per nat. 0 turns it off."},
    )
    kl_estimator: Literal["k1", "k2", "k3", "full"] = field(
        default="k1",
        metadata={
            "help": "Estimator of the KL from the sampled tokens (k1 is unbiased and may be negative), or the exact "
            "KL over the whole vocabulary."
        },
    )
    kl_placement: Literal["reward", "loss"] = field(
        default="reward", metadata={"help": "Whether the KL penalty is part of the token rewards or of the loss."}
    )
    kl_anchor: Literal["reference", "old"] = field(
        default="reference",
        metadata={"help": "KL to the frozen reference, or, in the loss, to the policy that sampled (PPO-Penalty)."},
    )
    kl_controller: Literal["fixed", "adaptive"] = field(
        default="fixed", metadata={"help": "A constant `kl_coef`, or one that steers the KL towards `kl_target`."}
    )
    kl_target: float = field(
        default=6.0, metadata={"help": "For `adaptive`: KL to hold, in nats per `kl_target_per`."}
    )
    kl_target_per: Literal["completion", "token"] = field(
        default="completion",
        metadata={"help": "Whose KL `kl_target` is: a completion's, summed over its tokens, or a token's, as verl's."},
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "For `adaptive`: completions over which `kl_coef` adapts."}
    )
    # 5. Advantages
    advantage_estimator: AdvantageEstimator = field(
        default="gae",
        metadata={"help": "GAE over tokens, or a whole completion as one action: its reward minus V(prompt)."},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token, in [0, 1]."})
    gae_lambda: float = field(
        default=0.95, metadata={"help": "GAE's lambda, in [0, 1]: 0 is the TD error, 1 the Monte-Carlo return."}
    )
    gae_lambda_alpha: float | None = field(
        default=None,
        metadata={"help": "lambda = 1 - 1/(alpha x length) for each completion (VAPO) in place of `gae_lambda`."},
    )
    critic_lambda: float | None = field(
        default=None, metadata={"help": "lambda of the critic's targets; null: the one of the advantages."}
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Whether to scale the token rewards of a rollout to variance 1."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Whether to whiten the advantages over all tokens of a rollout."}
    )
    whiten_unbiased: bool = field(
        default=False, metadata={"help": "Whether both take n - 1 tokens in their variance, as TRL 1.12 and verl do."}
    )
    # 6. Losses
    importance_sampling_level: Literal["token", "sequence", "sequence_product"] = field(
        default="token",
        metadata={
            "help": "Ratio of new to old policy: per token; per completion, as the geometric mean over its tokens "
            "(GSPO); per completion, as the exact product."
        },
    )
    loss_aggregation: Literal["token", "sequence", "fixed"] = field(
        default="token",
        metadata={
            "help": "Mean over all tokens; over each completion's tokens, then over completions; or over "
            "`max_completion_length` tokens for each completion."
        },
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Drop the rest of a rollout's updates when the KL to the old policy exceeds this; nats per token."
        },
    )
    ratio_threshold: float | None = field(
        default=None, metadata={"help": "Drop an update whose mean ratio of new to old policy exceeds this."}
    )
    ptx_coef: float = field(
        default=0.0, metadata={"help": "Weight of the language-model loss on the pretraining data set (PPO-ptx)."}
    )
    ptx_batch_size: int | None = field(
        default=None, metadata={"help": "Pretraining texts in a micro-batch; null: as many as completions."}
    )
    ptx_max_length: int = field(default=512, metadata={"help": "Tokens at which pretraining texts are cut off."})
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep an exponential moving average of the policy's weights too, with this decay per update, in "
            "(0, 1); null: none."
        },
    )
    # 7. Critic
    critic: Literal["adapter", "head", "model"] = field(
        default="adapter",
        metadata={
            "help": "The critic: an adapter of its own on the shared base, only a head on the policy's trunk, or a "
            "model of its own, which the trainer gets as `critic_model`."
        },
    )
    critic_init: Literal["reward", "policy"] | None = field(
        default=None,
        metadata={
            "help": "Start of the critic's adapter: the reward adapter with its head, or the policy with a zero head. "
            "null: the reward adapter if there is one, else the policy. A head on the policy's trunk always starts at "
            "zero."
        },
    )
    critic_layers: int | None = field(
        default=None,
        metadata={
            "help": "Upper layers in which the critic's adapter is trained. Those below stay as they start, and run "
            "once per rollout. null: all layers."
        },
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the critic; null: ten times `learning_rate`."}
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the start in which only the critic is trained."}
    )
    critic_warmup_explained_variance: float | None = field(
        default=None,
        metadata={
            "help": "End `critic_warmup_steps` earlier, at the first rollout of which the critic explains this."
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss in the total loss."})
    value_clip: float | None = field(
        default=0.2,
        metadata={"help": "Range in which the value loss lets a value move from its old one. None: no clipping."},
    )

    # 8. Adapters
    adapter_tolerance: float = field(
        default=0.5,
        metadata={
            "help": "How far an adapter may be from what it was where it was trained, on a base that is quantized in "
            "another way or of another precision: a policy in nats per token, a reward in units of its spread."
        },
    )

    tensorflow_adam: bool = field(
        default=False, metadata={"help": "AdamW with TensorFlow's epsilon, as in OpenAI's first RLHF code."}
    )

    # Changed defaults of TRL's fields
    num_generations: int = field(default=1, metadata={"help": "Completions per prompt. PPO needs only one."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs: passes over each batch of completions."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the policy."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of Adam."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Dropout off: old and new log-probabilities must come from one network."}
    )
    num_completions_to_print: int | None = field(
        default=2,
        metadata={"help": "With `log_completions`: how many the console shows. None: all of a rollout."},
    )

    def __post_init__(self) -> None:
        """Check the values and hand TRL's checks a group size that they accept."""
        validate_fields(self)
        _check_mappings(self)
        _check_ranges(self)
        if self.ddp_find_unused_parameters is None:
            # Every trained parameter takes part in every loss. The critic runs outside of the wrapped forward pass,
            # so the search would take it for unused, and DDP would fail on its gradient.
            self.ddp_find_unused_parameters = False
        single = self.num_generations == 1
        if single:
            # GRPOConfig refuses one completion per prompt, because its baseline is the mean of the group. PPO's
            # baseline is the critic, so the check gets a group size that passes and the field its value back.
            self.num_generations_eval = self.num_generations_eval or 1
            self.num_generations = self._rollout_size()
        super().__post_init__()
        if single:
            self.num_generations = 1
        if (inherited := self.mixed_precision) not in (
            "no",
            *(name for name in ("bf16", "fp16") if getattr(self, name)),
        ):
            logger.warning("ACCELERATE_MIXED_PRECISION sets %s, which holds in place of the configuration.", inherited)
            self.bf16, self.fp16 = inherited == "bf16", inherited == "fp16"
        check_unused(self)
        _check_contradictions(self)
        if self.activation_checkpointing:
            self._keep_roles_when_recomputing()

    @property
    def prompts_per_rollout(self) -> int:
        """Different prompts in one rollout, over all processes."""
        assert self.generation_batch_size is not None  # set by the parent's `__post_init__`
        return self.generation_batch_size // self.num_generations

    @property
    def micro_batches_per_rollout(self) -> int:
        """Micro-batches of each process in one PPO epoch."""
        assert self.steps_per_generation is not None  # set by the parent's `__post_init__`
        return self.steps_per_generation

    @property
    def micro_batches_of_all_epochs(self) -> int:
        """Micro-batches of each process in all epochs over a rollout."""
        return self.micro_batches_per_rollout * self.num_iterations

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout, in all of its epochs."""
        return self.micro_batches_per_rollout // self.gradient_accumulation_steps * self.num_iterations

    def to_dict(self) -> dict[str, Any]:
        """Serialise without the checkpointing context, which is code, not a setting."""
        config: dict[str, Any] = super().to_dict()
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            kwargs = config[name] or {}
            config[name] = {key: value for key, value in kwargs.items() if key != "context_fn"}
        return config

    def _keep_roles_when_recomputing(self) -> None:
        # A recomputed layer must see the adapter of its forward pass, the policy's or the critic's, which only
        # non-reentrant checkpointing can restore.
        configured: Any = self.activation_checkpointing_kwargs or {}
        kwargs = dict(configured)
        if kwargs.get("use_reentrant"):
            raise ValueError(
                "`activation_checkpointing_kwargs` asks for `use_reentrant: true`, which would recompute the critic "
                "with the policy's adapter. Leave `use_reentrant` out, or set it to false."
            )
        kwargs |= {"use_reentrant": False, "context_fn": checkpoint_contexts}
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = kwargs

    def _rollout_size(self) -> int:
        size = self.generation_batch_size
        if size is None:
            # The launcher's variable: `world_size` is known only after the parent's `__post_init__`.
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            size = self.per_device_train_batch_size * processes * steps
        if size < 2:
            raise ValueError(
                "A rollout of one completion cannot be whitened. Raise `per_device_train_batch_size` or "
                "`gradient_accumulation_steps` so that a rollout has at least 2 completions."
            )
        return size


def _check_mappings(config: PPOConfig) -> None:
    """Refuse text where a mapping is expected, other than JSON.

    Raises:
        ValueError: With the field's name and the value.
    """
    for name in _MAPPINGS:
        value = getattr(config, name)
        if isinstance(value, str) and not value.startswith("{"):
            raise ValueError(f"`{name}` must be a mapping, or one as JSON, got {value!r}.")


def _check_ranges(config: PPOConfig) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: With the field's name, the range and the value.
    """
    for name in _SHARES:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not value > 0:
            off = " or null to turn it off," if getattr(type(config), name, 0) is None else ""
            raise ValueError(f"`{name}` must be positive,{off} got {value}.")
    if config.max_completion_length is None or config.max_completion_length < 1:
        raise ValueError(
            f"`max_completion_length` must be at least 1, got {config.max_completion_length}: a completion that never "
            "ends has to be cut off."
        )
    if config.ema_decay is not None and not 0.0 < config.ema_decay < 1.0:
        raise ValueError(
            f"`ema_decay` must lie between 0 and 1, both excluded, got {config.ema_decay}: InstructGPT's is 0.992. "
            "Leave it out to keep no average."
        )
    if config.placement_gamma > 1.0:
        raise ValueError(f"`placement_gamma` must lie in (0, 1], got {config.placement_gamma}.")


def _check_contradictions(config: PPOConfig) -> None:
    """Refuse fields that contradict each other, or of which one makes the other ineffective.

    Raises:
        ValueError: With the fields' names and the fix.
    """
    for message, holds in contradictions(config).items():
        if holds:
            raise ValueError(f"{message}.")


def contradictions(config: PPOConfig) -> dict[str, bool]:
    """All messages about contradictions, each with whether it holds."""
    return (
        _kl_contradictions(config)
        | _bandit_contradictions(config)
        | _truncation_contradictions(config)
        | _other_contradictions(config)
    )


def _kl_contradictions(config: PPOConfig) -> dict[str, bool]:
    adaptive = config.kl_controller == "adaptive"
    return {
        "`kl_anchor: old` is the policy that sampled, so its KL in the reward is 0. Set `kl_placement: loss`": (
            config.kl_anchor == "old" and config.kl_placement == "reward"
        ),
        "`kl_controller: adaptive` multiplies `kl_coef`, which is 0. Set a `kl_coef` to start from": (
            adaptive and config.kl_coef == 0.0
        ),
        "`kl_controller: adaptive` steers the KL to the reference, but `kl_anchor` is 'old'. Set it to `reference`": (
            adaptive and config.kl_anchor == "old"
        ),
        f"`kl_horizon` is {config.kl_horizon}, so a rollout of {config.generation_batch_size} completions could make "
        "`kl_coef` negative. Raise it to more than a fifth of a rollout": (
            adaptive and (config.generation_batch_size or 0) >= 5 * config.kl_horizon
        ),
        "`kl_target_per: token` is the unit of `kl_target`, which `kl_controller: fixed` does not read. Set it to "
        "`adaptive`, or remove it": config.kl_target_per == "token" and not adaptive,
        **_unlikely_units(config),
    }


def _unlikely_units(config: PPOConfig) -> dict[str, bool]:
    longest = config.max_completion_length or 1
    per_token = f"divided by `max_completion_length` ({longest}) that is"
    target, limit = config.kl_target, config.target_kl or 0.0
    return {
        f"`kl_target` is {target} nats for each token, with `kl_target_per: token`: a policy so far from its "
        f"reference writes other texts altogether. If it was meant for a whole completion, remove `kl_target_per`; "
        f"{per_token} {target / longest:.2g}. Targets per token are about 0.01 to 0.1": (
            config.kl_target_per == "token" and target > _MOST_NATS_PER_TOKEN
        ),
        f"`target_kl` is {limit} nats for each token, between the policies before and after the updates on a rollout, "
        f"and would stop none of them: usual are 0.01 to 0.1. If it was meant for a whole completion, {per_token} "
        f"{limit / longest:.2g}; if it was meant as the KL to the reference that is to be held, its names are "
        "`kl_target` and `kl_controller: adaptive`": limit > _MOST_NATS_PER_TOKEN,
    }


def _bandit_contradictions(config: PPOConfig) -> dict[str, bool]:
    bandit = config.advantage_estimator == "bandit"
    return {
        "`advantage_estimator: bandit` takes a completion as one action, so there are no rewards to place on its "
        f"tokens by `reward_placement: {config.reward_placement}`. Set it to `terminal`, or the estimator to `gae`": (
            bandit and config.reward_placement != "terminal"
        ),
        "`advantage_estimator: bandit` has no lambda, but `gae_lambda_alpha` or `critic_lambda` is set. Remove it": (
            bandit and (config.gae_lambda_alpha is not None or config.critic_lambda is not None)
        ),
        "`advantage_estimator: bandit` does not discount, but `gamma` is not 1. Remove it": (
            bandit and config.gamma != 1.0
        ),
        "`advantage_estimator: bandit` learns from whole completions. Set `loss_aggregation: sequence`": (
            bandit and config.loss_aggregation != "sequence"
        ),
    }


def _truncation_contradictions(config: PPOConfig) -> dict[str, bool]:
    longest, cuts = config.max_completion_length or 0, config.truncate_tokens is not None
    return {
        "`truncate_tokens` is an empty list. Name a token, such as '.', or remove it": config.truncate_tokens == [],
        f"`truncate_after` is {config.truncate_after}, but `truncate_tokens` names no token to look for from there. "
        "Set it, or remove `truncate_after`": config.truncate_after > 0 and not cuts,
        f"`truncate_after` is {config.truncate_after}, but the last position of a completion is "
        f"`max_completion_length` - 1 = {longest - 1}: no token could count. Lower it": (
            cuts and config.truncate_after >= longest
        ),
        f"`truncate_tokens` hides tokens from the reward model, which `reward_placement: {config.reward_placement}` "
        "reads token by token. Choose another placement": (
            cuts and config.reward_placement in ("redistributed", "attention")
        ),
    }


def _other_contradictions(config: PPOConfig) -> dict[str, bool]:
    longest = config.max_completion_length or 0
    return {
        "`whiten_unbiased` is about whitening, but `whiten_advantages` and `whiten_rewards` are false. Remove it": (
            config.whiten_unbiased and not (config.whiten_advantages or config.whiten_rewards)
        ),
        "`reward_placement: redistributed` pays differences of the reward adapter's own scores, which `score_scaling` "
        "and `score_clip` would only change on the last token. Remove these, or choose another placement": (
            config.reward_placement == "redistributed"
            and (config.score_scaling != "none" or config.score_clip is not None)
        ),
        "`missing_eos_mode: replace` needs `missing_eos_penalty`, whose negative it puts in the score's place": (
            config.missing_eos_mode == "replace" and config.missing_eos_penalty is None
        ),
        "`score_scaling` already subtracts the mean. Remove `subtract_reference_mean`": (
            config.score_scaling != "none" and config.subtract_reference_mean
        ),
        f"`overlong_buffer` is {config.overlong_buffer}, more than `max_completion_length` ({longest}). Lower it": (
            config.overlong_buffer is not None and config.overlong_buffer > longest
        ),
        "`critic_warmup_explained_variance` ends a warm-up that was not begun. Set `critic_warmup_steps`, its longest "
        "duration": config.critic_warmup_explained_variance is not None and config.critic_warmup_steps == 0,
        "`critic_warmup_steps` leaves no optimizer step for the policy. Raise `max_steps`": 0
        < config.max_steps
        <= _longest_warmup(config),
        "`delta` must be larger than 1 + `epsilon_high` (or `epsilon`), or it clips before they do": (
            config.delta is not None and config.delta <= 1.0 + (config.epsilon_high or config.epsilon)
        ),
        "`tensorflow_adam` takes the place of `optim`, which is set too. Remove one of the two": (
            config.tensorflow_adam and config.optim != PPOConfig.__dataclass_fields__["optim"].default
        ),
        "`ptx_batch_size` is set, but `ptx_coef` is 0. Set `ptx_coef`, or remove `ptx_batch_size`": (
            config.ptx_batch_size is not None and config.ptx_coef == 0.0
        ),
    }


def _longest_warmup(config: PPOConfig) -> int:
    if config.critic_warmup_explained_variance is not None:  # it may end at any earlier rollout
        return config.critic_warmup_steps
    return math.ceil(config.critic_warmup_steps / config.steps_per_rollout) * config.steps_per_rollout
