"""Read the folder of a finished stage, and refuse what cannot be exported before any weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig

from rlhf_recipes.models.adapters import WEIGHTS, base_to_load, is_adapter
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.models.trained_on import TrainedOn, read_trained_on
from rlhf_recipes.ppo.checkpoint import EMA
from rlhf_recipes.tracking import read_run, read_settings

STAGES = {
    "sft": "supervised fine-tuning",
    "reward": "reward modelling",
    "ppo": "PPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
}


@dataclass(frozen=True)
class FinishedRun:
    """What a finished stage left in its folder.

    Attributes:
        folder: The folder.
        stage: One of `STAGES`.
        adapter: The adapter's configuration; `None` for a whole model.
        base: Hub id or existing folder of the adapter's base; `None` for a whole model.
        revision: Of the base, on the hub.
        settings: The run's settings that differ from the defaults; `None` for a run that left none.
        record: `run.json`.
        evaluation: `evaluation.json`; empty for a model that was averaged.
        trained_on: Texts with the numbers that the adapter gave for them in training.
        readout: How a reward model's score is read.
    """

    folder: Path
    stage: str
    adapter: PeftConfig | None
    base: str | None
    revision: str
    settings: dict[str, Any] | None
    record: dict[str, Any]
    evaluation: dict[str, Any]
    trained_on: TrainedOn | None
    readout: Readout

    @property
    def task(self) -> Literal["policy", "reward"]:
        """What the model does."""
        return "reward" if self.stage == "reward" else "policy"

    @property
    def source(self) -> str:
        """Where the whole weights are: the base of an adapter, or the folder itself."""
        return self.base or str(self.folder)


def read_finished_run(folder: str | Path) -> FinishedRun:
    """Read the folder of a finished stage.

    Args:
        folder: The output folder of an SFT or reward stage, or of one that trained on rewards, or `ema/` in one.

    Returns:
        The run.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks weights, or the adapter's base is not there.
        ValueError: If it is no run, or not finished, or one of its files is damaged.

    Example:
        >>> read_finished_run("outputs/none")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no folder outputs/none. Give the output folder of a stage.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the output folder of a stage.")
    run = folder.parent if folder.name == EMA else folder  # the average of a policy's weights lies in its run
    record = read_run(run)
    stage = record.get("stage") if isinstance(record, dict) else None
    if record is None or stage not in STAGES:
        inside = sorted(str(path.parent) for path in folder.glob("*/run.json"))
        places = ", ".join(inside) or "the output folders of SFT, reward, PPO, GRPO and RLOO stages"
        what = "it has no run.json" if record is None else f"its run.json names the stage {stage!r}"
        raise ValueError(f"{folder} cannot be exported: {what}. Give one of {places}.")
    adapted = is_adapter(folder)
    weights = folder / WEIGHTS if adapted else next(folder.glob("model*.safetensors"), folder / "model.safetensors")
    evaluation = _evaluation(run)
    if run is not folder and isinstance(evaluation.get("ema"), dict):
        evaluation |= {"policy": evaluation["ema"], **evaluation["ema"]}
    if adapted and not evaluation:
        raise ValueError(
            f"The run in {folder} is not finished: it has no evaluation.json, which a stage writes last. Resume it "
            "with `--resume_from_checkpoint true`."
        )
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no {weights.name}. Only weights in safetensors files are exported.")
    settings = read_settings(run)
    adapter = PeftConfig.from_pretrained(str(folder)) if adapted else None
    revision = (settings or {}).get("model_revision") or getattr(adapter, "revision", None) or "main"
    return FinishedRun(
        folder,
        str(stage),
        adapter,
        base_to_load(folder) if adapted else None,
        str(revision),
        settings,
        record,
        evaluation,
        read_trained_on(folder),
        Readout.load(folder),
    )


def _evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    if not path.is_file():
        return {}
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not isinstance(evaluation, dict):
        raise ValueError(f"{path} must hold the numbers of an evaluation, found {type(evaluation).__name__}.")
    return evaluation
