"""Run by `test_distributed.py` on one or two processes: what a gradient, a training and an evaluation give."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.evaluation.policy import evaluate_policy
from tests.ppo.support import without_chance, worker_config

TEXTS = ["the film was", "a story", "this actor felt", "that ending is", "the plot", "a good", "it was", "i liked"] * 2


def make_trainer(per_device: int, sft_adapter: str, reward_adapter: str, out: str, critic: str) -> PPOTrainer:
    args = worker_config(
        f"{out}/run",
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=4,
        max_steps=3,
        num_iterations=2,
        critic=critic,
    )
    rows = Dataset.from_list([{"prompt": text} for text in TEXTS])
    return PPOTrainer(model=sft_adapter, reward_funcs=reward_adapter, args=args, train_dataset=rows, eval_dataset=rows)


def fixed_batch() -> dict[str, torch.Tensor]:
    """Eight completions of different lengths with made-up old values, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 40, (8, 11), generator=generator)
    mask = (torch.arange(7) < torch.arange(8)[:, None].clamp(min=1)).long()
    return {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(8, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": mask,
        "value_mask": mask,
        "ref_per_token_logps": torch.zeros(8, 7),
        "old_per_token_logps": -3 * torch.rand(8, 7, generator=generator),
        "old_values": torch.randn(8, 7, generator=generator),
        "returns": torch.randn(8, 7, generator=generator),
        "advantages": torch.randn(8, 7, generator=generator),
        "items_in_rollout": mask.sum(),
    }


def measure(*arguments: str) -> None:
    """Write what this process and its peers find to `result_<processes>.json` in the third argument, a folder."""
    trainer = make_trainer(8 // int(PPOConfig("unused", use_cpu=True, bf16=False).world_size), *arguments)
    processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index

    # 1. One evaluation of the untrained policy.
    evaluation = evaluate_policy(trainer, trainer.eval_dataset, rows=10, seed=3)

    # 2. The metrics of an evaluation whose last batch is not full, of completions that do not depend on chance.
    rows = without_chance(trainer).evaluate(trainer.eval_dataset.select(range(7)))
    rows = {
        name: value
        for name, value in rows.items()
        if not name.endswith(("_runtime", "_per_second", "_spread", "_time"))
    }
    trainer = make_trainer(trainer.args.per_device_train_batch_size, *arguments)

    # 3. The gradient of one fixed batch, split over the processes.
    trainer.model.train()
    trainer.current_gradient_accumulation_steps, trainer._step = 1, 1
    size = 8 // processes
    part = {k: v if v.dim() == 0 else v[rank * size : (rank + 1) * size] for k, v in fixed_batch().items()}
    wrapped = trainer.accelerator.prepare(trainer.model)
    trainer._compute_loss(wrapped, part).backward()
    metrics = trainer.step_metrics["train"].collect()
    gradients = {name: p.grad.norm().item() for name, p in trainer.model.named_parameters() if p.grad is not None}

    # 4. A short training: all processes must end with the same weights.
    trainer = make_trainer(8 // processes, *arguments)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    gathered = trainer.accelerator.gather(weights[None])
    spread = (gathered - gathered[0]).abs().max().item()
    if rank == 0:
        result = {"processes": processes, "evaluation": evaluation, "rows": rows, "spread": spread}
        result |= {"gradients": gradients, "metrics": metrics}
        Path(arguments[2], f"result_{processes}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


def measure_as(rank: int, environment: dict[str, str], *arguments: str) -> None:
    """Measure as one of several processes that nobody but the test launches."""
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    measure(*arguments)
    os._exit(0)  # tearing two DDP models of one process down can hang in gloo, after all work is done


if __name__ == "__main__":
    measure(*sys.argv[1:])
    os._exit(0)
