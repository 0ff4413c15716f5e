"""Run by `test_sharded.py` in processes that `accelerate launch` starts: trainings with sharded weights on CPUs."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, TrainerCallback

from rlhf_recipes import PPOTrainer
from rlhf_recipes.evaluation.policy import evaluate_policy
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.models.sharding import whole
from rlhf_recipes.ppo.sharded import ShardedTrainer
from tests.cpu_fsdp import shard_on_cpus
from tests.ppo.ddp_train_worker import TEXTS
from tests.ppo.support import without_chance, worker_config

DEFAULTS = {
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "num_iterations": 2,
    "logging_steps": 1,
}


class Infinite(TrainerCallback):
    """Let a gradient of the policy be infinite on the second process from the second step on."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1 and args.process_index == 1:
            weight = next(
                weight for name, weight in model.named_parameters() if ".default." in name and weight.requires_grad
            )
            weight.register_hook(lambda gradient: gradient * float("inf"))


def lose(weight: Any) -> None:
    """Forget the gradient of a weight, as a fault between the backward pass and the reduction would."""
    weight.grad.zero_()


class Killed(TrainerCallback):
    """Kill this process at the beginning of a step, and write down when."""

    def __init__(self, step: int, journal: Path) -> None:
        self._step, self._journal = step, journal

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step and args.process_index == 1:
            self._journal.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def add_faults(trainer: PPOTrainer, name: str, case: dict[str, Any], out: str) -> None:
    """Let happen in a training what its case is about."""
    if "killed_at" in case:
        trainer.add_callback(Killed(case["killed_at"], Path(out, "killed")))
    if name == "infinite":
        trainer.add_callback(Infinite())
    if name == "lost" and trainer.accelerator.process_index == 1:  # before DeepSpeed takes them
        for key, weight in trainer.model.named_parameters():
            if weight.requires_grad and is_critic_parameter(key):
                weight.register_post_accumulate_grad_hook(lose)


def train(name: str, case: dict[str, Any], sft_adapter: str, reward_adapter: str, out: str) -> None:
    """Run one training, and write what it logged, its evaluation and its weights as `<name>_<processes>`."""
    processes, fields, more = int(os.environ.get("WORLD_SIZE", "1")), case.get("fields", {}), case.get("more", {})
    own = {"per_device_train_batch_size": case.get("rows", 4) // processes}
    args = worker_config(f"{out}/{name}_{processes}", **DEFAULTS | own | fields)
    rows = Dataset.from_list([{"prompt": text} for text in TEXTS])
    if (quantization := case.get("quantization")) is not None:
        more["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **quantization)
    if "ptx_coef" in fields:
        more["ptx_dataset"] = Dataset.from_list([{"text": text} for text in TEXTS[:5]])
    policy = case.get("model", sft_adapter)
    trainer = PPOTrainer(policy, reward_adapter, args, train_dataset=rows, eval_dataset=rows, **more)
    if not case.get("chance"):
        without_chance(trainer)
    add_faults(trainer, name, case, out)
    trainer.train(resume_from_checkpoint=case.get("resume"))
    held = sum(weight.to_local().numel() for weight in trainer.model.parameters() if isinstance(weight, DTensor))
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    adam = sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values() if "exp_avg" in state)
    result: dict[str, Any] = {
        "adam": adam / trained,
        "kind": str(trainer.accelerator.distributed_type),
        "precision": trainer.accelerator.mixed_precision,
        "log": trainer.state.log_history,
        "held": held / sum(weight.numel() for weight in trainer.model.parameters()),
    }
    if case.get("evaluate"):
        result["evaluation"] = evaluate_policy(trainer, rows, rows=10, seed=3)
        trainer.save_model(f"{out}/{name}_{processes}/final")
    named = trainer.model.named_parameters()
    weights = {key: whole(weight.detach()).contiguous() for key, weight in named if weight.requires_grad}
    if trainer.accelerator.is_main_process:
        save_file(weights, Path(out, f"{name}_{processes}.safetensors"))
        Path(out, f"{name}_{processes}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


def written_down(name: str, case: dict[str, Any], *arguments: str) -> None:
    """Run a training that is to fail, and write down the error of this process."""
    try:
        train(name, case, *arguments)
    except (RuntimeError, FloatingPointError) as error:
        Path(arguments[2], f"{name}_{os.environ['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")


def main() -> None:
    """Run the cases that the fourth argument holds as JSON, by name."""
    shard_on_cpus()
    for name, case in json.loads(sys.argv[4]).items():
        if name == "past":  # the policy's gradient is taken as without FSDP, which ran and was wrong
            known, ShardedTrainer.spreads = ShardedTrainer.spreads, False
            written_down(name, case, *sys.argv[1:4])
            ShardedTrainer.spreads = known
        elif name in ("infinite", "lost"):
            written_down(name, case, *sys.argv[1:4])
        else:
            train(name, case, *sys.argv[1:4])
    os._exit(0)  # tearing it down can hang in gloo, after all work is done


if __name__ == "__main__":
    main()
