"""One W&B run per stage, grouped by recipe, that never asks for anything."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from accelerate import PartialState

from rlhf_recipes.extras import from_extra
from rlhf_recipes.tracking.lineage import describe_run, read_run, write_run
from rlhf_recipes.tracking.outputs import use_parents

if TYPE_CHECKING:
    import wandb

_PROJECT = "rlhf-recipes"


def start_run(
    *,
    recipe: str,
    stage: str,
    output_dir: str,
    config: Mapping[str, Any],
    parent: str | Sequence[str] | None = None,
    report_to: Sequence[str] = (),
) -> wandb.Run | None:
    """Record where this stage comes from, and start its W&B run if it reports there.

    Call it on every process, after the trainer was built and before it trains: bad input has been refused by then, and
    the trainer's own W&B callback goes on with the run that it finds. Without an API key the run is kept offline, in
    `output_dir/wandb`; `WANDB_MODE` and `WANDB_PROJECT` decide where they are set. A stage that is resumed continues
    its run.

    Args:
        recipe: Name of the recipe: the group that its stages share.
        stage: Name of the stage: the job type.
        output_dir: Folder of the stage, which gets `run.json` with or without W&B.
        config: The full configuration of the stage, see `stage_config`.
        parent: What the stage starts from: the folder of an earlier stage, a hub id, or several (PPO starts from an
            SFT and a reward adapter). The W&B runs of earlier stages are found by their `run.json`; an online run
            uses the artifacts that they have logged (`log_outputs`), which joins them in W&B's lineage graph.
        report_to: The trainer's `report_to`.

    Returns:
        The W&B run, or `None` without `"wandb"` in `report_to` and on every process but the first.

    Example:
        >>> import tempfile
        >>> from rlhf_recipes.tracking import read_run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     start_run(recipe="quickstart", stage="sft", output_dir=folder, config={}, parent="some/model")
        ...     read_run(folder)["parents"]
        [{'path': 'some/model'}]
    """
    if not PartialState().is_main_process:
        return None
    parents = [parent] if isinstance(parent, str) else list(parent or [])
    record = describe_run(recipe, stage, parents)
    run = None
    if "wandb" in report_to:
        run = _init(record, output_dir, config)
        if not run.disabled:
            record["wandb_run_id"] = run.id
            if not run.offline:
                use_parents(run, record)
    write_run(output_dir, record)
    return run


def _init(record: Mapping[str, Any], output_dir: str, config: Mapping[str, Any]) -> wandb.Run:
    with from_extra("wandb", needed_by="`report_to: wandb`"):
        import wandb  # slow to import, and not every run reports to it

    resumed_id = (read_run(output_dir) or {}).get("wandb_run_id")
    os.makedirs(output_dir, exist_ok=True)  # W&B would fall back to a temporary folder
    return wandb.init(
        project=wandb.setup().settings.project or _PROJECT,
        group=record["recipe"],
        job_type=record["stage"],
        name=config.get("run_name") or f"{record['recipe']}-{record['stage']}",
        dir=output_dir,
        config={**config, **record},
        mode=_mode(),
        id=resumed_id,
        resume="allow" if resumed_id else None,
        reinit="finish_previous",
    )


def _mode() -> Literal["offline"] | None:
    import wandb

    # `wandb.init` would ask for a key on a terminal and fail elsewhere. A mode that the user chose stays.
    chosen = "WANDB_MODE" in os.environ or wandb.setup().settings.mode != "online"
    return None if chosen or wandb.login(prompt=False, verify=False) else "offline"
