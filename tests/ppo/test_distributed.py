"""Two processes compute what one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("ddp_worker.py")


def run(processes, arguments, repo_root):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    finished = subprocess.run(
        [*command, str(WORKER), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.parametrize("critic", ["adapter", pytest.param("head", marks=pytest.mark.slow)])
def test_two_processes_equal_one(critic, sft_adapter, reward_adapter, tmp_path, repo_root):
    for processes in (1, 2):
        run(processes, [str(sft_adapter), str(reward_adapter), str(tmp_path), critic], repo_root)
    one, two = (json.loads((tmp_path / f"result_{n}.json").read_text()) for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["spread"] == 0.0
    assert two["gradients"] == pytest.approx(one["gradients"], rel=1e-4, abs=1e-7)
    assert two["evaluation"].pop("samples") == one["evaluation"].pop("samples")
    for side in ("policy", "reference"):
        assert two["evaluation"][side].pop("gold_score") is one["evaluation"][side].pop("gold_score") is None
        assert two["evaluation"].pop(side) == pytest.approx(one["evaluation"].pop(side), rel=1e-5, abs=1e-6)
    assert two["evaluation"] == one["evaluation"]
