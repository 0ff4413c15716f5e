import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import accelerate
import pytest
from transformers import TrainingArguments
from trl import ModelConfig

from rlhf_recipes.tracking import read_run, start_run, start_stage, wandb_run

STAGE = {"recipe": "quickstart", "stage": "sft", "config": {"learning_rate": 0.5}}

# Two stages of one recipe, the first of which is then resumed; what W&B knows of each is printed.
PIPELINE = """
import json, sys, torch, wandb
from transformers import TrainerState, TrainingArguments
from transformers.integrations import WandbCallback
from rlhf_recipes.tracking import start_run

def show(run):
    facts = {"id": run.id, "group": run.group, "job_type": run.job_type, "name": run.name, "dir": run.dir}
    line = "RUN " + json.dumps({**facts, "offline": run.offline, "config": dict(run.config)})
    sys.stdout.write("\\n" + line + "\\n")  # in one piece: W&B writes to the same stream from a thread

def start(stage, parent):
    options = {"config": {"learning_rate": 0.5}, "parent": parent, "report_to": ["wandb"]}
    run = start_run(recipe="quickstart", stage=stage, output_dir=f"outputs/{stage}", **options)
    # what the trainer does when it starts to train
    arguments = TrainingArguments(f"outputs/{stage}", learning_rate=0.25, use_cpu=True)
    WandbCallback().setup(arguments, TrainerState(is_world_process_zero=True), torch.nn.Linear(1, 1))
    assert wandb.run is run
    show(run)

start("sft", parent="org/model")
start("ppo", parent=["outputs/sft"])
start("sft", parent="org/model")
"""

# Only the mode that is handed to W&B, which remembers its settings: a process for each case, forked after the imports.
MODES = """
import json, os, sys
import wandb
from rlhf_recipes.tracking import start_run

def init(**options):
    print("MODE", options["mode"], flush=True)
    os._exit(0)

wandb.init = init
for variables in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.environ.update(variables)
        start_run(recipe="r", stage="sft", output_dir="out", config={}, report_to=["wandb"])
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
"""


def run_alone(code, folder, *arguments):
    """Run code in a process without W&B settings, credentials or a terminal, with an empty home."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    paths = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=clean | {"HOME": str(home), "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_stages_share_a_group_and_point_at_their_parents_without_a_key(tmp_path):
    output = run_alone(PIPELINE, tmp_path)
    sft, ppo, resumed = (json.loads(line[4:]) for line in output.splitlines() if line.startswith("RUN "))

    said = re.findall(r"^W&B is offline. To upload this run: wandb sync (.*)$", output, re.MULTILINE)
    assert [folder.split("/")[1] for folder in said] == ["sft", "ppo", "sft"]
    assert all((tmp_path / folder).is_dir() for folder in said)
    assert "wandb:" not in output, "and nothing else"
    assert sft["offline"]
    assert ppo["offline"]
    assert sft["group"] == ppo["group"] == "quickstart"
    assert (sft["job_type"], ppo["job_type"]) == ("sft", "ppo")
    assert (sft["name"], ppo["name"]) == ("quickstart-sft", "quickstart-ppo")
    assert sft["dir"].startswith("outputs/sft/wandb/offline-run-")
    assert list((tmp_path / "outputs" / "ppo" / "wandb").glob("offline-run-*/run-*.wandb"))

    assert sft["config"]["learning_rate"] == 0.25  # the trainer's callback went on with this run
    assert sft["config"]["parents"] == [{"path": "org/model"}]
    parent = ppo["config"]["parents"][0]
    assert (parent["path"], parent["stage"], parent["wandb_run_id"]) == ("outputs/sft", "sft", sft["id"])
    assert "git_commit" in ppo["config"]
    assert ppo["id"] != sft["id"] == resumed["id"]
    assert read_run(tmp_path / "outputs" / "ppo")["wandb_run_id"] == ppo["id"]


@pytest.mark.slow
def test_offline_only_without_a_key_and_a_choice(tmp_path):
    no_key, key, chosen = {}, {"WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}, {"WANDB_MODE": "disabled"}
    output = run_alone(MODES, tmp_path, json.dumps([no_key, key, chosen]))
    assert re.findall(r"^MODE (\w+)$", output, re.MULTILINE) == ["offline", "None", "None"]


def test_without_wandb_the_lineage_is_written_and_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    assert start_run(**STAGE, output_dir=str(tmp_path), parent="org/model", report_to=["tensorboard"]) is None
    record = read_run(tmp_path)
    assert record["parents"] == [{"path": "org/model"}]
    assert "wandb_run_id" not in record


def test_a_stage_is_recorded_under_its_folders_names(tmp_path):
    training_args = TrainingArguments(str(tmp_path / "films" / "sft"), use_cpu=True, report_to="none")
    assert start_stage("sft", training_args, ModelConfig("org/model"), parents=["org/model", None]) is None
    record = read_run(tmp_path / "films" / "sft")
    assert (record["recipe"], record["stage"], record["parents"]) == ("films", "sft", [{"path": "org/model"}])


def test_a_stage_gives_its_run_all_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run, "start_run", lambda **given: given)
    training_args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=["wandb"], learning_rate=0.25)
    given = start_stage("sft", training_args, ModelConfig("org/model", lora_r=8), parents=[])
    assert given["report_to"] == ["wandb"]
    config = given["config"]
    assert (config["learning_rate"], config["lora_r"], config["model_name_or_path"]) == (0.25, 8, "org/model")


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    assert start_run(**STAGE, output_dir=str(tmp_path), report_to=["wandb"]) is None
    assert list(tmp_path.iterdir()) == []
