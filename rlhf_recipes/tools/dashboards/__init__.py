"""W&B workspaces as code: one for reward models, one for PPO, one that compares runs."""

from rlhf_recipes.tools.dashboards.saving import as_json, save_workspace
from rlhf_recipes.tools.dashboards.workspaces import comparison_workspace, ppo_workspace, reward_workspace

__all__ = ["as_json", "comparison_workspace", "ppo_workspace", "reward_workspace", "save_workspace"]
