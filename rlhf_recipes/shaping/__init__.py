"""Token rewards: transforms of the score, where it is paid, and the KL penalty to the reference."""

from rlhf_recipes.shaping.dense import (
    RewardPlacement,
    align_rewards,
    place_attention,
    place_differences,
    place_scores,
    potential_shaping,
)
from rlhf_recipes.shaping.kl import (
    AdaptiveKLController,
    FixedKLController,
    chunked_full_kl,
    full_kl,
    kl_estimate,
    looks_like_per_token,
    steered_kl,
)
from rlhf_recipes.shaping.normalization import ClipScores, ScaleScores, SubtractReferenceMean
from rlhf_recipes.shaping.penalties import LengthPenalty, MissingEos, OverlongPenalty, RepetitionPenalty
from rlhf_recipes.shaping.placement import place_discounted, place_every_token, place_terminal, place_uniform
from rlhf_recipes.shaping.transforms import (
    Completions,
    ScoreTransform,
    apply_transforms,
    load_transforms_state,
    transforms_state,
)

__all__ = [
    "AdaptiveKLController",
    "ClipScores",
    "Completions",
    "FixedKLController",
    "LengthPenalty",
    "MissingEos",
    "OverlongPenalty",
    "RepetitionPenalty",
    "RewardPlacement",
    "ScaleScores",
    "ScoreTransform",
    "SubtractReferenceMean",
    "align_rewards",
    "apply_transforms",
    "chunked_full_kl",
    "full_kl",
    "kl_estimate",
    "load_transforms_state",
    "looks_like_per_token",
    "place_attention",
    "place_differences",
    "place_discounted",
    "place_every_token",
    "place_scores",
    "place_terminal",
    "place_uniform",
    "potential_shaping",
    "steered_kl",
    "transforms_state",
]
