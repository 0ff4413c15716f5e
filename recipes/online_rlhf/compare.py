"""Gold score against labels, over seeds: online with disagreement, online at random, and offline.

python recipes/online_rlhf/compare.py --seeds 5

All runs have the same steps of PPO and as many completions. `offline` has the labels of the online runs, all of them
from the first policy; `offline_more` has so many that the online runs have 0.6 of them.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_recipes.config import parse_stage
from rlhf_recipes.evaluation.records import write_records
from rlhf_recipes.statistics.metrics import bootstrap_interval
from rlhf_recipes.tracking.console import table

SHARE = 0.6  # of the labels of `offline_more`
ARMS = {
    "disagreement": {"selection": "disagreement"},
    "random": {"selection": "random"},
    "offline": {"rounds": 1},
    "offline_more": {"rounds": 1},
}
COLOURS = {"disagreement": "#0072b2", "random": "#d55e00", "offline": "#6b6b6b", "offline_more": "#1b1c1d"}


@dataclass
class ComparisonArguments:
    """What is compared."""

    online: str = field(
        default="recipes/online_rlhf/online.yaml", metadata={"help": "YAML of the online runs, and of all labels."}
    )
    output_dir: str = field(default="outputs/online_rlhf/comparison", metadata={"help": "Folder of the runs."})
    seeds: int = field(default=5, metadata={"help": "Runs of each kind."})


ARGUMENTS = (ComparisonArguments,)


def main(args: ComparisonArguments) -> None:
    import rounds  # beside this script

    if args.seeds < 2:
        raise ValueError(f"An interval needs at least 2 `seeds`, got {args.seeds}.")
    curves: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in ARMS}
    for seed in range(args.seeds):
        for arm, settings in ARMS.items():
            folder = Path(args.output_dir, f"seed_{seed}", arm)
            words = ["--config", args.online, "--output_dir", str(folder), "--seed", str(seed)]
            (run,) = rounds.parse_stage(rounds.ARGUMENTS, words)
            labels = math.ceil(run.label_budget / SHARE) if arm == "offline_more" else run.label_budget
            words += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
            (run,) = rounds.parse_stage(rounds.ARGUMENTS, [*words, "--label_budget", str(labels)])
            if not (folder / f"round_{run.rounds:02d}" / "round.json").exists():
                print(f"== seed {seed}, {arm}")
                rounds.main(run)
            paths = sorted(folder.glob("round_*/round.json"))
            curves[arm].append([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    result = compared(curves)
    write_records(Path(args.output_dir, "comparison.json"), {"arms": result, "curves": curves})
    draw(curves, Path(args.output_dir, "comparison.png"))
    print(laid_out(result))


def compared(curves: dict[str, list[list[dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Summarise the ends of all runs, and their distance from those of `offline_more`, seed by seed."""
    goal = [run[-1]["gold_score"] for run in curves["offline_more"]]
    result = {}
    for arm, runs in curves.items():
        ends = [run[-1] for run in runs]
        gold = [end["gold_score"] for end in ends]
        lead = [own - other for own, other in zip(gold, goal, strict=True)]
        result[arm] = {
            "labels": ends[0]["labels"],
            **{name: fmean(end[name] for end in ends) for name in ("gold_score", "reward_score", "kl")},
            "newest_policy_accuracy": fmean(end["newest_policy_accuracy"] for end in ends),
            "gold_score_ci": list(bootstrap_interval(gold, range(len(gold)))),
            "lead": fmean(lead),
            "lead_ci": list(bootstrap_interval(lead, range(len(lead)))),
            "gold_scores": gold,
        }
    return result


def laid_out(result: dict[str, dict[str, Any]]) -> str:
    rows = [["", "labels", "gold score", "95 % interval", "over offline_more", "95 % interval", "KL", "accuracy"]]
    for arm, end in result.items():
        ends = [f"[{low:.2f}, {high:.2f}]" for low, high in (end["gold_score_ci"], end["lead_ci"])]
        numbers = [f"{end[name]:.2f}" for name in ("gold_score", "lead", "kl", "newest_policy_accuracy")]
        rows.append([arm, str(end["labels"]), numbers[0], ends[0], numbers[1], ends[1], *numbers[2:]])
    return table(rows)


def draw(curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Draw the gold score after each round against the labels so far: the mean over seeds and its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (arm, runs) in enumerate(curves.items()):
        shift = 0.5 * (place - 1)  # so that intervals at the same number of labels lie side by side
        labels = [record["labels"] + shift for record in runs[0]]
        golds = [[run[number]["gold_score"] for run in runs] for number in range(len(labels))]
        ends = [bootstrap_interval(gold, range(len(gold))) for gold in golds]
        middle = [fmean(gold) for gold in golds]
        errors = [[m - e[0] for m, e in zip(middle, ends, strict=True)]]
        errors.append([e[1] - m for m, e in zip(middle, ends, strict=True)])
        axes.errorbar(labels, middle, errors, fmt="o-", capsize=3, color=COLOURS[arm], label=arm.replace("_", ", "))
    axes.set_xlabel("questions asked")
    axes.set_ylabel("gold score of the policy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
