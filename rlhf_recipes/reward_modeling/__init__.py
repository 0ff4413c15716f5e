"""Reward models: their arguments, the token ids they read, and how well they tell chosen from rejected."""

from rlhf_recipes.reward_modeling.config import RewardModelConfig
from rlhf_recipes.reward_modeling.evaluation import evaluate_pairs, pairwise_evaluation, score_sequences
from rlhf_recipes.reward_modeling.preparation import check_score_head, end_at_eos

__all__ = [
    "RewardModelConfig",
    "check_score_head",
    "end_at_eos",
    "evaluate_pairs",
    "pairwise_evaluation",
    "score_sequences",
]
