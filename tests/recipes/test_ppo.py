"""The PPO stage, run as a user runs it, and in this process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from peft import AutoPeftModelForCausalLM

from rlhf_recipes.config import parse_stage


@pytest.fixture
def prompt_file(tiny_texts, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tiny_texts))
    return path


@pytest.fixture
def options(repo_root, tiny_model_path, sft_adapter, reward_adapter, prompt_file, tmp_path):
    """The quickstart's configuration on the tiny model, for two steps."""
    return {
        "config": repo_root / "recipes" / "quickstart" / "ppo.yaml",
        "model_name_or_path": tiny_model_path,
        "sft_adapter": sft_adapter,
        "reward_adapter": reward_adapter,
        "gold_score": reward_adapter,
        "dataset_name": prompt_file,
        "dataset_train_split": "train",
        "dataset_test_split": "train",
        "output_dir": tmp_path / "tiny" / "ppo",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "steps_per_generation": 1,
        "max_completion_length": 6,
        "logging_steps": 1,
        "evaluation_rows": 16,
    }


def as_arguments(options):
    return [str(text) for name, value in options.items() for text in (f"--{name}", value)]


@pytest.fixture
def run_ppo(options, load_stage, tmp_path):
    """Run the stage in this process with the quickstart's file, changed."""
    script = load_stage("ppo")

    def run(**changes):
        given = yaml.safe_load(options["config"].read_text()) | {"report_to": "none"} | options | changes
        given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        config = tmp_path / "ppo.yaml"
        config.write_text(yaml.safe_dump({name: value for name, value in given.items() if name != "config"}))
        script.main(*parse_stage(script.ARGUMENTS, ["--config", str(config)]))

    return run


def test_launched_with_the_quickstart_configuration(options, repo_root, tmp_path, sft_adapter, reward_adapter):
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/ppo.py", *as_arguments(options)]
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_API_KEY")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(repo_root)}
    result = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=repo_root, env=environment, timeout=240
    )
    assert result.returncode == 0, result.stderr
    folder = options["output_dir"]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for side in ("policy", "reference"):
        assert {"gold_score", "reward_score", "kl", "length", "eos_rate", "rewards"} == set(evaluation[side])
    low, high = evaluation["win_rate_ci"]
    assert 0.0 <= low <= evaluation["win_rate"] <= high <= 1.0
    assert "win rate of the policy by gold score" in result.stdout
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    assert (folder / "critic" / "adapter_model.safetensors").is_file()
    AutoPeftModelForCausalLM.from_pretrained(folder)
    run = json.loads((folder / "run.json").read_text())
    assert (run["recipe"], run["stage"]) == ("tiny", "ppo")
    assert [parent["path"] for parent in run["parents"]] == [str(sft_adapter), str(reward_adapter)]
    assert list((folder / "wandb").glob("offline-run-*")), "without an API key the W&B run is kept offline"
    table = pd.read_parquet(sorted((folder / "completions").glob("*.parquet"))[-1])
    assert {"prompt", "completion", "reward", "reward_1", "advantage"} <= set(table.columns)
    assert "\r" not in result.stderr, "a bar is for terminals"
    [line] = [line for line in result.stdout.splitlines() if "2/2" in line]
    assert re.search(r"\d", line), "a rollout has a line of numbers"
    assert "gemv_4bit: an autograd kernel was not registered" not in result.stderr


@pytest.mark.parametrize(
    "changes", [{"critic": "head"}, {"gradient_checkpointing": True}, {"reward_placement": "uniform"}]
)
def test_variants_run(run_ppo, options, changes):
    run_ppo(**changes)
    assert (options["output_dir"] / "evaluation.json").is_file()


def test_from_the_bare_base_with_a_fresh_adapter(run_ppo, options):
    run_ppo(sft_adapter=None, gold_score=None)
    evaluation = json.loads((options["output_dir"] / "evaluation.json").read_text())
    assert evaluation["policy"]["gold_score"] is None
    assert evaluation["win_rate_by"] == "reward_score"


def test_a_run_is_not_overwritten_and_can_be_resumed(run_ppo, options):
    run_ppo(save_strategy="steps", save_steps=1)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint true"):
        run_ppo()
    run_ppo(save_strategy="steps", save_steps=1, max_steps=3, resume_from_checkpoint=True)
    assert json.loads((options["output_dir"] / "trainer_state.json").read_text())["global_step"] == 3
    before = {path: path.stat().st_mtime_ns for path in options["output_dir"].rglob("*")}
    run_ppo(save_strategy="steps", save_steps=1, max_steps=3, resume_from_checkpoint=True)
    assert {path: path.stat().st_mtime_ns for path in options["output_dir"].rglob("*")} == before, "nothing is done"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sft_adapter": "no/such/folder"}, FileNotFoundError, "holds no adapter"),
        ({"reward_adapter": None}, ValueError, "reward_adapter"),
        ({"max_completion_length": 127}, ValueError, "prompt"),
        ({"per_device_train_batch_size": 64}, ValueError, "rollout takes 64 different prompts"),
        ({"kl_estimator": "k9"}, ValueError, "kl_estimator"),
        ({"beta": 0.1}, ValueError, "`kl_coef`"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(run_ppo, options, changes, error, message):
    with pytest.raises(error, match=message):
        run_ppo(**changes)
    assert not options["output_dir"].exists()
