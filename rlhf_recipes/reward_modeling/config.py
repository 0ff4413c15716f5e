"""Arguments of a reward model: of its weights, and of the loss that it learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trl import ModelConfig, RewardConfig

from rlhf_recipes.config import ChosenDefaults, validate_fields

Objective = Literal["pairwise", "ranking", "plackett_luce", "best_of_k", "regression", "token"]

# What is compared, so that a constant may be added to all scores; the others have targets in reward units.
_COMPARISONS = ("pairwise", "ranking", "plackett_luce", "best_of_k")


@dataclass
class RewardModelConfig(ModelConfig):
    """TRL's model arguments with the one LoRA task type that trains a reward model.

    TRL's default, `CAUSAL_LM`, leaves the score head at its random start and does not save it.

    Raises:
        ValueError: If `lora_task_type` is any other.

    Example:
        >>> RewardModelConfig().lora_task_type
        'SEQ_CLS'
    """

    lora_task_type: str = field(
        default="SEQ_CLS", metadata={"help": "Only SEQ_CLS trains the score head and saves it with the adapter."}
    )

    start_adapter: str | None = field(
        default=None,
        metadata={"help": "Reward model to go on from: an adapter on the same base. null: a fresh adapter and head."},
    )

    def __post_init__(self) -> None:
        """Refuse task types that would lose the score head."""
        super().__post_init__()
        if self.lora_task_type != "SEQ_CLS":
            raise ValueError(
                f"`lora_task_type` must be 'SEQ_CLS' for a reward model, got {self.lora_task_type!r}: any other type "
                "leaves the score head at its random start and does not save it. Remove the setting."
            )


@dataclass
class PreferenceConfig(ChosenDefaults, RewardConfig):
    """TRL's reward configuration with a choice of losses. The defaults train exactly what TRL trains.

    Raises:
        ValueError: If a value has the wrong type, is out of range, has no effect, or contradicts another; it names the
            fields and the fix.

    Example:
        >>> PreferenceConfig(objective="ranking", label_noise=0.1, use_cpu=True, bf16=False).ties
        'soft'
        >>> PreferenceConfig(objective="best_of_k", label_noise=0.1, use_cpu=True, bf16=False)
        Traceback (most recent call last):
        ...
        ValueError: `label_noise` is for `objective: pairwise` and `objective: ranking`, but `objective` is ...
    """

    objective: Objective = field(
        default="pairwise",
        metadata={"help": "What the scores are fitted to. It decides which column of the rows is read."},
    )
    readout: Literal["last", "sum", "mean"] = field(
        default="last",
        metadata={"help": "The score: at the last token, or the sum or mean of those at the completion's tokens."},
    )
    ties: Literal["soft", "drop"] = field(
        default="soft", metadata={"help": "soft: a tie is fitted by equal scores. drop: tied pairs carry no loss."}
    )
    label_noise: float = field(
        default=0.0, metadata={"help": "Share of choices that people are taken to make at random, in [0, 1)."}
    )
    margin_use: Literal["margin", "scale", "ignore"] = field(
        default="margin",
        metadata={"help": "The column `margin`: a lead that the winner must have, a weight of the pair, or nothing."},
    )
    token_loss: Literal["mse", "bce"] = field(
        default="mse", metadata={"help": "Loss of `objective: token`: squared error, or cross-entropy of a sigmoid."}
    )

    def __post_init__(self) -> None:
        """Check the fields that TRL does not have."""
        validate_fields(self)
        pad_token, self.pad_token = self.pad_token, None  # TRL would say that its next major version drops the field
        super().__post_init__()
        self.pad_token = pad_token
        if not 0.0 <= self.label_noise < 1.0:
            raise ValueError(f"`label_noise` must lie in [0, 1), got {self.label_noise}.")
        if self.center_rewards_coefficient is not None and self.center_rewards_coefficient < 0:
            raise ValueError(
                f"`center_rewards_coefficient` must not be negative, got {self.center_rewards_coefficient}."
            )
        changed = {
            "label_noise": (self.label_noise > 0, ("pairwise", "ranking")),
            "ties": (self.ties == "drop", ("pairwise", "ranking")),
            "margin_use": (self.margin_use != "margin", ("pairwise",)),
            "token_loss": (self.token_loss != "mse", ("token",)),
            "center_rewards_coefficient": (bool(self.center_rewards_coefficient), _COMPARISONS),
        }
        for name, (is_set, objectives) in changed.items():
            if is_set and self.objective not in objectives:
                named = " and ".join(f"`objective: {objective}`" for objective in objectives)
                raise ValueError(
                    f"`{name}` is for {named}, but `objective` is {self.objective!r}, where it has no meaning. Remove "
                    f"`{name}`, or change `objective`."
                )

    @property
    def is_plain(self) -> bool:
        """True if the loss is TRL's own: pairs with hard labels, read at the last token, with or without margins."""
        return (self.objective, self.readout, self.label_noise, self.margin_use) == ("pairwise", "last", 0.0, "margin")
