"""Send workspaces to W&B, or show what would be sent."""

from __future__ import annotations

import json
from typing import Any

from rlhf_recipes.extras import from_extra

with from_extra("wandb", needed_by="Making dashboards"):
    import wandb_workspaces.workspaces as ws


def save_workspace(workspace: ws.Workspace, slug: str) -> str:
    """Save a workspace to W&B: a new one the first time, afterwards in exchange for the one saved before.

    What was changed by hand in the app is lost then; a copy under another name ("Save as new view") stays.

    Args:
        workspace: The workspace.
        slug: What its address ends with, `?nw=<slug>`.

    Returns:
        Its address.

    Raises:
        ValueError: If there is no such project, or no access to it.
    """
    # The library makes up a new address with each new workspace. There is no public way to choose it.
    try:
        saved = ws.Workspace.from_url(f"https://wandb.ai/{workspace.entity}/{workspace.project}?nw={slug}")
    except ValueError as error:
        if not str(error).startswith("Workspace"):  # the project
            raise
        workspace._internal_name = f"nw-{slug}-v"
    else:
        workspace._internal_name, workspace._internal_id = saved._internal_name, saved._internal_id
    workspace.save()
    return str(workspace.url)


def as_json(workspace: ws.Workspace) -> dict[str, Any]:
    """Return what is sent to W&B for a workspace, as JSON can hold it.

    Example:
        >>> from rlhf_recipes.tools.dashboards import ppo_workspace
        >>> as_json(ppo_workspace("me", "rlhf-recipes"))["displayName"]
        'PPO'
    """
    view: dict[str, Any] = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return view
