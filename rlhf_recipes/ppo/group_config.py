"""Configurations of the trainers that compare the completions of one prompt: TRL's, with what adapters need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trl import GRPOConfig, RLOOConfig

from rlhf_recipes.config import ChosenDefaults, validate_fields

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig


@dataclass
class AdapterSettings(ChosenDefaults):
    """What `GRPOAdapterConfig` and `RLOOAdapterConfig` have beside TRL's fields, and where their defaults differ."""

    adapter_tolerance: float = field(
        default=0.5,
        metadata={
            "help": "How far an adapter may be from what it was where it was trained, on a base that is quantized in "
            "another way or of another precision: a policy in nats per token, a reward in units of its spread."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Dropout off: old and new log-probabilities must come from one network."},
    )
    num_completions_to_print: int | None = field(
        default=2,
        metadata={"help": "With `log_completions`: how many the console shows. None: all of a rollout."},
    )

    def __post_init__(self) -> None:
        """Check the values, before and as TRL does."""
        validate_fields(self)
        config: Any = self
        if not self.adapter_tolerance > 0:
            raise ValueError(f"`adapter_tolerance` must be positive, got {self.adapter_tolerance}.")
        if config.num_generations is None:
            raise ValueError("`num_generations` is the size of a group, 2 or more, got null.")
        super().__post_init__()

    @property
    def reward_placement(self) -> Literal["terminal"]:
        """Where the score goes: an advantage is of a whole completion."""
        return "terminal"

    @property
    def prompts_per_rollout(self) -> int:
        """Different prompts in one rollout, over all processes."""
        config: Any = self
        return int(config.generation_batch_size // config.num_generations)


@dataclass
class GRPOAdapterConfig(AdapterSettings, GRPOConfig):
    """TRL's configuration of GRPO for `GRPOAdapterTrainer`. `num_generations` is the size of a group.

    Raises:
        ValueError: If a value has the wrong type or is out of range, or TRL refuses it.

    Example:
        >>> config = GRPOAdapterConfig("outputs/films/grpo", beta=0.04, use_cpu=True, bf16=False)
        >>> config.num_generations, config.disable_dropout
        (8, True)
    """


@dataclass
class RLOOAdapterConfig(AdapterSettings, RLOOConfig):
    """TRL's configuration of RLOO for `RLOOAdapterTrainer`. `num_generations` is the size of a group.

    Raises:
        ValueError: If a value has the wrong type or is out of range, or TRL refuses it.

    Example:
        >>> config = RLOOAdapterConfig("outputs/films/rloo", num_generations=4, use_cpu=True, bf16=False)
        >>> config.beta, config.disable_dropout
        (0.05, True)
    """


if TYPE_CHECKING:
    Config = PPOConfig | GRPOAdapterConfig | RLOOAdapterConfig  # what shares a base asks for the same few fields
