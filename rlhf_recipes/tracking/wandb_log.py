"""Logging of hooks straight to a W&B run, for the trainer's log takes only numbers: tables, and rows with an axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.messages import as_text

if TYPE_CHECKING:
    import wandb

_STEP = "train/global_step"  # what transformers' callback counts optimizer steps in


def current_run(trainer: Any) -> wandb.Run | None:
    """Find the W&B run that a trainer reports to.

    Args:
        trainer: The trainer; any of transformers'.

    Returns:
        The run, or `None` without `"wandb"` in `report_to`, before a run has started, and on every process but the
        first.
    """
    if "wandb" not in trainer.args.report_to or not trainer.is_world_process_zero():
        return None
    import wandb  # slow to import, and not every run reports to it

    return wandb.run


def log_table(trainer: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log rows as a W&B table, if the trainer reports there.

    Texts of models are untrusted: cells are plain strings, numbers, or empty, never HTML or Markdown.

    Args:
        trainer: The trainer, whose current step the table belongs to.
        name: Key of the table.
        rows: The rows. All have the columns of the first; a list of messages becomes one text.
    """
    run = current_run(trainer)
    if run is not None and rows:
        run.log({name: as_table(rows), _STEP: trainer.state.global_step})


def as_table(rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    """Make a W&B table of rows, see `log_table`.

    Example:
        >>> as_table([{"prompt": [{"role": "user", "content": "<b>"}], "reward": 0.5, "gold": None}]).data
        [['user: <b>', 0.5, None]]
    """
    import wandb

    columns: list[Any] = list(rows[0])
    return wandb.Table(columns=columns, data=[[_cell(row.get(column)) for column in columns] for row in rows])


def define_axis(trainer: Any, axis: str, metrics: Sequence[str]) -> None:
    """Let metrics be drawn against a metric other than the step, if the trainer reports to W&B.

    Args:
        trainer: The trainer, with its W&B run started.
        axis: Key of the horizontal axis.
        metrics: Keys of what is drawn against it; each goes into a row with the axis.
    """
    run = current_run(trainer)
    if run is not None:
        run.define_metric(axis)
        for metric in metrics:
            run.define_metric(metric, step_metric=axis)


def log_row(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Log numbers in one row of the W&B run's history, if the trainer reports there."""
    run = current_run(trainer)
    if run is not None:
        run.log({**metrics, _STEP: trainer.state.global_step})


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None  # whole numbers and others in one column
    return as_text(value)
