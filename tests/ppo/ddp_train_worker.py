"""Run by `test_distributed.py` on one or two processes: a whole training on completions that are made up."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file

from rlhf_recipes import PPOTrainer
from rlhf_recipes.shaping import transforms_state
from tests.ppo.support import trained, without_chance, worker_config

SUBJECTS = ["the film", "a story", "this actor was so", "that"]
TEXTS = [f"{subject} {verdict}" for subject in SUBJECTS for verdict in ("was", "felt very good", "is", "not so")]


def main() -> None:
    sft_adapter, reward_adapter, out, fields = *sys.argv[1:4], json.loads(sys.argv[4])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    resume = fields.pop("resume", None)
    own = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2, "logging_steps": 1}
    args = worker_config(f"{out}/run_{processes}", **own | fields)
    rows = Dataset.from_list([{"prompt": text} for text in TEXTS])
    trainer = PPOTrainer(model=sft_adapter, reward_funcs=reward_adapter, args=args, train_dataset=rows)
    if not fields.get("save_steps") and not resume:
        without_chance(trainer)  # each process has random numbers of its own
    trainer.train(resume_from_checkpoint=resume)
    weights = trained(trainer)
    if trainer.average is not None:
        with trainer.average.in_place():
            weights |= {f"ema.{name}": weight for name, weight in trained(trainer).items()}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    spread = (trainer.accelerator.gather(flat[None]) - flat).abs().max().item()
    if trainer.accelerator.is_main_process:
        save_file(weights, Path(out, f"weights_{processes}.safetensors"))
        result = {
            "processes": trainer.accelerator.num_processes,
            "spread": spread,
            "kl_coef": trainer.kl_controller.value,
            "transforms": transforms_state(trainer.token_rewards.transforms),
            "log": trainer.state.log_history,
        }
        Path(out, f"result_{processes}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # tearing DDP down can hang in gloo, after all work is done


if __name__ == "__main__":
    main()
