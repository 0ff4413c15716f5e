"""Two real stages of a tiny recipe, run once: what W&B and TensorBoard know of them is read from the disk."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tests.tracking.fake_wandb import FakeWandb
from tests.tracking.offline import facts

REPO_ROOT = Path(__file__).resolve().parents[2]

# The stages of the reward model and of PPO, one after the other in one process, as scripts; and what they load.
STAGES = """
import importlib, pathlib, sys
from rlhf_recipes.config import parse_stage

sys.path.insert(0, sys.argv[1])
for config in sys.argv[2:]:
    module = importlib.import_module(pathlib.Path(config).stem)
    module.main(*parse_stage(module.ARGUMENTS, ["--config", config]))

import rlhf_recipes.tools.cli
pathlib.Path("loaded").write_text("\\n".join(sys.modules))
"""


def run_python(arguments, folder, **variables):
    """Run Python in a folder that is its home too, without W&B settings, credentials or a terminal."""
    clean = {key: value for key, value in os.environ.items() if not re.match("WANDB|NETRC", key)}
    environment = clean | {"HOME": str(folder), "PYTHONPATH": str(REPO_ROOT)} | variables
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="session")
def run_alone():
    """Run Python with nothing of W&B around it: `run_alone(["-c", code], folder, WANDB_MODE="offline")`."""
    return run_python


@pytest.fixture
def server():
    """A stand-in for W&B's server, with a key for it: `run_alone(..., **server.settings)`."""
    with FakeWandb() as server:
        yield server


@pytest.fixture(scope="session")
def stages(tiny_model_path, sft_adapter, reward_adapter, tiny_texts, tmp_path_factory):
    """Folder of a recipe with a reward model and a PPO run that evaluates, and whose alarm goes off."""
    # The first to need them runs them for all workers, and for the folders of tests that import this fixture
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tracked"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_stages(folder, tiny_model_path, sft_adapter, reward_adapter, tiny_texts)
    return folder / "tiny"


def run_stages(folder, model, sft_adapter, reward_adapter, texts):
    pairs = [{"prompt": text, "chosen": " good", "rejected": " bad"} for text in texts]
    prompts = [{"prompt": text} for text in texts]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "model_name_or_path": model,
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
    finished = run_python(["-c", STAGES, REPO_ROOT / "recipes", *files], folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder / "tiny"


@pytest.fixture(scope="session")
def offline(stages):
    """What W&B knows of each stage, by its name."""
    return {stage: facts(next((stages / stage / "wandb").glob("offline-run-*"))) for stage in ("reward", "ppo")}
