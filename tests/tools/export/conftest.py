"""Finished stages on a tiny base in bfloat16: trained in 4 bits, in float32, and on other rows of the same world."""

import argparse
import importlib.util
import json

import pytest
import torch

from rlhf_recipes.config import parse_stage
from rlhf_recipes.tools.export.arguments import add_arguments
from rlhf_recipes.tools.export.command import export

CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
SHORT = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "lora_r": 4, "disable_tqdm": True}
CARD = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: https://example.org/licence\n---\n# Tiny\n"


@pytest.fixture(scope="session")
def world(tiny_model_path, tiny_texts, tmp_path_factory):
    """A base in bfloat16 that has a model card, and rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("world")
    AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text(CARD)
    pairs = [{"prompt": text, "chosen": " was good", "rejected": " was dull"} for text in tiny_texts]
    chats = [
        {
            "prompt": [{"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "dull"}],
        }
        for text in tiny_texts
    ]
    for name, rows in (("pairs", pairs), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def make_run(world, repo_root):
    """Run a stage: `make_run("sft", "name", load_in_4bit=True)` gives its folder."""

    def make(stage, name, **options):
        path = repo_root / "recipes" / f"{stage}.py"
        spec = importlib.util.spec_from_file_location(f"exported_{stage}", path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        folder = world / "outputs" / name
        given = {"model_name_or_path": world / "base", "dataset_name": world / "pairs.jsonl", "output_dir": folder}
        given |= CPU | SHORT | options
        script.main(*parse_stage(script.ARGUMENTS, [str(word) for k, v in given.items() for word in (f"--{k}", v)]))
        return folder

    return make


@pytest.fixture(scope="session")
def sft_run(make_run):
    """An SFT run on the base in 4 bits."""
    return make_run("sft", "sft", load_in_4bit=True)


@pytest.fixture(scope="session")
def chat_run(make_run, world):
    """An SFT run on chats, on the base in float32."""
    return make_run("sft", "chat", dataset_name=world / "chats.jsonl")


@pytest.fixture(scope="session")
def reward_run(make_run):
    """A reward model that is read at the last token, on the base in float32."""
    return make_run("reward", "reward")


@pytest.fixture(scope="session")
def ppo_run(make_run, sft_run, reward_run):
    """A PPO run on the base in 4 bits, with an average of its weights."""
    options = {"max_completion_length": 6, "steps_per_generation": 1, "evaluation_rows": 8, "test_size": 0.25}
    options["ema_decay"] = 0.5
    adapters = {"sft_adapter": sft_run, "reward_adapter": reward_run, "load_in_4bit": True, "adapter_tolerance": 9}
    return make_run("ppo", "ppo", **options, **adapters)


@pytest.fixture
def run_export(tmp_path):
    """Run the command: `run_export(folder, "--merge")` gives the new folder and what was said."""

    def run(folder, *words, name="exported", api=None):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        output = tmp_path / name
        return output, export(parser.parse_args([str(folder), "--output_dir", str(output), *words]), api)

    return run
