"""Reward models: their arguments, rows and training, and how well they tell chosen from rejected."""

from rlhf_recipes.models.readout import Readout, fit_normalization
from rlhf_recipes.reward_modeling.baselines import pair_baselines
from rlhf_recipes.reward_modeling.collator import PreferenceCollator
from rlhf_recipes.reward_modeling.config import PreferenceConfig, RewardModelConfig
from rlhf_recipes.reward_modeling.evaluation import evaluate_pairs, pairs_table, pairwise_evaluation, score_sequences
from rlhf_recipes.reward_modeling.preparation import check_score_head, normalize_score_head
from rlhf_recipes.reward_modeling.rows import load_reward_rows
from rlhf_recipes.reward_modeling.table import check_rows, drop_ties
from rlhf_recipes.reward_modeling.trainer import PreferenceTrainer

__all__ = [
    "PreferenceCollator",
    "PreferenceConfig",
    "PreferenceTrainer",
    "Readout",
    "RewardModelConfig",
    "check_rows",
    "check_score_head",
    "drop_ties",
    "evaluate_pairs",
    "fit_normalization",
    "load_reward_rows",
    "normalize_score_head",
    "pair_baselines",
    "pairs_table",
    "pairwise_evaluation",
    "score_sequences",
]
