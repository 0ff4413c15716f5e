"""Two real stages of a tiny recipe, run once: what W&B and TensorBoard know of them is read from the disk."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

# The stages of the reward model and of PPO, one after the other in one process, as the scripts are.
STAGES = """
import importlib, pathlib, sys
from rlhf_recipes.config import parse_stage

sys.path.insert(0, sys.argv[1])
for config in sys.argv[2:]:
    module = importlib.import_module(pathlib.Path(config).stem)
    module.main(*parse_stage(module.ARGUMENTS, ["--config", config]))
"""

HOSTILE = "<script>alert(1)</script> [x](javascript:alert(2))"


def read_offline(folder):
    """Read the log of an offline W&B run: protobuf records in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("run-*.wandb")
    data, place, part, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block is padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(part))
            part = b""
    return records


def facts(folder):
    """What the run will say after `wandb sync`: its place, config, history, summary, defined metrics and artifacts."""
    found = SimpleNamespace(config={}, history=[], summary={}, metrics={}, artifacts={}, tables=defaultdict(list))
    for record in read_offline(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
        if kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            found.config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in update}
        elif kind == "history":
            found.history.append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            found.summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found.artifacts[record.artifact.name] = record.artifact
    for row in found.history:
        for name in [key.removesuffix("/_type") for key, value in row.items() if value == "table-file"]:
            table = json.loads((folder / "files" / row[f"{name}/path"]).read_text())
            found.tables[name].append(
                [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
            )
    return found


def _name(item):
    return item.key or "/".join(item.nested_key)


@pytest.fixture(scope="session")
def stages(repo_root, tiny_model_path, sft_adapter, reward_adapter, tiny_texts, tmp_path_factory):
    """Folder of a recipe with a reward model and a PPO run that evaluates, and whose alarm goes off."""
    folder = tmp_path_factory.mktemp("tracked")
    pairs = [{"prompt": text, "chosen": " good", "rejected": " bad"} for text in tiny_texts]
    prompts = [{"prompt": text} for text in tiny_texts]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "model_name_or_path": tiny_model_path,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": ["wandb", "tensorboard"],
        "lora_r": 4,
        "disable_tqdm": True,
    }
    reward = {"dataset_name": f"{folder}/pairs.jsonl", "output_dir": f"{folder}/tiny/reward", "max_steps": 2}
    ppo = {
        "dataset_name": f"{folder}/prompts.jsonl",
        "dataset_test_split": "train",
        "output_dir": f"{folder}/tiny/ppo",
        "sft_adapter": str(sft_adapter),
        "reward_adapter": f"{folder}/tiny/reward",
        "gold_score": f"{folder}/gold_score",
        "max_steps": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "num_iterations": 1,
        "steps_per_generation": 1,
        "log_completions": True,
        "evaluation_steps": 2,
        "evaluation_rows": 8,
        "alarm_kl_budget": 1e-9,
    }
    shutil.copytree(reward_adapter, folder / "gold_score")
    files = []
    for stage, options in (("reward", reward), ("ppo", ppo)):
        files.append(f"{folder}/{stage}.yaml")
        Path(files[-1]).write_text(yaml.safe_dump(common | options))
    clean = {key: value for key, value in os.environ.items() if not re.match("WANDB|NETRC", key)}
    environment = clean | {"HOME": str(folder), "PYTHONPATH": str(repo_root)}
    command = [sys.executable, "-c", STAGES, str(repo_root / "recipes"), *files]
    finished = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder / "tiny"


@pytest.fixture(scope="session")
def offline(stages):
    """What W&B knows of each stage, by its name."""
    return {stage: facts(next((stages / stage / "wandb").glob("offline-run-*"))) for stage in ("reward", "ppo")}
