"""Token rewards: where the score of a completion is paid, and the KL penalty to the reference."""

from rlhf_recipes.shaping.kl import FixedKLController, kl_estimate
from rlhf_recipes.shaping.placement import place_terminal, place_uniform

__all__ = ["FixedKLController", "kl_estimate", "place_terminal", "place_uniform"]
