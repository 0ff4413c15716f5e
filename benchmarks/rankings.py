"""Rankings of four: learn from them directly, or turn them into scores first and fit those by regression.

    python benchmarks/rankings.py --seeds 0 1 2 3 4

It needs the world and the SFT model of `recipes/quickstart/run.sh`. For each seed the SFT model writes four reviews
for each of 750 prompts, and the quickstart's annotator compares all six pairs of them: 4,500 choices, as many as the
quickstart has. A review's rank follows from its points, 1 for a win and half of one for a tie. The reward models are
compared on reviews for held-out prompts, whose gold score is known. Learning rates are chosen first, for each arm
alone, with a seed that is not used again. What is there already is not computed again.
"""

import argparse
import importlib.util
import json
import math
import random
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from scipy.stats import t as student
from transformers import set_seed

from rlhf_recipes.data import load_rows
from rlhf_recipes.data.synthetic import Annotator, Completion, GoldScore
from rlhf_recipes.models import load_causal_lm, load_policy, load_sequence_classifier, load_tokenizer, lora_config
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer, RewardModelConfig, score_sequences
from rlhf_recipes.tools.ranking.ranking import bradley_terry, round_robin_elo
from rlhf_recipes.tools.ranking.ratings import rate_rankings

ROOT = Path(__file__).resolve().parents[1]
# Objective of the trainer, and what makes its ratings.
ARMS = {
    "ranking loss": ("ranking", None),
    "Plackett-Luce loss": ("plackett_luce", None),
    "Elo, regression": ("regression", round_robin_elo),
    "Bradley-Terry, regression": ("regression", partial(bradley_terry, prior=1.0)),
    "Bradley-Terry with prior 0.1, regression": ("regression", partial(bradley_terry, prior=0.1)),
}
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEED = 100
K = 4


