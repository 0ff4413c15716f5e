"""Run by `test_real.py` on two processes: trainings whose completions one vLLM server samples for both."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from rlhf_recipes.ppo.vllm.engine import SamplingStopped
from tests.ppo.support import trained, without_chance
from tests.ppo.with_vllm.test_real import make, noted


class ServerKilled(TrainerCallback):
    """Kill the server, a group of processes, after the first step."""

    def __init__(self, group):
        self.group = group

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 0:
            os.killpg(self.group, signal.SIGKILL)


def write(trainer, rows, stem):
    """Write what one process sampled and logged, and the weights, which must be those of the other process."""
    flat = torch.cat([weight.flatten() for weight in trained(trainer).values()])
    spread = (trainer.accelerator.gather(flat[None]) - flat).abs().max().item()
    save_file(trained(trainer), f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps({"rows": rows, "log": trainer.state.log_history, "spread": spread}))


def by_vllm(name, case, base, adapter, out, url, prompts):
    """Train with the server; a run that it stops leaves its message, and nothing else."""
    rank, timeout = os.environ["RANK"], case.get("timeout", 3600.0)
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": timeout}
    run = make(base, adapter, f"{out}/{name}", prompts, **served)
    rows = noted(run)
    if "kill" in case:
        run.add_callback(ServerKilled(case["kill"]))
    try:
        run.train(resume_from_checkpoint=case.get("resume"))
    except SamplingStopped as stopped:
        Path(out, f"{name}_{rank}.txt").write_text(str(stopped))
    else:
        write(run, rows, f"{out}/{name}_{rank}")
    return rows


def by_transformers(rows, base, adapter, out, prompts):
    """Train on the same completions without vLLM."""
    completions = iter(rows)
    run = without_chance(make(base, adapter, f"{out}/other", prompts), lambda *_: next(completions)[1])
    run.train()
    write(run, rows, f"{out}/other_{os.environ['RANK']}")


def main():
    base, adapter, out, url, cases = *sys.argv[1:5], json.loads(sys.argv[5])
    prompts = json.loads(Path(out, "prompts.json").read_text())
    for name, case in cases.items():
        rows = by_vllm(name, case, base, adapter, out, url, prompts)
        if case.get("again"):
            by_transformers(rows, base, adapter, out, prompts)
    os._exit(0)  # tearing DDP down can hang in gloo, after all work is done


if __name__ == "__main__":
    main()
