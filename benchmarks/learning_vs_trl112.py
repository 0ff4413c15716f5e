"""Compare the learning curves of this project's PPOTrainer and of TRL 1.12's, the last release with PPO.

    python benchmarks/learning_vs_trl112.py

makes an environment for TRL 1.12, a small pretrained model and prompts, trains both on them from the same files with
the same settings, evaluates both with one function, and prints the curves with their differences. See README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import learning_report
from learning_curves import curve
from learning_world import Settings, make_world

HERE = Path(__file__).resolve().parent
CACHE = Path("~/.cache/rlhf-recipes/trl112").expanduser()
TRL = "1.12.0"
WORKERS = {"ours": "ppo_worker.py", "trl112": "trl112_worker.py"}


def make_environment(folder: Path) -> Path:
    """Make the environment of TRL 1.12, with this environment's versions of everything else; return its Python."""
    python = folder / "bin" / "python"
    if python.exists():
        code = "import importlib.metadata as m; print(m.version('trl'))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
        if found == TRL:
            return python
        if found:
            raise RuntimeError(f"{folder} has TRL {found}, not {TRL}. Give another folder by `--environment`.")
    else:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pinned = [
        f"{name}=={version(name)}" for name in ("transformers", "peft", "datasets", "accelerate", "bitsandbytes")
    ]
    # torch first and alone, so that the build which an index or wheel folder offers is kept
    for packages in ([f"torch=={version('torch').split('+')[0]}"], [f"trl=={TRL}", *pinned, "rich"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def train(side: str, seed: int, folder: Path, python: str | Path) -> None:
    """Train one side with one seed in a process of its own, unless that was done before."""
    run = folder / "runs" / f"{side}_{seed}"
    if (run / "run.json").exists():
        print(f"{run.name}: there already")
        return
    seconds = run_alone([python, HERE / WORKERS[side], folder, str(seed)], run)
    print(f"{run.name}: {seconds:.0f} s", flush=True)


def run_alone(command: list[object], run: Path) -> float:
    """Run a worker in a process of its own on one core, with its output in `run/log.txt`; return the seconds."""
    run.mkdir(parents=True, exist_ok=True)
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    one_core = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    with (run / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | quiet | one_core)
    if done.returncode:
        raise RuntimeError(f"The run failed; the end of {log.name}:\n" + Path(log.name).read_text()[-2000:])
    return time.perf_counter() - started


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=CACHE, help=f"of TRL {TRL}; made if need be ({CACHE})")
    parser.add_argument("--output", type=Path, default=Path("outputs/learning_vs_trl112"), help="(%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(1 2 3 4 5)")
    group = parser.add_argument_group("settings of both sides")
    for one in fields(Settings):
        kind = (lambda word: word == "true") if one.type is bool else one.type
        group.add_argument(f"--{one.name}", type=kind, default=one.default, help=f"({one.default})")
    given = parser.parse_args(argv)
    return given, Settings(**{one.name: getattr(given, one.name) for one in fields(Settings)})


def main(argv=None):
    given, settings = parse(argv)
    python = {"trl112": make_environment(given.environment), "ours": sys.executable}
    folder = given.output.resolve()
    make_world(folder, settings)
    for seed in given.seeds:
        for side in WORKERS:  # alternating
            train(side, seed, folder, python[side])
    curves = {side: {seed: curve(folder, f"{side}_{seed}") for seed in given.seeds} for side in WORKERS}
    for side in WORKERS:
        runs = [json.loads((folder / "runs" / f"{side}_{seed}" / "run.json").read_text()) for seed in given.seeds]
        assert len({(run["episodes"], run["optimizer_steps"]) for run in runs}) == 1
        print(f"{side}: TRL {runs[0]['trl']}, {runs[0]['episodes']} episodes, {runs[0]['optimizer_steps']} steps each")
    print(learning_report.write(folder, curves, asdict(settings)))
    print(f"\nWritten to {folder}: result.txt, result.json, curves.png where matplotlib is installed")


if __name__ == "__main__":
    main()
