"""SFT, reward models and PPO with LoRA adapters on one 4-bit base: an extension layer on Hugging Face TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_recipes.quiet import quiet_known_messages

if TYPE_CHECKING:
    from rlhf_recipes.ppo.arguments import PPOArguments as PPOArguments
    from rlhf_recipes.ppo.config import PPOConfig as PPOConfig
    from rlhf_recipes.ppo.trainer import PPOTrainer as PPOTrainer

__version__ = "0.2.0"
__all__ = ["PPOArguments", "PPOConfig", "PPOTrainer", "__version__"]

quiet_known_messages()


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import, and the pure functions do without it: it is loaded with the trainer's first use.
    if name == "PPOArguments":
        from rlhf_recipes.ppo.arguments import PPOArguments

        return PPOArguments
    if name == "PPOConfig":
        from rlhf_recipes.ppo.config import PPOConfig

        return PPOConfig
    if name == "PPOTrainer":
        from rlhf_recipes.ppo.trainer import PPOTrainer

        return PPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
