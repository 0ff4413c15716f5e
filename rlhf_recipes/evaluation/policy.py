"""Compare a policy with its reference on held-out prompts: is it better, or does it only please the reward model?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset

from rlhf_recipes.checkpoints import save_evaluation
from rlhf_recipes.evaluation.sampling import in_batches, measured, with_scores
from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.ppo._trl import generate, rewards
from rlhf_recipes.ppo.passes import policy_pass, reference_pass
from rlhf_recipes.ppo.trainer import PPOTrainer
from rlhf_recipes.statistics.metrics import bootstrap_interval, win_outcomes

SAMPLES = 20  # kept in the files
SUMMARY = ("gold_score", "reward_score", "kl", "length", "eos_rate")


def evaluate_policy(
    trainer: PPOTrainer, dataset: Dataset, *, gold: str | None = None, rows: int = 512, seed: int = 0
) -> dict[str, Any]:
    """Sample from the policy and from its reference on the same prompts and compare them.

    The sampling has its own seed, so that runs can be compared. The win rate counts ties as half and is judged by the
    gold score where there is one, otherwise by the reward that PPO maximised, which says less. Its 95 % interval is a
    bootstrap over prompts, because completions of one prompt are not independent.

    Args:
        trainer: A PPO trainer, trained or not.
        dataset: Held-out rows with a column `prompt`.
        gold: Name of the reward function that measures the truth; give it the weight 0 so that PPO does not see it.
        rows: Completions to sample from each of the two; prompts are repeated if there are fewer.
        seed: Seed of the sampling and of the bootstrap.

    Returns:
        For `policy` and `reference` the means of `gold_score` (or `None`), `reward_score`, `kl` (nats per completion),
        `length` (tokens) and `eos_rate`; `win_rate`, `win_rate_ci` [low, high], `win_rate_by`, `rows`, `prompts`,
        `seed`, and `samples`, some completions of both side by side with their scores and `outcome`.

    Raises:
        ValueError: If there is no reward function named `gold`, or no prompt.
    """
    if gold is not None and gold not in trainer.reward_func_names:
        raise ValueError(f"No reward function is named {gold!r}; there are {trainer.reward_func_names}.")
    if len(dataset) == 0:
        raise ValueError("The evaluation needs at least one held-out prompt, and the dataset is empty.")
    indices = [row % len(dataset) for row in range(rows)]
    training = trainer.model.training
    trainer.model.eval()
    # Independent draws: with the same random numbers both would often say the same, and all would look like ties.
    policy = sample_rows(trainer, dataset, indices, POLICY, gold, 2 * seed)
    reference = sample_rows(trainer, dataset, indices, trainer.reference, gold, 2 * seed + 1)
    trainer.model.train(training)

    judge = "reward_score" if gold is None else "gold_score"
    outcomes = win_outcomes([row[judge] for row in policy], [row[judge] for row in reference])
    low, high = bootstrap_interval(outcomes, indices, seed=seed)
    return {
        "policy": _means(policy),
        "reference": _means(reference),
        "win_rate": float(outcomes.mean()),
        "win_rate_ci": [low, high],
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
    lines = [f"{'':<14}{'policy':>10}{'reference':>12}"]
    for name in SUMMARY:
        values = [evaluation[side][name] for side in ("policy", "reference")]
        if None not in values:
            lines.append(f"{name:<14}{values[0]:>10.3f}{values[1]:>12.3f}")
    low, high = evaluation["win_rate_ci"]
    lines.append(
        f"win rate of the policy by {evaluation['win_rate_by']}: {evaluation['win_rate']:.3f} "
        f"(95 % interval {low:.3f} to {high:.3f}, {evaluation['rows']} completions of {evaluation['prompts']} prompts)"
    )
    return "\n".join([*lines, f"written to {path}"])


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    return {name: None if rows[0][name] is None else fmean(float(row[name]) for row in rows) for name in SUMMARY}


def sample_rows(
    trainer: PPOTrainer, dataset: Dataset, indices: list[int], role: str | None, gold: str | None, seed: int
) -> list[dict[str, Any]]:
    """Sample one completion per index from a role of a PPO trainer, and measure it.

    Args:
        trainer: The trainer; its model should be in evaluation mode.
        dataset: Rows with a column `prompt`.
        indices: The rows to take, `N` of them.
        role: The adapter to sample with: the policy's, or `trainer.reference`.
        gold: Name of the reward function that measures the truth, if there is one.
        seed: Seed of the sampling.

    Returns:
        For each completion its text, `completion_ids`, `gold_score`, `reward_score`, `kl` and `entropy` (sums over the
        tokens, in nats), `length` and `eos_rate`; on all processes the same.
    """
    batch = partial(_sample_batch, trainer, role=role, gold=gold)
    return in_batches(trainer, dataset, indices, batch, seed, f"sampling, {role or 'base'}")


@torch.no_grad()
def _sample_batch(
    trainer: PPOTrainer, rows: list[dict[str, Any]], role: str | None, gold: str | None
) -> list[dict[str, Any]]:
    prompts = [row["prompt"] for row in rows]
    model = trainer.model if role == POLICY else trainer.roles.model
    with trainer.roles.use(role):
        texts, completions, completion_ids = generate(trainer, model, prompts)
        ours = policy_pass(trainer, model, texts)
    theirs = reference_pass(trainer, trainer.roles, trainer.reference, texts)
    mask = texts.completion_mask.bool()
    columns = rewards(trainer, rows, completions, completion_ids)
    start = trainer.accelerator.process_index * len(rows)
    scored = with_scores(columns[start : start + len(rows)], trainer, gold)
    sums = [
        (values.masked_fill(~mask, 0.0)).sum(dim=1).tolist() for values in (ours.logps - theirs.logps, ours.entropies)
    ]
    return [
        measured(completions[i], ids, trainer.eos_token_ids, kl=sums[0][i], entropy=sums[1][i]) | scored[i]
        for i, ids in enumerate(completion_ids)
    ]
