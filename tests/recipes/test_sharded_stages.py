"""SFT and the reward model, TRL's trainers, under FSDP2 and ZeRO-2: the numbers and the adapter of one process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

STAGE = Path(__file__).with_name("sharded_stage.py")
OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lora_r": 4,
    "lora_dropout": 0.0,  # whose masks are drawn by each process
    "disable_tqdm": True,
    "load_in_4bit": True,
    "bnb_4bit_quant_storage": "float32",
}


def read(folder):
    """The logged steps of a stage, its adapter and the numbers of its evaluation."""
    state = json.loads((folder / "trainer_state.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    numbers = {name: value for name, value in evaluation.items() if isinstance(value, int | float)}
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    return steps, load_file(folder / "adapter_model.safetensors"), numbers


def rows_of(stage, texts):
    texts = [text.split() for text in texts]
    rows = [{"prompt": " ".join(text[:2]), "completion": " " + " ".join(text[2:])} for text in texts]
    if stage == "sft":
        return rows
    worse = [row["completion"] for row in (*rows[1:], rows[0])]
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": text + " bad"}
        for row, text in zip(rows, worse, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "file"), [("sft", "fsdp2"), ("sft", "zero2"), ("reward", "zero2")])
def test_a_stage_of_trl_is_the_same_sharded(stage, file, run_stage, tiny_texts, write_rows, tmp_path, repo_root):
    if file == "zero2" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'rlhf-recipes[deepspeed]'")
    options = OPTIONS | {"dataset_name": write_rows(rows_of(stage, tiny_texts))}
    alone = run_stage(stage, **options, per_device_train_batch_size=4)
    base = alone.trainer.model.get_base_model().config._name_or_path
    own = {"model_name_or_path": base, "output_dir": tmp_path / "sharded", "per_device_train_batch_size": 2}
    words = [word for name, value in (options | own).items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command += ["--config_file", str(repo_root / "recipes" / "accelerate" / f"{file}.yaml"), str(STAGE)]
    command += [str(repo_root / "recipes" / f"{stage}.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert finished.returncode == 0, finished.stderr[-5000:]
    (one, weights, numbers), (two, sharded_weights, sharded_numbers) = read(alone.folder), read(own["output_dir"])
    assert len(one) == len(two) == 3
    for ours, theirs in zip(two, one, strict=True):
        assert [ours["loss"], ours["grad_norm"]] == pytest.approx([theirs["loss"], theirs["grad_norm"]], rel=1e-5)
    assert sharded_weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert_close(sharded_weights[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    assert sharded_numbers == pytest.approx(numbers, rel=1e-4, abs=1e-4)
