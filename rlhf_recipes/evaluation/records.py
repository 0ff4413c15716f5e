"""Small JSON files in a run's folder: written whole or not at all, and read even where they are damaged."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from rlhf_recipes.statistics.numbers import none_for_nonfinite

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


def write_records(path: str | Path, records: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON file in one go, so that a run that is killed leaves the old one or the new one.

    A number that is not finite becomes `null`, which every reader of JSON understands; half of a surrogate pair, which
    no file in UTF-8 can hold, becomes a question mark.

    Args:
        path: The file; its folder is made where it is missing.
        records: What to write.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "alarms.json"
        >>> write_records(path, [{"step": 3, "kl": float("nan")}])
        >>> read_records(path)
        [{'step': 3, 'kl': None}]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    text = json.dumps(none_for_nonfinite(records), indent=1, ensure_ascii=False) + "\n"
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, path)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read a list of records with their `step`. A file that is missing or damaged is an empty list, with a warning.

    Args:
        path: The file: a JSON list, or JSON lines if its name ends in `.jsonl`, of which damaged ones are left out.

    Returns:
        The records that have a whole number as `step`.
    """
    path = Path(path)
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    rows: list[Any] = []
    for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
        try:
            value = json.loads(part)
        except ValueError:
            logger.warning("A part of %s is no JSON and is left out: %r", path, part[:60])
            continue
        rows += value if isinstance(value, list) else [value]
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def log_apart(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log metrics in an entry of their own, without a trace in the entries of the training.

    TRL's own `log` would add what the trainer has collected so far, and the entry of the training that is due at this
    step would be taken for done.

    Args:
        trainer: The trainer; any.
        metrics: What to log at the current step.
    """
    due = trainer.control.should_log
    Trainer.log(trainer, dict(metrics))
    trainer.control.should_log = due


class RecordingCallback(TrainerCallback):
    """Keep records in `file_name`, an empty list from the start; a resumed run keeps those up to its checkpoint.

    Args:
        trainer: The trainer.
    """

    file_name: str

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._records: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the list, or take up the one of the run that is resumed."""
        self._records = [row for row in read_records(self._file()) if row["step"] <= state.global_step]
        self._write(state)

    def _record(self, record: dict[str, Any], state: TrainerState) -> None:
        self._records.append(record)
        self._write(state)

    def _file(self) -> Path:
        return Path(str(self._trainer.args.output_dir)) / self.file_name

    def _write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            write_records(self._file(), self._records)
