"""Sequence rewards and penalties: callables with TRL's reward signature."""

from rlhf_recipes.rewards.adapter import AdapterReward
from rlhf_recipes.rewards.checked import checked
from rlhf_recipes.rewards.penalties import MissingEosPenalty

__all__ = ["AdapterReward", "MissingEosPenalty", "checked"]
