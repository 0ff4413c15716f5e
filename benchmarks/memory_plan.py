"""Compare the memory that `rlhf-recipes plan` predicts with what PPO runs take, each in a process of its own.

    python benchmarks/memory_plan.py [--sizes 1.3M 27M 0.5B] [--default_malloc]

Models have random weights. A run makes one update (32 prompts of 32 tokens, 48 completion tokens, 4 epochs; 0.5B: 8
prompts, 1 epoch). Measured is what the process takes at most, above what the imports take; on a GPU, torch's
`max_memory_allocated`. The processes run with `MALLOC_MMAP_THRESHOLD_=262144`, without which glibc keeps freed blocks;
`--default_malloc` shows how much.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
MIB = 2**20
PROMPT, COMPLETION = 32, 48
SIZES = {  # Llamas; the last one has the shape of Qwen2.5-0.5B
    "1.3M": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
    "27M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408},
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864}
    | {"vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
FORMATS = ("fp32", "bf16", "4-bit")


class Case(NamedTuple):
    """One run: the model, its number format, the critic, the micro-batch, and whether it recomputes activations."""

    size: str
    form: str
    critic: str
    micro_batch: int
    checkpointing: bool = False

    @property
    def rollout(self):
        return 8 if self.size == "0.5B" else 32

    def fields(self, output_dir):
        """Fields of `PPOConfig`."""
        steps = self.rollout // self.micro_batch
        epochs = 1 if self.size == "0.5B" else 4
        return {
            "output_dir": str(output_dir),
            "critic": self.critic,
            "per_device_train_batch_size": self.micro_batch,
            "per_device_eval_batch_size": self.micro_batch,
            "gradient_accumulation_steps": steps,
            "num_iterations": epochs,
            "max_steps": epochs,
            "max_completion_length": COMPLETION,
            "gradient_checkpointing": self.checkpointing,
            "bf16": self.form == "bf16",
            "learning_rate": 1e-6,
            "use_cpu": "CUDA_VISIBLE_DEVICES" in os.environ and not os.environ["CUDA_VISIBLE_DEVICES"],
            "dataloader_pin_memory": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }

    @property
    def model_fields(self):
        """Fields of TRL's `ModelConfig`."""
        return {"load_in_4bit": self.form == "4-bit", "dtype": "bfloat16" if self.form == "bf16" else "float32"}


CASES = [
    *(Case(size, form, critic, 32) for size in ("1.3M", "27M") for form in FORMATS for critic in ("adapter", "head")),
    Case("1.3M", "fp32", "adapter", 8),
    Case("27M", "fp32", "adapter", 8),
    Case("27M", "fp32", "adapter", 32, checkpointing=True),
    *(Case("0.5B", form, "adapter", 8) for form in FORMATS),
]


def make_world(size, folder):
    """Write a base of random weights, its tokenizer, an adapter of policy and one of reward, and prompts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    from rlhf_recipes.models.tiny import word_tokenizer

    sizes = {"vocab_size": 2000, "max_position_embeddings": 256} | SIZES[size]
    words = [f"w{number}" for number in range(sizes["vocab_size"] - 3)]
    tokenizer = word_tokenizer(words)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **tokens))
    base.generation_config.do_sample = True
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for role, task, auto in (
        ("sft", "CAUSAL_LM", AutoModelForCausalLM),
        ("reward", "SEQ_CLS", AutoModelForSequenceClassification),
    ):
        labels = {"num_labels": 1} if role == "reward" else {}
        model = auto.from_pretrained(folder / "base", **labels)
        config = LoraConfig(task_type=task, r=16, lora_alpha=32, target_modules="all-linear")
        get_peft_model(model, config).save_pretrained(folder / role)
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(words[:2000], k=PROMPT)) for _ in range(64)]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def predict(case, folder):
    """Predicted bytes of each phase, by the same code as `rlhf-recipes plan`."""
    from trl import ModelConfig

    from rlhf_recipes.ppo.arguments import PPOArguments
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.tools.planning.phases import ppo_memory
    from rlhf_recipes.tools.planning.run import run_sizes

    fields = case.fields(folder / "out")
    device = "cpu" if fields["use_cpu"] else "cuda"
    ppo_args = PPOArguments(sft_adapter=str(folder / "sft"), reward_adapter=str(folder / "reward"))
    model_args = ModelConfig(model_name_or_path=str(folder / "base"), **case.model_fields)
    sizes, notes = run_sizes(ppo_args, PPOConfig(**(fields | {"use_cpu": True})), model_args, PROMPT, device)
    assert not notes
    return {name: memory.total for name, memory in ppo_memory(sizes).items()}


def measure(case, folder, default_malloc=False):
    """Measured bytes of each phase, above what the imports take."""
    job = {"folder": str(folder), "fields": case.fields(folder / "out"), **case.model_fields}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    if not default_malloc:
        environment["MALLOC_MMAP_THRESHOLD_"] = "262144"
    command = [sys.executable, str(HERE / "memory_worker.py"), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(case, predicted, measured):
    """A row of the table: predicted / measured MiB for each phase, and the ratio of the peaks."""
    cells = [f"{predicted[name] / MIB:,.0f} / {measured[name] / MIB:,.0f}" for name in predicted]
    ratio = max(predicted.values()) / max(measured[name] for name in predicted)
    checkpointing = ", checkpointing" if case.checkpointing else ""
    what = f"{case.size}, {case.form}, `{case.critic}`, micro-batch {case.micro_batch}{checkpointing}"
    return f"| {what} | {' | '.join(cells)} | {ratio:.2f} |", ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--default_malloc", action="store_true", help="leave glibc's settings as they are")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print("| run | load | generate | score | train | peak, predicted / measured |\n|---|---|---|---|---|---|")
    missed = 0
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_world(size, folder)
            for case in [case for case in CASES if case.size == size]:
                line, ratio = row(case, predict(case, folder), measure(case, folder, args.default_malloc))
                missed += abs(ratio - 1) > 0.15
                print(line, flush=True)
    print(f"{'FAIL' if missed else 'PASS'}: {missed} peaks are predicted with an error above 15 %")


if __name__ == "__main__":
    main()
