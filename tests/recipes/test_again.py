"""The `config.yaml` of a run gives the run again, to the last bit; its adapters load from anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig
from safetensors.torch import load_file

from rlhf_recipes.config import parse_stage
from rlhf_recipes.tracking import read_settings
from rlhf_recipes.tracking.settings import FILE

FLOAT32 = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "1"]
OWN = {
    "sft": ["--max_length", "null", "--lora_r", "4", "--learning_rate", "1e-2", "--lora_target_modules", "q_proj"],
    "reward": ["--lora_r", "4", "--learning_rate", "1e-2", "--readout", "mean", "--test_size", "0.25"],
    "ppo": ["--max_completion_length", "6", "--steps_per_generation", "2", "--evaluation_rows", "8", "--seed", "3"],
}
LOAD = """
import sys, peft, torch
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    options = {"num_labels": 1} if "Sequence" in name else {}
    model = getattr(peft, name).from_pretrained(folder, **options)
    print(model(input_ids=torch.tensor([[6, 7, 8, 1]])).logits.shape)
assert "rlhf_recipes" not in sys.modules
"""


@pytest.fixture
def place(tiny_model_path, tiny_texts, sft_adapter, reward_adapter, tmp_path, monkeypatch):
    """A working directory with a base and rows, which the stages are given by relative paths."""
    os.symlink(tiny_model_path, tmp_path / "base")
    rows = [{"prompt": text, "chosen": " was good", "rejected": " was dull"} for text in tiny_texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, adapter in (("sft", sft_adapter), ("reward", reward_adapter)):
        folder = tmp_path / "given" / name
        folder.mkdir(parents=True)
        config = json.loads((Path(adapter) / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
        os.symlink(Path(adapter) / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(load_stage, stage, argv):
    script = load_stage(stage)
    script.main(*parse_stage(script.ARGUMENTS, argv))


def numbers(folder):
    """All that a run computed: its log without times, its evaluation, its weights."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "time", "total_flos")
    log = [{key: value for key, value in entry.items() if not any(word in key for word in timed)} for entry in log]
    weights = {str(path.relative_to(folder)): load_file(path) for path in folder.rglob("adapter_model.safetensors")}
    plain = {path: {name: value.tolist() for name, value in tensors.items()} for path, tensors in weights.items()}
    return log, json.loads((folder / "evaluation.json").read_text()), plain


@pytest.mark.parametrize(
    "stage", [pytest.param("sft", marks=pytest.mark.slow), pytest.param("reward", marks=pytest.mark.slow), "ppo"]
)
def test_config_yaml_gives_the_run_again_and_its_adapters_load_anywhere(stage, place, load_stage):
    given = {"model_name_or_path": "base", "dataset_name": "rows.jsonl", "dataset_test_split": "train"}
    if stage == "ppo":
        given |= {"sft_adapter": "given/sft", "reward_adapter": "given/reward", "gold_score": "given/reward"}
    (place / "given.yaml").write_text("".join(f"{name}: {value}\n" for name, value in given.items()))
    first = ["--config", "given.yaml", "--output_dir", "out/first", "--dataset_test_split", "null"]
    run(load_stage, stage, [*first, *FLOAT32, *SHORT, *OWN[stage]])
    run(load_stage, stage, ["--config", f"out/first/{FILE}", "--output_dir", "out/again"])
    assert numbers(place / "out" / "again") == numbers(place / "out" / "first")
    settings = [read_settings(place / "out" / name) for name in ("first", "again")]
    assert settings[0] | {"output_dir": "out/again"} == settings[1]
    assert (settings[0]["model_name_or_path"], settings[0].get("max_length", 0)) == (
        "base",
        None if stage == "sft" else 0,
    )

    folders = [path.parent for path in (place / "out" / "first").rglob("adapter_config.json")]
    assert len(folders) == (6 if stage == "ppo" else 3), "the stage's, its checkpoints', and the critics'"
    for folder in folders:
        assert PeftConfig.from_pretrained(folder).base_model_name_or_path == str(place / "base")
    kind = "AutoPeftModelForSequenceClassification" if stage == "reward" else "AutoPeftModelForCausalLM"
    wanted = [(place / "out" / "first", kind)]
    if stage == "ppo":
        wanted.append((place / "out" / "first" / "critic", "AutoPeftModelForSequenceClassification"))
    words = [sys.executable, "-c", LOAD, *(str(word) for pair in wanted for word in pair)]
    result = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=120)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == len(wanted)
