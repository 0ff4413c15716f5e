"""SFT, reward models and PPO with LoRA adapters on one 4-bit base: an extension layer on Hugging Face TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_recipes.quiet import quiet_known_messages

if TYPE_CHECKING:
    from rlhf_recipes.ppo.arguments import GroupArguments as GroupArguments
    from rlhf_recipes.ppo.arguments import PPOArguments as PPOArguments
    from rlhf_recipes.ppo.config import PPOConfig as PPOConfig
    from rlhf_recipes.ppo.group import GRPOAdapterTrainer as GRPOAdapterTrainer
    from rlhf_recipes.ppo.group import RLOOAdapterTrainer as RLOOAdapterTrainer
    from rlhf_recipes.ppo.group_config import GRPOAdapterConfig as GRPOAdapterConfig
    from rlhf_recipes.ppo.group_config import RLOOAdapterConfig as RLOOAdapterConfig
    from rlhf_recipes.ppo.trainer import PPOTrainer as PPOTrainer

__version__ = "0.2.0"
__all__ = [
    "GRPOAdapterConfig",
    "GRPOAdapterTrainer",
    "GroupArguments",
    "PPOArguments",
    "PPOConfig",
    "PPOTrainer",
    "RLOOAdapterConfig",
    "RLOOAdapterTrainer",
    "__version__",
]

quiet_known_messages()


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import, and the pure functions do without it: it is loaded with the trainer's first use.
    if name in ("PPOArguments", "GroupArguments"):
        from rlhf_recipes.ppo import arguments

        return getattr(arguments, name)
    if name == "PPOConfig":
        from rlhf_recipes.ppo.config import PPOConfig

        return PPOConfig
    if name == "PPOTrainer":
        from rlhf_recipes.ppo.trainer import PPOTrainer

        return PPOTrainer
    if name in ("GRPOAdapterConfig", "RLOOAdapterConfig"):
        from rlhf_recipes.ppo import group_config

        return getattr(group_config, name)
    if name in ("GRPOAdapterTrainer", "RLOOAdapterTrainer"):
        from rlhf_recipes.ppo import group

        return getattr(group, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
