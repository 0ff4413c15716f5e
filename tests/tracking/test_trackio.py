"""trackio, which is no dependency: a PPO stage reports there where it is installed."""

import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from trl.extras import profiling

from rlhf_recipes.evaluation.policy import evaluate_policy

STAGE = """
import sys
sys.path.append(sys.argv[2])  # where trackio is
sys.path.insert(0, sys.argv[1])
import ppo
from rlhf_recipes.config import parse_stage
ppo.main(*parse_stage(ppo.ARGUMENTS, ["--config", sys.argv[3]]))
"""


def test_the_evaluation_after_training_sends_no_times_to_a_run_that_is_over(make_trainer, prompts, monkeypatch):
    trainer = make_trainer()

    def log(metrics, step):
        raise RuntimeError("Call trackio.init() before trackio.log().")  # what trackio says after its callback's end

    monkeypatch.setattr(profiling, "is_trackio_available", lambda: True)
    monkeypatch.setattr(profiling, "trackio", SimpleNamespace(log=log), raising=False)
    trainer.args.report_to = ["trackio"]
    assert evaluate_policy(trainer, prompts, rows=8)["rows"] == 8
    assert trainer.args.report_to == ["trackio"]


def test_a_stage_reports_to_trackio(stages, run_alone, repo_root, tmp_path):
    trackio = pytest.importorskip("trackio")
    options = yaml.safe_load((stages.parent / "ppo.yaml").read_text())
    options |= {"report_to": "trackio", "output_dir": str(tmp_path / "ppo")}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(options))
    place = Path(sys.modules["trackio"].__file__).parents[1]
    arguments = ["-c", STAGE, repo_root / "recipes", place, tmp_path / "ppo.yaml"]
    finished = run_alone(arguments, tmp_path, TRACKIO_DIR=str(tmp_path / "kept"), HF_HUB_OFFLINE="1")
    assert finished.returncode == 0, finished.stderr[-3000:]
    [file] = (tmp_path / "kept").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics")]
    logged = {key for row in rows for key in row}
    assert {"train/ppo/policy_loss", "train/kl", "eval/win_rate", "train/alarm/kl_budget", "completions"} <= logged, (
        trackio.__version__
    )
