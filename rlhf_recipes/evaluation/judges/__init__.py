"""Judges that compare two completions, grade one, or criticise and revise it.

A judge is a function, a local language model, or a model behind an OpenAI-compatible endpoint.
"""

from rlhf_recipes.evaluation.judges.budget import Budget, BudgetSpentError, Usage
from rlhf_recipes.evaluation.judges.grades import GradeReward
from rlhf_recipes.evaluation.judges.language import EndpointModel, LanguageModel, LocalModel, load_local_model
from rlhf_recipes.evaluation.judges.orders import (
    REASONED,
    Answer,
    Choice,
    Judge,
    Judgement,
    clamped,
    judge_in_both_orders,
)
from rlhf_recipes.evaluation.judges.pairs import (
    EndpointJudge,
    LanguageJudge,
    ModelJudge,
    PairJudge,
    Verdicts,
    parse_choice,
)
from rlhf_recipes.evaluation.judges.questions import QUESTION, read_principles

__all__ = [
    "QUESTION",
    "REASONED",
    "Answer",
    "Budget",
    "BudgetSpentError",
    "Choice",
    "EndpointJudge",
    "EndpointModel",
    "GradeReward",
    "Judge",
    "Judgement",
    "LanguageJudge",
    "LanguageModel",
    "LocalModel",
    "ModelJudge",
    "PairJudge",
    "Usage",
    "Verdicts",
    "clamped",
    "judge_in_both_orders",
    "load_local_model",
    "parse_choice",
    "read_principles",
]
