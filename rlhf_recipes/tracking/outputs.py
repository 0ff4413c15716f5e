"""Outputs of a stage for its W&B run: the adapter for the lineage graph, and the numbers of its evaluation."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.tracking.lineage import read_run, write_run
from rlhf_recipes.tracking.wandb_log import as_table

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

# Weights as safetensors, and what describes them and the tokenizer. Pickles such as training_args.bin can run code.
_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "*config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template.jinja", "reward_model.json"),
)


def log_outputs(run: wandb.Run | None, output_dir: str) -> None:
    """Log what a finished stage has left in its folder.

    The numbers of `evaluation.json` become the run's summary, as `evaluation/win_rate` and so on, and its samples the
    table `evaluation/samples`. If the run is online, the adapter becomes an artifact of the type `adapter`, named
    `<recipe>-<stage>`, with the run's id as an alias; `run.json` gets its name, so that the next stage can say that it
    uses it (`start_run`). Call it as the last thing of a stage, on every process.

    Args:
        run: What `start_run` returned.
        output_dir: Folder of the stage.

    Example:
        >>> log_outputs(None, "outputs/quickstart/sft")  # no W&B, or not the main process
    """
    if run is None:
        return
    evaluation = json.loads(Path(output_dir, "evaluation.json").read_text(encoding="utf-8"))
    run.summary.update(flat_numbers(evaluation))
    if evaluation.get("samples"):
        run.log({"evaluation/samples": as_table(evaluation["samples"])})
    if not run.offline and not run.disabled:
        _hand_over(run, output_dir)


def flat_numbers(record: Mapping[str, Any], prefix: str = "evaluation") -> dict[str, float]:
    """Take the numbers out of a record of an evaluation, under the names that the dashboards know.

    Args:
        record: Numbers, mappings of them at any depth, and intervals, which are lists of two numbers.
        prefix: First part of the names.

    Returns:
        The numbers; an interval `x_ci` as `x_low` and `x_high`. Anything else is left out.

    Example:
        >>> flat_numbers({"policy": {"kl": 2.5}, "win_rate": 0.8, "win_rate_ci": [0.7, 0.9], "win_rate_by": "gold"})
        {'evaluation/policy/kl': 2.5, 'evaluation/win_rate': 0.8, 'evaluation/win_rate_low': 0.7,
        'evaluation/win_rate_high': 0.9}
    """
    numbers: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            numbers |= flat_numbers(value, name)
        elif isinstance(value, list) and key.endswith("_ci") and len(value) == 2:
            numbers |= {
                f"{name.removesuffix('_ci')}_{end}": number for end, number in zip(("low", "high"), value, strict=True)
            }
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = value
    return numbers


def adapter_artifact(output_dir: str | Path, record: Mapping[str, Any]) -> wandb.Artifact:
    """Describe the adapter of a stage as a W&B artifact; nothing is logged.

    Args:
        output_dir: Folder of the stage. Of its files, and of those of its roles' folders (the critic's), only weights
            in safetensors, configurations and tokenizer files are taken.
        record: The stage's `run.json`.

    Returns:
        The artifact.
    """
    import wandb

    name = re.sub(r"[^\w.-]", "_", f"{record['recipe']}-{record['stage']}", flags=re.ASCII)
    metadata = {key: record.get(key) for key in ("recipe", "stage", "git_commit", "parents")}
    artifact = wandb.Artifact(name[:128], type="adapter", metadata=metadata)
    for path in _weights(Path(output_dir)):
        artifact.add_file(str(path), name=str(path.relative_to(output_dir)))
    return artifact


def use_parents(run: wandb.Run, record: Mapping[str, Any]) -> None:
    """Declare the artifacts of a run's parents as its inputs, as far as these have logged any.

    Args:
        run: The run, online.
        record: Its record, whose `parents` have a `wandb_artifact` where one was logged.
    """
    for parent in record["parents"]:
        if "wandb_artifact" in parent:
            try:
                run.use_artifact(parent["wandb_artifact"])
            except Exception as error:  # removed from W&B, say: no reason not to train
                logger.warning("W&B did not give the parent's artifact %s: %s", parent["wandb_artifact"], error)


def _hand_over(run: wandb.Run, output_dir: str) -> None:
    record = read_run(output_dir)
    if record is None:
        raise FileNotFoundError(f"{output_dir} has no run.json: `start_run` writes it at the start of a stage.")
    try:
        artifact = adapter_artifact(output_dir, record)
        run.log_artifact(artifact, aliases=["latest", run.id])
    except Exception as error:  # all results are on disk, and the next stage needs only those
        logger.warning("The adapter in %s could not be logged to W&B: %s", output_dir, error)
        return
    write_run(output_dir, {**record, "wandb_artifact": f"{run.entity}/{run.project}/{artifact.name}:{run.id}"})


def _weights(folder: Path) -> Iterator[Path]:
    roles = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("checkpoint-")]
    for place in (folder, *(role for role in roles if any(role.glob("*.safetensors")))):
        files = {file for pattern in _PATTERNS for file in place.glob(pattern) if file.is_file()}
        yield from sorted(files)
