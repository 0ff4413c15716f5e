"""Small JSON files in a run's folder: written whole or not at all, and read even where they are damaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from rlhf_recipes.checkpoints import write_whole
from rlhf_recipes.statistics.numbers import none_for_nonfinite

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"  # what the files of a folder were made with


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
    write_whole(path, json.dumps(none_for_nonfinite(records), indent=1, ensure_ascii=False) + "\n")


def check_settings(folder: str | Path, settings: dict[str, Any]) -> None:
    """Refuse a folder whose files were made with other settings, or that holds anything else.

    Args:
        folder: Where files go. It may be missing or empty.
        settings: What makes the files what they are, as JSON can hold it; `write_records` writes them into `SETTINGS`.

    Raises:
        FileExistsError: If they cannot be gone on with; it names what differs.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> check_settings(folder, {"best_of": 8})
        >>> write_records(folder / SETTINGS, {"best_of": 8})
        >>> check_settings(folder, {"best_of": 4})
        Traceback (most recent call last):
        ...
        FileExistsError: ... has files of other settings: `best_of` 8 there, and 4 now. Choose another ...
    """
    folder = Path(folder)
    file = folder / SETTINGS
    if not file.is_file():
        # Whoever is killed while the settings are written leaves a part of them
        if folder.exists() and any(path.suffix != ".part" for path in folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty. Choose another `--output_dir`, or remove the folder.")
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    names = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
    if names:
        changes = ", ".join(f"`{name}` {there.get(name)} there, and {settings.get(name)} now" for name in names)
        raise FileExistsError(
            f"{folder} has files of other settings: {changes}. Choose another `--output_dir`, or remove it."
        )


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
