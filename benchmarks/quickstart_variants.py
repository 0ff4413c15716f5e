"""Train the quickstart's PPO with several settings and seeds, and compare gold score, KL and critic.

    python benchmarks/quickstart_variants.py --output_dir outputs/variants placements --seeds 0 1 2 3 4
    python benchmarks/quickstart_variants.py --output_dir outputs/variants critics --seeds 0 1 2 3 4

It needs the world, SFT and reward model of `recipes/quickstart/run.sh`. A run that is there already is not repeated.
"""

import argparse
import importlib.util
import json
import math
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student

import rlhf_recipes
from rlhf_recipes.config import parse_stage
from rlhf_recipes.ppo.trainer import PPOTrainer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart" / "ppo.yaml"
# Options of all runs of a set: rollouts of 64 completions for the placements, the recipe's own for the critics.
COMMON = {
    "placements": [
        *("--steps_per_generation", "4", "--max_steps", "320", "--learning_rate", "5e-4"),
        *("--logging_steps", "8", "--evaluation_rows", "512"),
    ],
    "critics": ["--logging_steps", "16"],
}
SETS = {
    "placements": {
        "terminal": [],
        "uniform": ["--reward_placement", "uniform"],
        "discounted": ["--reward_placement", "discounted"],
        # Every token gets the whole score, about 17 times as much: the KL gets the same weight beside it.
        "every_token": ["--reward_placement", "every_token", "--kl_coef", "1.7"],
        "redistributed": ["--reward_placement", "redistributed"],
        "attention": ["--reward_placement", "attention"],
        "potential": [],
    },
    "critics": {
        "adapter": [],
        "adapter, policy's learning rate": ["--critic_learning_rate", "3e-4"],
        "adapter, upper of two layers": ["--critic_layers", "1"],
        "head": ["--critic", "head"],
    },
}


class WithPotential(PPOTrainer):
    """Shapes with the reward model's own score of the text before each token as the potential."""

    def __init__(self, **arguments):
        super().__init__(**arguments, potential=self.prefix_scores)

    def prefix_scores(self, prompt_ids, completion_ids, **kwargs):
        """The reward adapter's score before each token."""
        sequences = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        scores = self.roles.prefix_scores("reward_0", sequences, self.processing_class.pad_token_id, 64)
        return [row[-len(ids) - 1 : -1].tolist() for row, ids in zip(scores, completion_ids, strict=True)]


def train(variant: str, options: list[str], seed: int, folder: Path) -> None:
    """Run `recipes/ppo.py` with the options of a variant."""
    spec = importlib.util.spec_from_file_location("ppo_stage", ROOT / "recipes" / "ppo.py")
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    rlhf_recipes.PPOTrainer = (
        WithPotential if variant == "potential" else PPOTrainer
    )  # the script imports it in `main`
    own = ["--config", str(RECIPE), "--output_dir", str(folder), "--seed", str(seed), "--report_to", "none"]
    stage.main(*parse_stage(stage.ARGUMENTS, [*own, "--log_completions", "false", *options]))


def summary(folder: Path, target_kl: float) -> dict[str, float]:
    """Numbers of one run: at the end, held out; and along the run, at one KL."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rollouts = [entry for entry in history if "rewards/gold_score/mean" in entry]
    near = [row["rewards/gold_score/mean"] for row in rollouts if abs(row["kl"] - target_kl) < 0.25 * target_kl]
    explained = [row["critic/explained_variance"] for row in rollouts]
    return {
        "gold": evaluation["policy"]["gold_score"],
        "kl": evaluation["policy"]["kl"],
        "win_rate": evaluation["win_rate"],
        "gold_at_kl": fmean(near) if near else math.nan,
        "gold_at_rollout_10": fmean(row["rewards/gold_score/mean"] for row in rollouts[7:12]),
        "explained_16_to_20": fmean(explained[15:20]),
        "explained_21_to_40": fmean(explained[20:]),
    }


def interval(values: list[float]) -> str:
    """Mean and 95 % interval (Student's t over seeds)."""
    found = [value for value in values if not math.isnan(value)]
    if len(found) < 2:
        return f"{found[0]:.2f}" if found else "-"
    half = student.ppf(0.975, len(found) - 1) * stdev(found) / math.sqrt(len(found))
    return f"{fmean(found):.2f} ± {half:.2f}" + ("" if len(found) == len(values) else f" ({len(found)} seeds)")


def main() -> None:
    """Train what is missing, then print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/variants"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--target_kl", type=float, default=2.5, help="nats at which gold scores are compared")
    args, more = parser.parse_known_args()
    results = {}
    for seed in args.seeds:
        for variant, options in SETS[args.set].items():
            folder = args.output_dir / args.set / variant.replace(" ", "_") / f"seed_{seed}"
            if args.only is None or variant in args.only:
                if not (folder / "evaluation.json").exists():
                    train(variant, [*COMMON[args.set], *options, *more], seed, folder)
                results.setdefault(variant, []).append(summary(folder, args.target_kl))
    columns = list(next(iter(results.values()))[0])
    print(" | ".join(["variant", *columns]))
    for variant, rows in results.items():
        print(" | ".join([variant, *(interval([row[name] for row in rows]) for name in columns)]))
    path = args.output_dir / f"{args.set}.json"
    path.write_text(json.dumps({"target_kl": args.target_kl, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
