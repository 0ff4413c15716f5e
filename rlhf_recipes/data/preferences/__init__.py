"""Preferences of every kind in one typed table: pairs, ties, grades, rankings, choices, ratings, labels of steps."""

from rlhf_recipes.data.preferences.expansion import best_completions, compared_pairs, to_pairs
from rlhf_recipes.data.preferences.grades import (
    HELPSTEER2_MARGINS,
    LLAMA2_LARGE_MARGINS,
    LLAMA2_SMALL_MARGINS,
    confidence_margin,
    from_graded_pairs,
    from_helpsteer3,
    from_signed_pairs,
)
from rlhf_recipes.data.preferences.groups import from_choices, from_rankings, from_ratings, from_token_labels
from rlhf_recipes.data.preferences.helpsteer import from_helpsteer2
from rlhf_recipes.data.preferences.label_studio import from_label_studio
from rlhf_recipes.data.preferences.nectar import from_nectar
from rlhf_recipes.data.preferences.pairs import LABEL_WORDS, from_labelled_pairs, from_pairs
from rlhf_recipes.data.preferences.recognition import (
    are_preferences,
    check_preferences,
    load_preferences,
    to_preference_table,
)
from rlhf_recipes.data.preferences.reward_bench import from_reward_bench
from rlhf_recipes.data.preferences.safe_rlhf import from_safe_rlhf
from rlhf_recipes.data.preferences.schema import preference_features
from rlhf_recipes.data.preferences.sharegpt import from_sharegpt
from rlhf_recipes.data.preferences.steps import from_steps
from rlhf_recipes.data.preferences.ultrafeedback import from_ultrafeedback

__all__ = [
    "HELPSTEER2_MARGINS",
    "LABEL_WORDS",
    "LLAMA2_LARGE_MARGINS",
    "LLAMA2_SMALL_MARGINS",
    "are_preferences",
    "best_completions",
    "check_preferences",
    "compared_pairs",
    "confidence_margin",
    "from_choices",
    "from_graded_pairs",
    "from_helpsteer2",
    "from_helpsteer3",
    "from_label_studio",
    "from_labelled_pairs",
    "from_nectar",
    "from_pairs",
    "from_rankings",
    "from_ratings",
    "from_reward_bench",
    "from_safe_rlhf",
    "from_sharegpt",
    "from_signed_pairs",
    "from_steps",
    "from_token_labels",
    "from_ultrafeedback",
    "load_preferences",
    "preference_features",
    "to_pairs",
    "to_preference_table",
]
