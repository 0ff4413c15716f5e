"""Records of a run: its W&B run, its commit, its settings, and the runs it came from."""

from rlhf_recipes.tracking.lineage import git_commit, read_run, stage_config
from rlhf_recipes.tracking.outputs import log_outputs
from rlhf_recipes.tracking.settings import differing_settings, read_settings
from rlhf_recipes.tracking.wandb_run import start_run, start_stage

__all__ = [
    "differing_settings",
    "git_commit",
    "log_outputs",
    "read_run",
    "read_settings",
    "stage_config",
    "start_run",
    "start_stage",
]
