"""The maths of reward modelling: scores in, a loss to minimise out.

Losses of pairs take one entry per pair, shape `(N,)`. Losses of groups take the scores of `N` prompts with up to `K`
completions each, shape `(N, K)`, or of one prompt, shape `(K,)`. Where prompts have different numbers of completions,
a `mask` of the same shape is 1 at the completions and 0 elsewhere. What stands at a masked place, even `nan`, changes
no result and no gradient. Every prompt has the same weight, however many completions it has.
"""

from rlhf_recipes.reward_modeling.losses.groups import (
    best_of_k_loss,
    centering_loss,
    group_mean,
    plackett_luce_loss,
    ranking_loss,
    regression_loss,
    untied_margins,
)
from rlhf_recipes.reward_modeling.losses.pairs import log_preference, pairwise_loss, scaled_pairwise_loss
from rlhf_recipes.reward_modeling.losses.tokens import token_loss

__all__ = [
    "best_of_k_loss",
    "centering_loss",
    "group_mean",
    "log_preference",
    "pairwise_loss",
    "plackett_luce_loss",
    "ranking_loss",
    "regression_loss",
    "scaled_pairwise_loss",
    "token_loss",
    "untied_margins",
]
