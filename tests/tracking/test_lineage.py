import json
import re
import subprocess
import sys

import pytest
from transformers import TrainingArguments
from trl import ModelConfig

from rlhf_recipes.tracking import git_commit, read_run, stage_config
from rlhf_recipes.tracking.lineage import describe_run, write_run


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    git(tmp_path, "init")
    return tmp_path


def git(folder, *arguments):
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder):
    (folder / "code.py").write_text("x = 1\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "-m", "first")


def test_commit_is_the_full_hash_whatever_the_tags(repository):
    commit(repository)
    git(repository, "tag", "-a", "v1.0", "-m", "release")
    (repository / "inner").mkdir()
    assert git_commit(repository / "inner") == git(repository, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", git_commit(repository))


def test_commit_says_that_a_tracked_file_was_changed(repository):
    commit(repository)
    clean = git_commit(repository)
    (repository / "notes.txt").write_text("untracked files do not count\n")
    assert git_commit(repository) == clean
    (repository / "code.py").write_text("x = 2\n")
    assert git_commit(repository) == f"{clean}-dirty"


def test_no_commit_is_none(repository, tmp_path, monkeypatch):
    assert git_commit(repository) is None  # nothing was committed yet
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert git_commit(tmp_path) is None


def test_without_git_the_commit_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


def test_record_names_command_versions_and_parents(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python3.11", "recipes/ppo.py", "--run_name", "two words"])
    sft, reward = tmp_path / "sft", tmp_path / "reward"
    write_run(sft, {"stage": "sft", "git_commit": "abc", "wandb_run_id": "r1", "command": "left out"})
    write_run(reward, {"stage": "reward", "git_commit": None})
    (reward / "checkpoint-10").mkdir()

    record = describe_run("quickstart", "ppo", [str(sft), str(reward / "checkpoint-10"), "org/model"])

    assert record["recipe"] == "quickstart"
    assert record["stage"] == "ppo"
    assert record["parents"] == [
        {"path": str(sft), "stage": "sft", "git_commit": "abc", "wandb_run_id": "r1"},
        {"path": str(reward / "checkpoint-10"), "stage": "reward", "git_commit": None},
        {"path": "org/model"},
    ]
    assert record["versions"]["trl"].startswith("1.")
    assert record["command"] == "python recipes/ppo.py --run_name 'two words'"


def test_the_command_of_several_processes_starts_as_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["recipes/ppo.py", "--config", "x.yaml"])
    assert describe_run("quickstart", "ppo", [])["command"] == (
        "accelerate launch --num_processes 2 recipes/ppo.py --config x.yaml"
    )


def test_record_is_read_as_it_was_written(tmp_path):
    record = describe_run("quickstart", "sft", [])
    write_run(tmp_path / "new" / "folder", record)
    assert read_run(tmp_path / "new" / "folder") == record == json.loads(json.dumps(record))
    assert read_run(tmp_path) is None


def test_broken_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match=r"run\.json must hold the JSON record of a run"):
        read_run(tmp_path)


def test_stage_config_merges_the_arguments_and_hides_tokens(tmp_path):
    training = TrainingArguments(str(tmp_path), learning_rate=3e-4, hub_token="hf_secret", use_cpu=True)
    config = stage_config(training, ModelConfig("org/model", lora_r=8))
    assert config["learning_rate"] == 3e-4
    assert config["model_name_or_path"] == "org/model"
    assert config["lora_r"] == 8
    assert "hf_secret" not in str(config)
