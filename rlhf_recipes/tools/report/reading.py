"""Read what a run left on disk. Whatever is damaged or absent becomes a sentence, never an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow
import pyarrow.parquet

from rlhf_recipes.statistics.numbers import is_number

Record = dict[str, Any]

KINDS = ("sft", "reward", "ppo")  # the stages that have a section of their own; all others are "other"
_WITHOUT_CRITIC = ("grpo", "rloo")  # stages that stand in the section of PPO
_CHECKS = ("certificate", "verifier")  # of a reward, before a training
_LOGS = ("run.json", "trainer_state.json", "evaluation.json", "frontier.json")
_RECORDS = (*_LOGS, *(f"{name}.json" for name in _CHECKS))
_LISTS = ("alarms.json", "critic_health.json", "training_health.json")
_FILES = {*_RECORDS, *_LISTS, "policy_evaluation.jsonl", "completions"}
_ORDER = ("world", "base", "sft", "preferences", "reward", "ppo", *_WITHOUT_CRITIC)
_MOST_COMPLETIONS = 512


@dataclass
class Stage:
    """Records that one stage left in its folder.

    Attributes:
        name: How the report calls it; with several runs it starts with the run's name.
        folder: Its folder.
        kind: `sft`, `reward`, `ppo` (any training on rewards), or `other`.
        records: The contents of its JSON files by name; an empty one for what is not there.
        history: The log: entries with a whole number `step`.
        alarms: Alarms and warnings with their `step`; `None` if no hook looked for any.
        evaluations: Lines of `policy_evaluation.jsonl`.
        completions: Rows of the last table of completions that can be read.
        missing: What is missing or damaged, in sentences.
    """

    name: str
    folder: Path
    kind: str = "other"
    records: dict[str, Record] = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    alarms: list[Record] | None = None
    evaluations: list[Record] = field(default_factory=list)
    completions: list[Record] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        """True if it left a log or an evaluation: the folder of a certificate or a verifier alone has none."""
        return bool(self.history or self.record("evaluation"))

    @property
    def only_checks(self) -> bool:
        """True if it trained nothing, and holds a certificate or what a verifier pays."""
        return not self.trained and any(map(self.record, _CHECKS))

    def record(self, name: str) -> Record:
        """Return what `<name>.json` holds, or nothing."""
        return self.records.get(f"{name}.json", {})


@dataclass
class Run:
    """The folder of a run, with its stages in the order in which they ran.

    Attributes:
        name: How the report calls it.
        folder: Its folder.
        stages: Its stages; of a run in rounds, PPO of each round and the reward models of the last one.
        missing: What is missing or damaged, in sentences.
        rounds: What each round's `round.json` holds, in their order; a run that is not in rounds has none.
    """

    name: str
    folder: Path
    stages: list[Stage]
    missing: list[str] = field(default_factory=list)
    rounds: list[Record] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Stage]:
        """Its stages of one kind."""
        return [stage for stage in self.stages if stage.kind == kind]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read folders: each that of a recipe, whose stages are folders in it or in its rounds, or of a single stage.

    Args:
        folders: At least one.

    Returns:
        A run per folder, named by the shortest end of its path that tells it from the others.

    Raises:
        ValueError: If none is given.
        NotADirectoryError: If one is not there, or is no folder.
    """
    if not folders:
        raise ValueError("Give at least one folder of a run, such as outputs/quickstart.")
    for folder in folders:
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"{folder} must be the folder of a recipe or a stage, and is no folder.")
    paths = {Path(folder).resolve(): Path(folder) for folder in folders}
    runs = [_read_run(folder, name) for folder, name in zip(paths.values(), _names(list(paths)), strict=True)]
    for run in runs:
        for stage in run.stages:
            is_single = stage.folder == run.folder or (len(runs) > 1 and len(run.of_kind(stage.kind)) == 1)
            stage.name = run.name if is_single else f"{run.name}/{stage.name}" if len(runs) > 1 else stage.name
    return runs


