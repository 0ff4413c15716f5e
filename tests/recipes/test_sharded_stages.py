"""SFT and the reward model, TRL's trainers, under FSDP2 and ZeRO-2: numbers, adapters and scores of one process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf_recipes.models import load_reward_model
from rlhf_recipes.reward_modeling import score_sequences

STAGE = Path(__file__).with_name("sharded_stage.py")
OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lora_r": 4,
    "lora_dropout": 0.0,  # whose masks are drawn by each process
    "disable_tqdm": True,
    "load_in_4bit": True,
    "bnb_4bit_quant_storage": "float32",
}
RANKINGS = {"objective": "ranking", "readout": "mean", "gradient_checkpointing": True}
CASES = {
    "sft": ("sft", {}),
    "sft_bf16": ("sft", {"bf16": True}),
    "reward": ("reward", {"normalize_head": True}),
    "reward_bf16": ("reward", {"bf16": True}),
    "rankings": ("reward", RANKINGS),
    "tokens": ("reward", {"objective": "token", "load_in_4bit": False, "bnb_4bit_quant_storage": "uint8"}),
}


def rows_of(case, texts):
    """Rows of four words and more: for the reward model with two or three completions of each prompt."""
    rows = [
        {"prompt": " ".join(words[:2]), "completion": " " + " ".join(words[2:])} for words in map(str.split, texts)
    ]
    if case.startswith("sft"):
        return rows
    groups = [[row["completion"], f" was bad{' so' * (n % 3)}", " is dull"] for n, row in enumerate(rows)]
    if case.startswith("reward"):
        pairs = zip(rows, groups, strict=True)
        return [{"prompt": row["prompt"], "chosen": group[0], "rejected": group[1]} for row, group in pairs]
    target = {"rankings": ("ranks", [1, 2, 2]), "tokens": ("ratings", [1.0, -1.0, 0.5])}[case]
    return [
        {"prompt": row["prompt"], "completions": group[: 2 + n % 2], target[0]: target[1][: 2 + n % 2]}
        for n, (row, group) in enumerate(zip(rows, groups, strict=True))
    ]


def launch(repo_root, stage, options, file="fsdp2"):
    """Launch a stage's script on two processes, as it is."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command += ["--config_file", str(repo_root / "recipes" / "accelerate" / f"{file}.yaml"), str(STAGE)]
    command += [str(repo_root / "recipes" / f"{stage}.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert finished.returncode == 0, finished.stderr[-5000:]


def read(folder):
    """The logged steps of a stage, its adapter and the numbers of its evaluation."""
    state = json.loads((folder / "trainer_state.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    numbers = {name: value for name, value in evaluation.items() if isinstance(value, int | float)}
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    return steps, load_file(folder / "adapter_model.safetensors"), numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "file"), [*((case, "fsdp2") for case in CASES), ("sft", "zero2"), ("reward", "zero2")]
)
def test_a_stage_of_trl_is_the_same_sharded(case, file, run_stage, tiny_texts, write_rows, tmp_path, repo_root):
    if file == "zero2" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'rlhf-recipes[deepspeed]'")
    stage, fields = CASES[case]
    options = OPTIONS | fields | {"dataset_name": write_rows(rows_of(case, tiny_texts))}
    # The micro-batches of both processes, one after the other: in bfloat16 other ones would round otherwise
    alone = run_stage(stage, **options, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    base = alone.trainer.model.get_base_model().config._name_or_path
    own = {"model_name_or_path": base, "output_dir": tmp_path / "sharded", "per_device_train_batch_size": 2}
    launch(repo_root, stage, options | own, file)
    (one, weights, numbers), (two, sharded_weights, sharded_numbers) = read(alone.folder), read(own["output_dir"])
    assert len(one) == len(two) == OPTIONS["max_steps"]
    for ours, theirs in zip(two, one, strict=True):
        assert [ours["loss"], ours["grad_norm"]] == pytest.approx([theirs["loss"], theirs["grad_norm"]], rel=1e-5)
    assert sharded_weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert_close(sharded_weights[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    assert sharded_numbers == pytest.approx(numbers, rel=1e-4, abs=1e-4)
    if stage == "reward":
        scores = [scores_of(folder, tiny_texts) for folder in (own["output_dir"], alone.folder)]
        assert scores[1].std() > 0.1
        assert_close(*scores, atol=1e-5, rtol=1e-5)


def scores_of(folder, texts):
    model, tokenizer = load_reward_model(folder)
    return score_sequences(model, [tokenizer(text)["input_ids"] for text in texts])


@pytest.mark.slow
def test_a_reward_model_resumes_sharded(tiny_model_path, tiny_texts, write_rows, tmp_path, repo_root):
    options = OPTIONS | {"model_name_or_path": tiny_model_path, "lr_scheduler_type": "linear"}
    options |= {"dataset_name": write_rows(rows_of("reward", tiny_texts)), "per_device_train_batch_size": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    launch(repo_root, "reward", options | {"output_dir": whole, "save_strategy": "steps", "save_steps": 2})
    launch(repo_root, "reward", options | {"output_dir": resumed, "resume_from_checkpoint": whole / "checkpoint-2"})
    (steps, weights, numbers), (later_steps, later_weights, later_numbers) = read(whole), read(resumed)
    assert [step["loss"] for step in later_steps] == [step["loss"] for step in steps]
    assert len(steps) == 4
    assert all(torch.equal(later_weights[name], weight) for name, weight in weights.items())
    assert later_numbers == numbers
