"""The output folder of a stage: nothing is overwritten, and only complete checkpoints are resumed from."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"


def check_output_dir(training_args: TrainingArguments) -> str | None:
    """Find the checkpoint to resume from, and refuse to write into a folder that holds anything else.

    Call it before anything is written. Only processes that write complain, so that none of them takes the files of a
    faster one for those of an older run.

    Args:
        training_args: `output_dir` is the folder; `resume_from_checkpoint` is `true` for the last complete checkpoint
            in it, or the path of one.

    Returns:
        The checkpoint's path for `trainer.train(resume_from_checkpoint=...)`, or `None` for a fresh start.

    Raises:
        FileExistsError: If the folder is not empty and the run does not resume from a checkpoint in it.
        FileNotFoundError: If there is no checkpoint to resume from.

    Example:
        >>> import tempfile
        >>> from types import SimpleNamespace
        >>> folder = Path(tempfile.mkdtemp())
        >>> args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=None, should_save=True)
        >>> check_output_dir(args)
        >>> _ = (folder / "notes.txt").write_text("do not lose me")
        >>> check_output_dir(args)
        Traceback (most recent call last):
        ...
        FileExistsError: ... is not empty. Choose another `--output_dir`, or remove the folder.
    """
    folder = Path(str(training_args.output_dir))
    checkpoints = complete_checkpoints(folder)
    resume = str(training_args.resume_from_checkpoint or "")
    if resume.lower() in ("", "false"):
        checkpoint = None
    elif resume.lower() == "true":
        if not checkpoints:
            raise FileNotFoundError(
                f"{folder} has no complete checkpoint to resume from. Start afresh, without `resume_from_checkpoint`."
            )
        checkpoint = checkpoints[max(checkpoints)]
    else:
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise FileNotFoundError(f"There is no checkpoint {checkpoint} to resume from.")
    resumes_here = checkpoint is not None and folder.resolve() in checkpoint.resolve().parents
    if training_args.should_save and not resumes_here and folder.exists() and any(folder.iterdir()):
        resuming = "Resume it with `--resume_from_checkpoint true`, choose" if checkpoints else "Choose"
        raise FileExistsError(f"{folder} is not empty. {resuming} another `--output_dir`, or remove the folder.")
    if checkpoint is not None and _is_complete(checkpoint) and not _has_schedule(checkpoint):
        logger.warning(
            "%s has no scheduler.pt: saved with `save_only_model`, it lacks optimizer and schedule, and the learning "
            "rate starts again at the top.",
            checkpoint,
        )
    return None if checkpoint is None else str(checkpoint)


def complete_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Find the checkpoints in a stage's folder that were written to their end, by their steps.

    Args:
        folder: The folder; it may be missing.

    Example:
        >>> complete_checkpoints("outputs/never/made")
        {}
    """
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit() and _is_complete(path)]
    return {int(path.name[11:]): path for path in paths}


def is_finished(training_args: TrainingArguments, checkpoint: str | None) -> bool:
    """Return whether a run to be resumed has made all its steps and was evaluated: nothing is left to do.

    Args:
        training_args: The stage's configuration.
        checkpoint: What `check_output_dir` returned.

    Example:
        >>> is_finished(None, None)
        False
    """
    if checkpoint is None or not _has_made_all_steps(training_args, checkpoint):
        return False
    evaluated = (Path(str(training_args.output_dir)) / "evaluation.json").is_file()
    if evaluated and training_args.should_save:
        logger.warning("%s is finished: all steps are made, and evaluation.json is there.", training_args.output_dir)
    return evaluated


def write_whole(path: str | Path, text: str) -> None:
    r"""Write a file in one go: whoever is killed leaves the old file or the new one, never a part.

    Half of a surrogate pair, which no file in UTF-8 can hold, becomes a question mark.

    Args:
        path: The file; its folder is made where it is missing.
        text: What it is to hold.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows", "train.jsonl")
        >>> write_whole(path, "{}\n")
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('{}\n', ['train.jsonl'])
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, path)


def save_evaluation(evaluation: dict[str, Any], output_dir: str | Path) -> Path:
    r"""Write `evaluation.json` into a stage's folder: the stage is finished then, see `is_finished`.

    Args:
        evaluation: What JSON can hold.
        output_dir: The folder, which exists.

    Returns:
        Path of the file.

    Example:
        >>> import tempfile
        >>> save_evaluation({"accuracy": 0.75}, tempfile.mkdtemp()).read_text()
        '{\n  "accuracy": 0.75\n}\n'
    """
    path = Path(output_dir, "evaluation.json")
    write_whole(path, json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")
    return path


def load_finished(trainer: Trainer, checkpoint: str | None) -> TrainOutput | None:
    """Load a checkpoint of the last step, after which transformers would make one more if it lies within a pass.

    Args:
        trainer: The trainer, which gets the weights and the history.
        checkpoint: The checkpoint to resume from, if any.

    Returns:
        What `trainer.train` returns of a run; `None` if there are steps to make, and nothing was done.
    """
    if checkpoint is None or not _has_made_all_steps(trainer.args, checkpoint):
        return None
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / _STATE))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    logger.warning(
        "%s is of the last step, so nothing is trained. Raise `max_steps` or `num_train_epochs` to go on.", checkpoint
    )
    return TrainOutput(trainer.state.global_step, 0.0, {})


class KeptRates(TrainerCallback):
    """Warn that a resumed run goes on at its checkpoint's rate and weight decay, where others are configured."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare what was loaded from the checkpoint with the configuration."""
        optimizer, rates = kwargs.get("optimizer"), getattr(kwargs.get("lr_scheduler"), "base_lrs", None)
        if not state.global_step or optimizer is None or not rates or not args.should_save:
            return
        decay = max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)  # biases have none
        for name, loaded in (("learning_rate", max(rates)), ("weight_decay", decay)):
            if loaded != getattr(args, name):
                logger.warning(
                    "`%s` is %s, but a resumed run goes on with its checkpoint's, %s. Start a new run to change it.",
                    *(name, getattr(args, name), loaded),
                )


def _has_schedule(checkpoint: Path) -> bool:
    return (checkpoint / "scheduler.pt").is_file() or any(checkpoint.glob("global_step*"))  # the latter: DeepSpeed's


def _has_made_all_steps(training_args: TrainingArguments, checkpoint: str) -> bool:
    try:
        state = json.loads((Path(checkpoint) / _STATE).read_text(encoding="utf-8"))
    except OSError:
        return False
    if training_args.max_steps > 0:
        return bool(state["global_step"] >= training_args.max_steps)
    return bool((state.get("epoch") or 0.0) >= training_args.num_train_epochs)


def _is_complete(checkpoint: Path) -> bool:
    # Trainer writes this file last. A process that was killed while it wrote leaves a part of it, or none.
    try:
        return "global_step" in json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
