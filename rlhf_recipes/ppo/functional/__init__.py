"""The maths of PPO: tensors in, tensors out.

`B` sequences, `T` completion tokens, `V` vocabulary. Every `mask` is `(B, T)` with 1 where a token counts and 0 on
padding. What stands at a masked position, even `nan` or `inf`, never changes a result or a gradient.
"""

from rlhf_recipes.ppo.functional.advantages import (
    AdvantageEstimator,
    bandit_advantages,
    discounted_returns,
    estimate_advantages,
    first_token_mask,
    gae,
    length_adaptive_lambda,
)
from rlhf_recipes.ppo.functional.gradients import backward_now
from rlhf_recipes.ppo.functional.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    importance_ratio,
    importance_weights,
    total_loss,
)
from rlhf_recipes.ppo.functional.statistics import (
    aggregate,
    explained_variance,
    masked_mean,
    masked_moments,
    whiten,
)

__all__ = [
    "AdvantageEstimator",
    "aggregate",
    "backward_now",
    "bandit_advantages",
    "clipped_policy_loss",
    "clipped_value_loss",
    "discounted_returns",
    "entropy",
    "estimate_advantages",
    "explained_variance",
    "first_token_mask",
    "gae",
    "importance_ratio",
    "importance_weights",
    "length_adaptive_lambda",
    "masked_mean",
    "masked_moments",
    "total_loss",
    "whiten",
]
