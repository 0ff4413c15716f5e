"""The best-of-n curve of the reference: what choosing among its samples gives, to hold a training against."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from rlhf_recipes.evaluation.policy import sample_rows
from rlhf_recipes.ppo.trainer import PPOTrainer
from rlhf_recipes.tools.certificate.functional.samples import best_of_n


def best_of_n_curve(
    trainer: PPOTrainer, dataset: Dataset, *, gold: str | None = None, prompts: int = 32, n: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Sample `n` completions of the reference for each prompt, and take the best by the trainer's reward.

    Best-of-n needs no training, so a policy that is below this curve at the same KL has learned worse than a choice
    would do. The estimate is exact over all subsets of the samples.

    Source: https://huggingface.co/papers/2210.10760, and https://huggingface.co/papers/2112.09332, appendix I.

    Args:
        trainer: A PPO trainer, trained or not.
        dataset: Held-out rows with a column `prompt`; the first `prompts` of them are used.
        gold: Name of the reward function that measures the truth.
        prompts: Prompts to sample for.
        n: Samples of each, at least 2.
        seed: Seed of the sampling.

    Returns:
        What `best_of_n` gives: a row of `curve` for each n, with its `kl` in nats, the reward (`proxy`) and, with
        a gold score, `gold` and `oracle`, each with its interval.

    Raises:
        ValueError: If there is no reward function named `gold`, no prompt, or `n` is below 2.
    """
    if gold is not None and gold not in trainer.reward_func_names:
        raise ValueError(f"No reward function is named {gold!r}; there are {trainer.reward_func_names}.")
    if len(dataset) == 0 or prompts < 1 or n < 2:
        raise ValueError(
            f"Give at least one prompt and two samples of each, got {len(dataset)} rows, {prompts=} and {n=}."
        )
    indices = [row for row in range(min(prompts, len(dataset))) for _ in range(n)]
    training = trainer.model.training
    trainer.model.eval()
    rows = sample_rows(trainer, dataset, indices, trainer.reference, gold, 2 * seed + 1)
    trainer.model.train(training)
    golds = None if gold is None else [row["gold_score"] for row in rows]
    curve = best_of_n([row["reward_score"] for row in rows], [str(index) for index in indices], golds)
    assert curve is not None  # every prompt has n samples
    return curve
