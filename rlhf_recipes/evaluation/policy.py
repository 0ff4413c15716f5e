"""Compare a policy with its reference on held-out prompts: is it better, or does it only please the reward model?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset

from rlhf_recipes.checkpoints import save_evaluation
from rlhf_recipes.evaluation.sampling import has_reference, sample_rows
from rlhf_recipes.statistics.metrics import share_interval, win_outcomes
from rlhf_recipes.tracking.console import table

SAMPLES = 20  # kept in the files
SUMMARY = {
    "gold_score": ("gold score", ".3f"),
    "reward_score": ("reward", ".3f"),
    "kl": ("KL (nats)", "z.3f"),  # `z`: no -0.000
    "length": ("length (tokens)", ".1f"),
    "eos_rate": ("ended by themselves", ".1%"),
}


def evaluate_policy(
    trainer: Any, dataset: Dataset, *, gold: str | None = None, rows: int = 512, seed: int = 0
) -> dict[str, Any]:
    """Sample from the policy and from its reference on the same prompts and compare them.

    The sampling has its own seed, so that runs can be compared. The win rate counts ties as half and is judged by the
    gold score where there is one, otherwise by the reward that was maximised, which says less. Its 95 % interval is a
    bootstrap over prompts, because completions of one prompt are not independent. With `ema_decay` the policy with the
    average of its weights is a third side, `ema`, which draws with the policy's random numbers.

    Args:
        trainer: A PPO, GRPO or RLOO trainer, trained or not, with a reference in memory.
        dataset: Held-out rows with a column `prompt`.
        gold: Name of the reward function that measures the truth; give it the weight 0 so that it is not trained on.
        rows: Completions to sample from each of the two; prompts are repeated if there are fewer.
        seed: Seed of the sampling and of the bootstrap.

    Returns:
        For `policy` and `reference` the means of `gold_score` (or `None`), `reward_score`, `kl` (nats per completion),
        `length` (tokens), `eos_rate` and, in `rewards`, of every reward function by its name; `win_rate`,
        `win_rate_ci` [low, high], `win_rate_by`, `rows`, `prompts`, `seed`, and `samples`, some completions of both
        side by side with their scores and `outcome`. With `ema_decay` also `ema`: the same means, with the `win_rate`
        and `win_rate_ci` of the average over the reference.

    Raises:
        ValueError: If there is no reward function named `gold`, no prompt, or no reference.
    """
    if gold is not None and gold not in trainer.reward_func_names:
        raise ValueError(f"No reward function is named {gold!r}; there are {trainer.reward_func_names}.")
    if len(dataset) == 0:
        raise ValueError("The evaluation needs at least one held-out prompt, and the dataset is empty.")
    if not has_reference(trainer):
        raise ValueError(
            "The trainer holds no reference to compare the policy with. TRL loads one with `beta` above 0; a trainer "
            "of an adapter always has one."
        )
    indices = [row % len(dataset) for row in range(rows)]
    judge = "reward_score" if gold is None else "gold_score"

    def sample(of_reference: bool) -> list[dict[str, Any]]:
        # Independent draws: with the same random numbers both would often say the same, and all would look like ties.
        draws = 2 * seed + of_reference
        return sample_rows(trainer, dataset, indices, of_reference=of_reference, gold=gold, seed=draws)

    def wins(side: list[dict[str, Any]]) -> dict[str, Any]:
        outcomes = win_outcomes([row[judge] for row in side], [row[judge] for row in reference])
        return {"win_rate": float(outcomes.mean()), "win_rate_ci": [*share_interval(outcomes, indices, seed=seed)]}

    training = trainer.model.training
    trainer.model.eval()
    policy, reference = sample(of_reference=False), sample(of_reference=True)
    evaluation = {"policy": _means(policy)}
    if (average_of := getattr(trainer, "average", None)) is not None:  # PPO's alone
        with average_of.in_place():
            average = sample(of_reference=False)
        evaluation["ema"] = {**_means(average), **wins(average)}
    trainer.model.train(training)
    return {
        **evaluation,
        "reference": _means(reference),
        **wins(policy),
        "win_rate_by": judge,
        "rows": rows,
        "prompts": len(set(indices)),
        "seed": seed,
        "samples": side_by_side([dataset[index]["prompt"] for index in indices[:SAMPLES]], policy, reference),
    }


def side_by_side(
    prompts: Sequence[Any], policy: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Put the completions of both sides for the same prompts beside each other.

    Args:
        prompts: The prompts, the first `N` rows.
        policy: The policy's completions as `sample_rows` gives them, `N` or more.
        reference: The reference's, if there is one.

    Returns:
        For each prompt `prompt`, `policy`, `policy_reward`, `policy_gold`, the same for `reference`, and `outcome` for
        the policy: `win`, `loss` or `tie` by the gold score or, without one, by the reward; `None` without scores.
    """
    sides = [("policy", policy)] + ([] if reference is None else [("reference", reference)])
    samples: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    for name, rows in sides:
        for sample, row in zip(samples, rows, strict=False):
            scores = {f"{name}_reward": row["reward_score"], f"{name}_gold": row["gold_score"]}
            sample |= {name: row["completion"], **scores}
    for sample in samples if reference is not None else ():
        by = "reward" if sample["policy_gold"] is None else "gold"
        ours, theirs = sample[f"policy_{by}"], sample[f"reference_{by}"]
        sample["outcome"] = None if ours is None else "tie" if ours == theirs else "win" if ours > theirs else "loss"
    return samples


def write_evaluation(evaluation: dict[str, Any], folder: str | Path) -> str:
    """Write `evaluation.json` into a run's folder and return the comparison as a small table of text."""
    path = save_evaluation(evaluation, folder)
    sides = [side for side in ("policy", "ema", "reference") if side in evaluation]
    rows = [["held-out prompts", *sides]]
    for name, (title, spec) in SUMMARY.items():
        values = [evaluation[side][name] for side in sides]
        if None not in values:
            rows.append([title, *(format(value, spec) for value in values)])
    by = SUMMARY[evaluation["win_rate_by"]][0]
    rates = [f"win rate of the policy by {by}: {_rate(evaluation)}"]
    if "ema" in evaluation:
        rates.append(f"with the average of its weights (ema): {_rate(evaluation['ema'])}")
    return (
        f"\n{table(rows)}\n\n" + "\n".join(rates) + "\n"
        f"{evaluation['rows']:,} completions of {evaluation['prompts']:,} prompts on each side\n{path}"
    )


def _rate(side: dict[str, Any]) -> str:
    low, high = side["win_rate_ci"]
    return f"{side['win_rate']:.3f}, 95 % interval [{low:.3f}, {high:.3f}]"


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {
        name: None if rows[0][name] is None else fmean(float(row[name]) for row in rows) for name in SUMMARY
    }
    return {**means, "rewards": {name: _mean(rows, name) for name in rows[0]["rewards"]}}


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Mean of what one reward function gave, over the rows to which it gave anything: TRL has nan for nothing."""
    given = [row["rewards"][name] for row in rows if not math.isnan(row["rewards"][name])]
    return fmean(given) if given else None
