"""What an evaluation logs is that of all rows together: at every batch size, on one process and on two."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_recipes.reward_modeling import evaluate_pairs, score_sequences
from tests.reward_modeling import evaluation_worker
from tests.reward_modeling.evaluation_worker import KINDS, PAIRS, make, make_sft, numbers

SIDES = ("chosen", "rejected")
SIZES = (1, 2, 3, 4, 5, 8, 9, 16)


@pytest.fixture(scope="module")
def whole(tiny_model_path, tmp_path_factory):
    """The numbers of each kind with all nine rows in one batch."""
    folder = tmp_path_factory.mktemp("whole")
    found = {kind: numbers(make(kind, 9, tiny_model_path, folder)) for kind in KINDS}
    return found | {"sft": numbers(make_sft(9, tiny_model_path, folder))}


def test_numbers_by_hand(whole, tiny_model_path, tmp_path):
    """Each pair scored alone, in the formulas of TRL."""
    trainer = make("plain", 2, tiny_model_path, tmp_path)
    chosen, rejected = (score_sequences(trainer.model, trainer.eval_dataset[f"{side}_ids"], 1) for side in SIDES)
    differences = chosen - rejected
    losses = -logsigmoid(differences - torch.tensor([row["margin"] for row in PAIRS]))
    both = torch.cat([chosen, rejected])
    expected = {
        "loss": (losses + 0.1 * (chosen + rejected).square()).mean().item(),
        "accuracy": (differences > 0).float().mean().item(),
        "margin": differences.mean().item(),
        "min_reward": both.min().item(),
        "mean_reward": both.mean().item(),
        "max_reward": both.max().item(),
    }
    assert 0 < expected["accuracy"] < 1
    assert numbers(trainer) == pytest.approx(expected, abs=1e-5)
    assert whole["plain"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_batches_changes_nothing(kind, whole, tiny_model_path, tmp_path):
    trainer = make(kind, 1, tiny_model_path, tmp_path)
    for size in SIZES:
        trainer.args.per_device_eval_batch_size = size
        assert numbers(trainer) == pytest.approx(whole[kind], abs=1e-5), size
    if kind != "token":
        written = evaluate_pairs(trainer)
        assert whole[kind]["accuracy"] == pytest.approx(written["accuracy"], abs=1e-6)
        assert whole[kind]["margin"] == pytest.approx(written["margin"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_say_what_one_says(whole, tiny_model_path, tmp_path, repo_root):
    """Nine rows leave a last batch that accelerate fills up with rows that were there before."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [evaluation_worker.__file__, tiny_model_path, str(tmp_path)]
    own = {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    finished = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads((tmp_path / "evaluations.json").read_text())
    assert found.pop("processes") == 2
    for kind, by_size in found.items():
        for size, logged in by_size.items():
            assert logged == pytest.approx(whole[kind], abs=1e-5), (kind, size)
