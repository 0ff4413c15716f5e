"""One W&B run per stage, grouped by recipe, that never asks for anything."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_recipes.extras import from_extra
from rlhf_recipes.tracking.lineage import describe_run, read_run, stage_config, write_run
from rlhf_recipes.tracking.outputs import use_parents
from rlhf_recipes.tracking.settings import resolve_settings, write_settings

if TYPE_CHECKING:
    import wandb
    from transformers import TrainingArguments

_PROJECT = "rlhf-recipes"


def start_run(
    *,
    stage: str,
    output_dir: str,
    config: Mapping[str, Any],
    parent: str | Sequence[str] | None = None,
    recipe: str | None = None,
    report_to: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    python: Iterable[Any] = (),
) -> wandb.Run | None:
    """Record where this stage comes from, and start its W&B run if it reports there.

    Call it on every process, after the trainer was built and before it trains: bad input has been refused by then, and
    the trainer's own W&B callback goes on with the run that it finds. Without an API key the run is kept offline, in
    `output_dir/wandb`; `WANDB_MODE` and `WANDB_PROJECT` decide where they are set. A stage that is resumed continues
    its run.

    Args:
        stage: Name of the stage: the job type.
        output_dir: Folder of the stage, which gets `run.json` and `config.yaml` with or without W&B.
        config: The full configuration of the stage, see `stage_config`.
        parent: What the stage starts from: the folder of an earlier stage, a hub id, or several (PPO starts from an
            SFT and a reward adapter). The W&B runs of earlier stages are found by their `run.json`; an online run
            uses the artifacts that they have logged (`log_outputs`), which joins them in W&B's lineage graph.
        recipe: Name of the recipe: the group that its stages share. By default the name of the folder that
            `output_dir` lies in.
        report_to: The trainer's `report_to`.
        settings: What `config.yaml` gets (`resolve_settings`); by default `config`.
        python: Objects that were set in Python, for the head of that file (`write_settings`).

    Returns:
        The W&B run, or `None` without `"wandb"` in `report_to` and on every process but the first.

    Example:
        >>> import tempfile
        >>> from rlhf_recipes.tracking import read_run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     start_run(stage="sft", output_dir=f"{folder}/films/sft", config={}, parent="some/model")
        ...     record = read_run(f"{folder}/films/sft")
        ...     record["recipe"], record["stage"], record["parents"]
        ('films', 'sft', [{'path': 'some/model'}])
    """
    from accelerate import PartialState  # it imports torch, without which records are read

    if not PartialState().is_main_process:
        return None
    parents = [parent] if isinstance(parent, str) else list(parent or [])
    record = describe_run(recipe or Path(output_dir).resolve().parent.name, stage, parents)
    run = None
    if "wandb" in report_to:
        run = _init(record, output_dir, config)
        if not run.disabled:
            record["wandb_run_id"] = run.id
            if not run.offline:
                use_parents(run, record)
    write_run(output_dir, record)
    write_settings(output_dir, config if settings is None else settings, python)
    return run


def start_stage(
    stage: str,
    training_args: TrainingArguments,
    *arguments: Any,
    parents: Sequence[str | None],
    python: Iterable[Any] = (),
) -> wandb.Run | None:
    """Record where a stage with a trainer comes from, and start its W&B run if it reports there: `start_run`.

    Args:
        stage: Name of the stage.
        training_args: The trainer's configuration, which names the folder and where to report.
        *arguments: The other dataclasses of the stage's configuration.
        parents: What the stage starts from; `None` stands for what it does without.
        python: What the script set in Python, such as reward functions: `config.yaml` names what it cannot hold.

    Returns:
        The W&B run, or `None` without `"wandb"` in `report_to` and on every process but the first.
    """
    return start_run(
        stage=stage,
        output_dir=str(training_args.output_dir),
        config=stage_config(*arguments, training_args),
        parent=[parent for parent in parents if parent is not None],
        report_to=training_args.report_to or (),
        settings=resolve_settings(*arguments, training_args),
        python=python,
    )


def _init(record: Mapping[str, Any], output_dir: str, config: Mapping[str, Any]) -> wandb.Run:
    with from_extra("wandb", needed_by="`report_to: wandb`"):
        import wandb  # slow to import, and not every run reports to it

    resumed_id = (read_run(output_dir) or {}).get("wandb_run_id")
    os.makedirs(output_dir, exist_ok=True)  # W&B would fall back to a temporary folder
    mode = _mode()
    offline = (mode or wandb.setup().settings.mode) == "offline"
    run = wandb.init(
        project=wandb.setup().settings.project or _PROJECT,
        group=record["recipe"],
        job_type=record["stage"],
        name=config.get("run_name") or f"{record['recipe']}-{record['stage']}",
        dir=output_dir,
        config={**config, **record},
        mode=mode,
        settings=wandb.Settings(silent=True) if offline else None,  # of ten lines about an offline run one says it
        id=resumed_id,
        resume="allow" if resumed_id else None,
        reinit="finish_previous",
    )
    if offline and not wandb.setup().settings.silent:
        folder = shlex.quote(str(Path(run.dir).parent))
        sys.stdout.write(f"W&B is offline. To upload this run: wandb sync {folder}\n\n")
    return run


def _mode() -> Literal["offline"] | None:
    import wandb

    if wandb.run is not None:  # of an earlier stage in this process, after which W&B takes no key
        return "offline" if wandb.run.offline else None
    # `wandb.init` would ask for a key on a terminal and fail elsewhere. A mode that the user chose stays.
    chosen = "WANDB_MODE" in os.environ or wandb.setup().settings.mode != "online"
    return None if chosen or wandb.login(prompt=False, verify=False) else "offline"
