"""Model arguments of a reward model."""

from dataclasses import dataclass, field

from trl import ModelConfig


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

    def __post_init__(self) -> None:
        """Refuse task types that would lose the score head."""
        super().__post_init__()
        if self.lora_task_type != "SEQ_CLS":
            raise ValueError(
                f"`lora_task_type` must be 'SEQ_CLS' for a reward model, got {self.lora_task_type!r}: any other type "
                "leaves the score head at its random start and does not save it. Remove the setting."
            )
