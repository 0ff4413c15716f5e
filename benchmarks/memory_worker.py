"""Measure one PPO run of random weights, phase by phase, in a process of its own: `CASE`, a JSON object."""

import gc
import importlib
import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
MODULES = (
    *("torch._dynamo", "bitsandbytes", "datasets", "peft.tuners.lora", "trl", "transformers.generation.utils"),
    "transformers.models.llama.modeling_llama",
)


def in_status(key):
    """Bytes of a line of /proc/self/status: VmRSS is what the process has now, VmHWM the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def reset_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak():
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else in_status("VmHWM")


def main(case):
    for name in MODULES:
        importlib.import_module(name)
    from datasets import Dataset
    from trl import ModelConfig

    from rlhf_recipes import PPOConfig, PPOTrainer
    from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer, quantization_config

    peaks = {}

    def phase_ends(name):
        peaks[name] = max(peaks.get(name, 0), peak())
        reset_peak()

    class Measured(PPOTrainer):
        """Reads the peak where a phase ends. What is before the first generation counts as loading."""

        def _generate_single_turn(self, *args, **kwargs):
            reset_peak()
            out = super()._generate_single_turn(*args, **kwargs)
            phase_ends("generate")
            return out

        def _generate_and_score_completions(self, *args, **kwargs):
            out = super()._generate_and_score_completions(*args, **kwargs)
            phase_ends("score")
            return out

        def training_step(self, *args, **kwargs):
            out = super().training_step(*args, **kwargs)
            phase_ends("train")
            return out

    folder = Path(case["folder"])
    model_args = ModelConfig(load_in_4bit=case["load_in_4bit"], dtype=case["dtype"])
    gc.collect()
    imports = 0 if torch.cuda.is_available() else in_status("VmRSS")
    reset_peak()
    tokenizer = load_tokenizer(str(folder / "base"))
    policy = load_causal_lm(
        str(folder / "base"), quantization_config=quantization_config(model_args), dtype=case["dtype"]
    )
    prompts = json.loads((folder / "prompts.json").read_text())
    trainer = Measured(
        model=load_policy(policy, folder / "sft"),
        reward_funcs=str(folder / "reward"),
        args=PPOConfig(**case["fields"]),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    phase_ends("load")
    trainer.train()
    peaks["train"] = max(peaks["train"], peak())  # the optimizer's step is outside of `training_step`
    print(json.dumps({"imports": imports} | {name: most - imports for name, most in peaks.items()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
