"""Sequence and token rewards: callables with TRL's reward signature."""

from rlhf_recipes.rewards.adapter import AdapterReward
from rlhf_recipes.rewards.checked import checked
from rlhf_recipes.rewards.classifier import ClassifierReward
from rlhf_recipes.rewards.ensemble import EnsembleReward
from rlhf_recipes.rewards.gate import GatedReward, gate_scores
from rlhf_recipes.rewards.math_answers import math_reward
from rlhf_recipes.rewards.reasoning import format_reward, gym_accuracy, gym_rows, tagged_answer
from rlhf_recipes.rewards.remote import JudgeReward, RemoteReward
from rlhf_recipes.rewards.tokens import TokenClassifierReward, token_spans
from rlhf_recipes.rewards.truncation import TruncatedReward, truncate
from rlhf_recipes.rewards.verifier import check_verifier, refuse_if_bought

__all__ = [
    "AdapterReward",
    "ClassifierReward",
    "EnsembleReward",
    "GatedReward",
    "JudgeReward",
    "RemoteReward",
    "TokenClassifierReward",
    "TruncatedReward",
    "check_verifier",
    "checked",
    "format_reward",
    "gate_scores",
    "gym_accuracy",
    "gym_rows",
    "math_reward",
    "refuse_if_bought",
    "tagged_answer",
    "token_spans",
    "truncate",
]