def finite(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number that can be drawn.

    Example:
        >>> [finite(value) for value in (1, 2.5, float("nan"), None, "3", True)]
        [True, True, False, False, False, False]
    """
    return is_number(value) and abs(value) < 1e300


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Read one metric from a log.

    Args:
        history: Entries with a `step`.
        key: Name of the metric.

    Returns:
        Steps and values where it was logged. A value that is no finite number is NaN, a gap in a plot.

    Example:
        >>> series([{"step": 1, "kl": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "kl": None}], "kl")
        ([1, 3], [0.5, nan])
    """
    rows = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in rows], [float(value) if finite(value) else math.nan for _, value in rows]


def gold_metric(stage: Stage) -> str | None:
    """Find the metric of the reward function that judged a training without an influence on it.

    Args:
        stage: A stage that trained on rewards.

    Returns:
        `rewards/<name>/mean` with the gold scores of `frontier.json`; without those, the one that is named `gold...`
        beside others; `None` if there is none.

    Example:
        >>> history = [{"step": 1, "reward": 0.1, "rewards/reward/mean": 0.1, "rewards/gold_score/mean": 0.7}]
        >>> gold_metric(Stage("ppo", Path("ppo"), history=history))
        'rewards/gold_score/mean'
    """
    keys = sorted({key for entry in stage.history for key in entry if re.fullmatch(r"rewards/.+/mean", key)})
    curve = stage.record("frontier").get("training")
    points = curve.get("points") if isinstance(curve, dict) else None
    rows = [row for row in points if isinstance(row, dict)] if isinstance(points, list) else []
    gold = {row["step"]: row["gold"] for row in rows if finite(row.get("step")) and finite(row.get("gold"))}
    for key in keys:
        pairs = [
            (entry[key], gold[entry["step"]]) for entry in stage.history if key in entry and entry["step"] in gold
        ]
        if pairs and all(logged == judged for logged, judged in pairs):
            return key
    return next((key for key in keys if key.startswith("rewards/gold")), None) if len(keys) > 1 else None


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.parts[1:] or path.parts for path in paths]
    longest = max(len(own) for own in parts)
    for length in range(1, longest + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read_run(folder: Path, name: str) -> Run:
    run = Run(name, folder, [])
    try:
        inside = _folders_in(folder)
        rounds = [path for path in inside if re.fullmatch(r"round_\d+", path.name)]
        nested = [path for one in rounds for path in _folders_in(one) if path.name == "ppo" or one == rounds[-1]]
        folders = [path for path in (folder, *inside, *nested) if _is_stage(path)]
    except OSError as error:
        run.missing.append(f"The folder cannot be read: {error}.")
        return run
    run.rounds = [record for one in rounds if (record := _read_json(run, one / "round.json", dict))]
    run.stages = stages = sorted((_read_stage(path) for path in folders), key=_place)
    for stage in stages:
        if stage.folder in nested:
            stage.name = stage.folder.relative_to(folder).as_posix()
    missing = run.missing
    if not stages:
        missing.append("The folder holds no stage: none of the files that a run leaves is in it.")
    for kind, title in (("sft", "SFT"), ("reward", "reward model"), ("ppo", "PPO, GRPO or RLOO")):
        if stages and folder not in folders and not any(stage.kind == kind for stage in stages):
            missing.append(f"No {title} stage is in the folder.")
    return run


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("checkpoint-"))


def _is_stage(folder: Path) -> bool:
    return any((folder / name).exists() for name in _FILES) or _last_checkpoint(folder) is not None


def _place(stage: Stage) -> tuple[int, bool, str]:
    """The order of the stages; a check of a reward in a folder of its own comes after the reward model."""
    names = (stage.record("run").get("stage"), stage.kind, stage.folder.name)
    place = next((_ORDER.index(name) for name in names if name in _ORDER), len(_ORDER))
    return place, not stage.trained, stage.folder.as_posix()


def _last_checkpoint(folder: Path) -> Path | None:
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    states = [path / "trainer_state.json" for path in checkpoints if (path / "trainer_state.json").is_file()]
    return max(states, key=lambda path: int(path.parent.name.split("-")[1]), default=None)


