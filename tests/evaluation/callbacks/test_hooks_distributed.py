"""Two processes measure what one measures."""

import json
from pathlib import Path

import pytest

from tests.ppo.test_distributed import run

WORKER = Path(__file__).with_name("hooks_worker.py")


@pytest.mark.slow
def test_two_processes_evaluate_as_one(sft_adapter, reward_adapter, tmp_path, repo_root):
    found = []
    for processes in (1, 2):
        run(processes, [str(sft_adapter), str(reward_adapter), str(tmp_path)], repo_root, WORKER)
        folder = tmp_path / f"run_{processes}"
        lines = [json.loads(line) for line in (folder / "policy_evaluation.jsonl").read_text().splitlines()]
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert json.loads((folder / "alarms.json").read_text()) == []
        assert [line["step"] for line in lines] == [1, 2]
        assert [entry["step"] for entry in history if "eval_win_rate" in entry] == [1, 2]
        found.append(lines)
    for one, two in zip(*found, strict=True):
        texts = [
            [{key: row[key] for key in ("prompt", "policy", "reference")} for row in line.pop("samples")]
            for line in (one, two)
        ]
        assert texts[0] == texts[1]
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
