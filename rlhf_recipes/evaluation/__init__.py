"""Evaluation: the comparison of a policy with its reference, and hooks that watch the training."""

from rlhf_recipes.evaluation.callbacks import (
    CriticHealth,
    FrontierTracker,
    PolicyEvaluation,
    RewardHackingAlarm,
    TrainingHealth,
)
from rlhf_recipes.evaluation.hacking_signs import AlarmLimits
from rlhf_recipes.evaluation.policy import evaluate_policy, write_evaluation
from rlhf_recipes.evaluation.watching import watch_training

__all__ = [
    "AlarmLimits",
    "CriticHealth",
    "FrontierTracker",
    "PolicyEvaluation",
    "RewardHackingAlarm",
    "TrainingHealth",
    "evaluate_policy",
    "watch_training",
    "write_evaluation",
]