def _read_stage(folder: Path) -> Stage:
    stage = Stage(folder.name, folder)
    stage.records = {name: _read_json(stage, folder / name, dict) or {} for name in _RECORDS}
    state = stage.record("trainer_state")
    checkpoint = _last_checkpoint(folder)
    if not state and checkpoint is not None:
        state = stage.records["trainer_state.json"] = _read_json(stage, checkpoint, dict) or {}
        stage.missing.append(f"The run did not end well: its log is that of {checkpoint.parent.name}.")
    stage.history = _history(stage, state)
    lists = [_read_json(stage, folder / name, list) for name in _LISTS]
    if any(rows is not None for rows in lists):
        stage.alarms = [row for rows in lists for row in rows or [] if isinstance(row, dict)]
    stage.evaluations = _read_lines(stage, folder / "policy_evaluation.jsonl")
    stage.kind = _kind(stage)
    stage.completions = _read_completions(stage)
    _note_absent(stage)
    return stage


def _read_json(stage: Stage | Run, path: Path, expected: type) -> Any:
    if not path.is_file():
        return None
    name = path.relative_to(stage.folder)
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        stage.missing.append(f"{name} is damaged, perhaps cut off: {error}.")
        return None
    except OSError as error:
        stage.missing.append(f"{name} cannot be read: {error}.")
        return None
    if isinstance(value, expected):
        return value
    stage.missing.append(f"{name} must hold a {expected.__name__}, but holds a {type(value).__name__}.")
    return None


def _read_lines(stage: Stage, path: Path) -> list[Record]:
    if not path.is_file():
        return []
    rows, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _has_step(row):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        stage.missing.append(f"{path.name}: {damaged} damaged lines are left out.")
    return rows


def _has_step(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int) and finite(row["step"])


def _history(stage: Stage, state: Record) -> list[Record]:
    if not state:
        return []
    rows = state.get("log_history")
    if not isinstance(rows, list):
        stage.missing.append("trainer_state.json has no list `log_history`: it may be from another version.")
        return []
    steps = [row for row in rows if _has_step(row)]
    if len(steps) < len(rows):
        stage.missing.append(f"trainer_state.json: {len(rows) - len(steps)} log entries without a step are left out.")
    if not steps:
        stage.missing.append("trainer_state.json has an empty log: nothing was trained, or nothing logged.")
    return steps


def _kind(stage: Stage) -> str:
    """Return the kind that `run.json` names, and without it the one that the logs look like."""
    recorded = stage.record("run").get("stage")
    keys = {key for entry in stage.history for key in entry}
    if recorded in _WITHOUT_CRITIC:
        return "ppo"
    if recorded is not None:
        return recorded if recorded in KINDS else "other"
    if {"kl", "reward", "completions/mean_length"} & keys or "policy" in stage.record("evaluation"):
        return "ppo"
    if {"margin", "accuracy"} & keys or stage.record("certificate"):
        return "reward"
    if "loss" in keys:
        return "sft"
    if stage.record("verifier"):
        return "reward"
    return stage.folder.name if stage.folder.name in KINDS else "other"


def _read_completions(stage: Stage) -> list[Record]:
    files = sorted((stage.folder / "completions").glob("*.parquet"), reverse=True)
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                batch = next(table.iter_batches(batch_size=_MOST_COMPLETIONS), None)
            return [] if batch is None else list(batch.to_pylist())
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            stage.missing.append(f"completions/{file.name} is damaged, perhaps cut off: {reason}")
    return []


def _note_absent(stage: Stage) -> None:
    """Note what a stage of its kind has and this one has not."""
    consequences = {
        "run.json": "the command, commit and versions are not known.",
        "trainer_state.json": "there are no curves; the run did not end, or saved nothing.",
        "evaluation.json": "the run did not end, or its evaluation is off.",
    }
    expected = list(consequences) if stage.kind in KINDS and not stage.only_checks else []
    if stage.kind == "ppo" and not (stage.folder / "completions").is_dir():
        stage.missing.append("completions/ is not there: no completions of the training (`log_completions: true`).")
    for name in expected:
        in_checkpoint = name == "trainer_state.json" and _last_checkpoint(stage.folder) is not None
        if not (stage.folder / name).is_file() and not in_checkpoint:
            stage.missing.append(f"{name} is not there: {consequences[name]}")
    if stage.kind == "ppo" and stage.alarms is None:
        stage.missing.append("alarms.json is not there: no alarm watched this run.")
