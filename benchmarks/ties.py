"""Train the quickstart's reward model with the annotator's ties dropped and with ties fitted, and compare.

    python benchmarks/ties.py --seeds 0 1 2 3 4

It needs the world and the SFT model of `recipes/quickstart/run.sh`. For each seed the annotator judges fresh samples,
and reward models are trained on its choices without the ties (`drop`) and with them (`soft`), both for the same number
of optimizer steps and for one epoch each; `soft` has more rows, so its epoch is longer. All are measured on the same
held-out prompts, with their ties. A run that is there already is not repeated.
"""

import argparse
import importlib.util
import json
import math
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import torch
from scipy.stats import spearmanr
from scipy.stats import t as student

from rlhf_recipes.config import parse_stage
from rlhf_recipes.reward_modeling import PreferenceTrainer, score_sequences
from rlhf_recipes.reward_modeling.losses import pairwise_loss

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart" / "reward.yaml"
# Name, ties, and whose epoch sets the number of steps.
VARIANTS = {
    "drop": ("drop", "drop"),
    "soft, steps of drop": ("soft", "drop"),
    "soft": ("soft", "soft"),
    "drop, steps of soft": ("drop", "soft"),
}
COMPARISONS = {
    "same steps": ("soft, steps of drop", "drop"),
    "same steps, longer": ("soft", "drop, steps of soft"),
    "same epochs": ("soft", "drop"),
}
TRAINED: list[PreferenceTrainer] = []


class Kept(PreferenceTrainer):
    """A trainer that the benchmark can ask for scores after the stage is done."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        TRAINED.append(self)


@cache
def load(path: str):
    """Import a recipe's script."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "recipes" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def annotate(seed: int, folder: Path, more: list[str]) -> Path:
    """Have the annotator judge fresh samples."""
    rows = folder / "preferences"
    if not rows.exists():
        module = load("quickstart/annotate.py")
        module.main(*parse_stage(module.AnnotationArguments, ["--seed", str(seed), "--output_dir", str(rows), *more]))
    return rows


def train(rows: Path, ties: str, steps: int | None, seed: int, folder: Path, more: list[str]) -> dict[str, float]:
    """Run `recipes/reward.py`, and measure the model on the held-out rows."""
    stage = load("reward.py")
    stage.PreferenceTrainer = Kept
    own = ["--config", str(RECIPE), "--dataset_name", str(rows), "--output_dir", str(folder), "--ties", ties]
    own += ["--seed", str(seed), "--report_to", "none", *(["--max_steps", str(steps)] if steps else [])]
    stage.main(*parse_stage(stage.ARGUMENTS, [*own, *more]))
    trainer = TRAINED.pop()
    held_out = trainer.eval_dataset
    chosen, rejected = (score_sequences(trainer.model, held_out[f"{side}_ids"]) for side in ("chosen", "rejected"))
    gold = [*held_out["gold_chosen"], *held_out["gold_rejected"]]
    tied = torch.tensor([label == 0.5 for label in held_out["label"]])
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return {
        "steps": trainer.state.global_step,
        "log_loss": evaluation["log_loss"],
        "log_loss_choices": pairwise_loss(chosen[~tied], rejected[~tied]).item(),
        "log_loss_ties": pairwise_loss(chosen[tied], rejected[tied], label=0.5).item(),
        "accuracy": evaluation["accuracy"],
        "rank_correlation": float(spearmanr([*chosen.tolist(), *rejected.tolist()], gold).statistic),
        "n": evaluation["n"],
        "ties": evaluation["ties"],
    }


def interval(values: list[float]) -> str:
    """Mean and 95 % interval (Student's t over seeds)."""
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):+.4f} [{fmean(values) - half:+.4f}, {fmean(values) + half:+.4f}]"


def main() -> None:
    """Train what is missing, then print means and paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ties"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--annotator", default="", help="options of annotate.py, such as '--tie_margin 0.3'")
    args, more = parser.parse_known_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for seed in args.seeds:
        folder = args.output_dir / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        rows, steps = annotate(seed, folder, args.annotator.split()), {}
        for name, (ties, length) in ((name, VARIANTS[name]) for name in args.only):
            file = folder / name.replace(", ", "_").replace(" ", "_") / "result.json"
            if not file.exists():
                result = train(rows, ties, steps.get(length), seed, file.parent, more)
                file.write_text(json.dumps(result, indent=1) + "\n")
            results[name].append(json.loads(file.read_text()))
            if ties == length:  # one epoch
                steps[ties] = results[name][-1]["steps"]
    metrics = list(results[args.only[0]][0])
    for name, found in results.items():
        print(f"{name}: " + ", ".join(f"{metric} {fmean(row[metric] for row in found):.4f}" for metric in metrics))
    for name, (left, right) in COMPARISONS.items():
        if not {left, right} <= results.keys():
            continue
        print(f"{name} ({left!r} minus {right!r})")
        for metric in metrics[1:-2]:
            pairs = zip(results[left], results[right], strict=True)
            print(f"  {metric}: {interval([ours[metric] - theirs[metric] for ours, theirs in pairs])}")


if __name__ == "__main__":
    main()