def annotate(world: Path, sft: Path, split: str, groups: int, seed: int) -> list[dict]:
    """Groups of `K` samples of the SFT model, ranked by the annotator."""
    spec = importlib.util.spec_from_file_location("annotate", ROOT / "recipes" / "quickstart" / "annotate.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    args = recipe.AnnotationArguments(world=str(world), sft_adapter=str(sft), seed=seed)
    tokenizer = load_tokenizer(f"{world}/base")
    model = load_policy(load_causal_lm(f"{world}/base", quantization_config=recipe.FOUR_BIT), str(sft)).eval()
    annotator = Annotator(
        GoldScore.from_file(f"{world}/gold.json"), args.temperature, args.lapse, args.tie_margin, seed
    )
    prompts = random.Random(seed).choices(list(load_rows(str(world), split=split)["prompt"]), k=groups)
    torch.manual_seed(seed)
    samples = [recipe.sample(model, tokenizer, prompts, args) for _ in range(K)]
    rows = []
    for prompt, *group in zip(prompts, *samples, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in group]
        if len(set(texts)) < K or not all(texts):
            continue  # equal or empty reviews: a handful
        seen = [Completion(text, ids[-1] == tokenizer.eos_token_id) for text, ids in zip(texts, group, strict=True)]
        points = [0.0] * K
        for i, j in combinations(range(K), 2):
            choice = annotator.choose(prompt, seen[i], seen[j])
            points[i] += {"first": 1.0, "tie": 0.5, "second": 0.0}[choice]
            points[j] += {"first": 0.0, "tie": 0.5, "second": 1.0}[choice]
        rows.append(
            {
                "prompt": prompt,
                "completions": [" " + text for text in texts],
                "completion_ids": [tokenizer(prompt)["input_ids"] + ids for ids in group],
                "ranks": [1 + sum(other > own for other in points) for own in points],
                "gold": [sum(annotator.gold.parts(prompt, *completion).values()) for completion in seen],
            }
        )
    return rows


def train(base: str, rows: list[dict], arm: str, learning_rate: float, epochs: int, seed: int, folder: Path):
    """A reward model of one arm."""
    objective, method = ARMS[arm]
    table = Dataset.from_list(rows).remove_columns("gold")
    if method is not None:
        table = rate_rankings(table, method)
    set_seed(seed)
    trainer = PreferenceTrainer(
        model=load_sequence_classifier(base),
        args=PreferenceConfig(
            output_dir=str(folder),
            objective=objective,
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=8,  # prompts, so that a step sees 32 reviews
            max_length=128,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        ),
        train_dataset=table,
        processing_class=load_tokenizer(base),
        peft_config=lora_config(RewardModelConfig(), "SEQ_CLS"),
    )
    trainer.train()
    return trainer.model


def measure(model, rows: list[dict]) -> dict[str, float]:
    """How well the scores of held-out reviews follow their gold scores."""
    flat = score_sequences(model, [ids for row in rows for ids in row["completion_ids"]], batch_size=256)
    scores, gold = flat.double().reshape(-1, K).numpy(), np.array([row["gold"] for row in rows])
    ranks = np.array([row["ranks"] for row in rows])
    pairs = list(combinations(range(K), 2))
    first, second = (list(side) for side in zip(*pairs, strict=True))
    won, truth, chosen = (
        np.sign(values[:, first] - values[:, second]).ravel() for values in (scores, gold, -ranks.astype(float))
    )
    return {
        "accuracy": float((won == truth)[truth != 0].mean()),
        "accuracy_annotator": float((won == chosen)[chosen != 0].mean()),
        "spearman": float(spearmanr(scores.ravel(), gold.ravel()).statistic),
        "spearman_within": float(np.nanmean([spearmanr(*pair).statistic for pair in zip(scores, gold, strict=True)])),
    }


def run(args: argparse.Namespace, arm: str, learning_rate: float, seed: int) -> dict[str, float]:
    """Numbers of one run, from its file if it is there."""
    name = f"{arm.replace(' ', '_').replace(',', '')}_{learning_rate:g}_{seed}"
    name += "" if args.epochs == 1 else f"_{args.epochs}_epochs"
    path = args.output_dir / "runs" / f"{name}.json"
    if not path.exists():
        rows = {}
        for split, groups in (("train", args.groups), ("test", args.test_groups)):
            data = args.output_dir / f"{split}_{seed}.json"
            if not data.exists():
                found = annotate(args.world, args.sft_adapter, f"prompts_{split}", groups, seed)
                data.parent.mkdir(parents=True, exist_ok=True)
                data.write_text(json.dumps(found))
            rows[split] = json.loads(data.read_text())
        base, folder = f"{args.world}/base", args.output_dir / "trainer"
        model = train(base, rows["train"], arm, learning_rate, args.epochs, seed, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure(model, rows["test"])))
        print(name, path.read_text(), flush=True)
    return json.loads(path.read_text())


def interval(values: list[float]) -> str:
    """Mean and 95 % interval (Student's t over seeds)."""
    half = (
        student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    )
    return f"{fmean(values):+.4f} ± {half:.4f}"


def main() -> None:
    """Choose learning rates, run what is missing, and print the table and the differences to the first arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("outputs/quickstart/world"))
    parser.add_argument("--sft_adapter", type=Path, default=Path("outputs/quickstart/sft"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/rankings"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--groups", type=int, default=750, help="prompts of the training rankings")
    parser.add_argument("--test_groups", type=int, default=500, help="held-out prompts")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the others are compared with the first"
    )
    args = parser.parse_args()

    chosen = {
        arm: max(LEARNING_RATES, key=lambda rate, arm=arm: run(args, arm, rate, TUNING_SEED)["accuracy"])
        for arm in args.arms
    }
    results = {arm: [run(args, arm, chosen[arm], seed) for seed in args.seeds] for arm in args.arms}
    columns, first = list(results[args.arms[0]][0]), args.arms[0]
    print(" | ".join(["arm", "learning rate", *columns]))
    for arm, rows in results.items():
        print(" | ".join([arm, f"{chosen[arm]:g}", *(interval([row[name] for row in rows]) for name in columns)]))
    for arm, rows in results.items():
        paired = [
            interval([row[name] - base[name] for row, base in zip(rows, results[first], strict=True)])
            for name in columns
        ]
        print(" | ".join([f"{arm} less {first}", "", *paired]))
    (args.output_dir / f"result_{args.epochs}.json").write_text(
        json.dumps({"chosen": chosen, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
