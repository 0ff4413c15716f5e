"""After run.sh's first stages: reward model and PPO with facts and without, for several seeds, and their difference.

python recipes/llava_rlhf/compare.py --seeds 5
"""

import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t

from rlhf_recipes.config import parse_stage

HERE = Path(__file__).resolve().parent


@dataclass
class CompareArguments:
    """The seeds, and where the runs are."""

    output_dir: str = field(default="outputs/llava_rlhf", metadata={"help": "Folder of the stages."})
    seeds: int = field(default=5, metadata={"help": "How many seeds of both stages, from 0."})


ARGUMENTS = (CompareArguments,)


def main(args: CompareArguments, **common) -> None:
    """Run what is not there yet, and print the rates; `common` are options of both stages."""
    out = args.output_dir
    rates: dict[str, list[float]] = {"with_facts": [], "without_facts": []}
    for seed in range(args.seeds):
        for arm, values in rates.items():
            reward, ppo = (f"{out}/seeds/{arm}_{seed}/{stage}" for stage in ("reward", "ppo"))
            options = {"model_name_or_path": f"{out}/world/base", "seed": seed, "disable_tqdm": True, **common}
            pairs = f"{out}/preferences/{arm}.jsonl"
            run_stage(HERE.parent / "reward.py", "reward", output_dir=reward, dataset_name=pairs, **options)
            starts = {"sft_adapter": f"{out}/sft", "reward_adapter": reward, "dataset_name": f"{out}/world"}
            run_stage(HERE / "train.py", "ppo", output_dir=ppo, facts=arm == "with_facts", **starts, **options)
            evaluation = json.loads(Path(ppo, "evaluation.json").read_text())
            values.append(evaluation["policy"]["hallucination_rate"])
            reference = evaluation["reference"]["hallucination_rate"]  # the SFT model, sampled with the same seed
    differences = [a - b for a, b in zip(*rates.values(), strict=True)]
    print("share of stated attributes that are not true, mean [95 % interval over seeds]")
    print(f"{'SFT':>14}: {reference:.3f}")
    for name, values in (*rates.items(), ("difference", differences)):
        print(f"{name:>14}: {interval(values)}   {' '.join(f'{value:.3f}' for value in values)}")


def run_stage(script: Path, config: str, output_dir: str, **options) -> None:
    """Run a stage's script in this process, unless its evaluation is there."""
    if Path(output_dir, "evaluation.json").exists():
        return
    options = {"config": HERE / f"{config}.yaml", "output_dir": output_dir, **options}
    own = sys.argv
    sys.argv = [str(script), *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = own


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of Student's t."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values):.3f} [{fmean(values) - half:.3f}, {fmean(values) + half:.3f}]"


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
