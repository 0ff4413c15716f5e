"""The quickstart as a user runs it, from end to end: what it prints, and what it leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MOST_LINES_OF_WARNINGS = 5  # in all stages together


@pytest.mark.slow
def test_the_quickstart_prints_what_it_does_and_hardly_a_warning(repo_root, tmp_path):
    for part in ("recipes", "rlhf_recipes"):
        shutil.copytree(repo_root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    clean = {name: value for name, value in os.environ.items() if not re.match("WANDB|NETRC|PYTHONWARNINGS", name)}
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        ["bash", "recipes/quickstart/run.sh"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    # In a file there are no bars, so that only warnings and messages of loggers go to stderr.
    warnings = [line for line in run.stderr.splitlines() if line.strip()]
    warnings += [line for line in run.stdout.splitlines() if "warn" in line.lower()]
    assert len(warnings) <= MOST_LINES_OF_WARNINGS, "\n".join(warnings)
    assert "\r" not in run.stdout + run.stderr
    assert "{" not in run.stdout, "records are for files"

    lines = run.stdout.splitlines()
    assert len([line for line in lines if re.match(r" *\d+/640 ", line)]) == 40, "a line for each rollout"
    results = {}
    for stage in ("sft", "reward", "ppo"):
        results[stage] = json.loads((tmp_path / "outputs/quickstart" / stage / "evaluation.json").read_text())
    (perplexity,) = [line.split() for line in lines if line.startswith("perplexity")]
    assert float(perplexity[1]) == pytest.approx(results["sft"]["perplexity"], abs=1e-3)
    (accuracy,) = [line.split() for line in lines if line.startswith("reward model")]
    assert float(accuracy[2]) == pytest.approx(results["reward"]["accuracy"], abs=1e-3)
    assert f"win rate of the policy by gold score: {results['ppo']['win_rate']:.3f}, 95 % interval [" in run.stdout
