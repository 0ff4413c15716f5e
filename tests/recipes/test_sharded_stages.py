"""SFT and the reward model, TRL's trainers, under FSDP2: the numbers and the adapter of one process."""

import json
import os
import subprocess
import sys
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
    "disable_tqdm": True,
    "load_in_4bit": True,
    "bnb_4bit_quant_storage": "float32",
}


def run(launcher, script, options, repo_root):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*launcher, str(STAGE), str(script), *words], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    state = json.loads(Path(options["output_dir"], "trainer_state.json").read_text())
    weights = load_file(Path(options["output_dir"], "adapter_model.safetensors"))
    evaluation = json.loads(Path(options["output_dir"], "evaluation.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry], weights, evaluation


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_stage_of_trl_is_the_same_sharded(stage, tiny_model_path, tiny_texts, write_rows, tmp_path, repo_root):
    texts = [text.split() for text in tiny_texts]
    rows = [{"prompt": " ".join(text[:2]), "chosen": " " + " ".join(text[2:]), "rejected": " slow"} for text in texts]
    if stage == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    options = OPTIONS | {"model_name_or_path": tiny_model_path, "dataset_name": write_rows(rows)}
    file = repo_root / "recipes" / "accelerate" / "fsdp2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    found = []
    for size, launcher in ((4, [sys.executable]), (2, [*launch, "--main_process_port", "0"])):
        own = {"output_dir": str(tmp_path / str(size)), "per_device_train_batch_size": size}
        found.append(run(launcher, repo_root / "recipes" / f"{stage}.py", options | own, repo_root))
    (one, weights, evaluation), (two, sharded_weights, sharded_evaluation) = found
    assert len(one) == len(two) == 3
    for ours, theirs in zip(two, one, strict=True):
        assert [ours["loss"], ours["grad_norm"]] == pytest.approx([theirs["loss"], theirs["grad_norm"]], rel=1e-5)
    assert sharded_weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert_close(sharded_weights[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    numbers = {name: value for name, value in evaluation.items() if isinstance(value, int | float)}
    assert {name: sharded_evaluation[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-4)
