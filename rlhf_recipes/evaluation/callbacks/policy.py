"""Evaluation of the policy on held-out prompts while it trains."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback

from rlhf_recipes.data.reward_prompts import graded_prompt
from rlhf_recipes.evaluation.policy import SAMPLES, side_by_side
from rlhf_recipes.evaluation.records import log_apart, read_records
from rlhf_recipes.evaluation.sampling import has_reference, sample_rows
from rlhf_recipes.models.generation import warn_of_ignored_settings
from rlhf_recipes.models.quantized import keep_4bit_differentiable
from rlhf_recipes.ppo.trainer import PPOTrainer
from rlhf_recipes.statistics.metrics import (
    length_controlled_reward,
    length_controlled_win_rate,
    share_interval,
    token_mean,
    win_outcomes,
)
from rlhf_recipes.statistics.numbers import none_for_nonfinite
from rlhf_recipes.statistics.texts import distinct_n, self_bleu, top_ngrams
from rlhf_recipes.tracking.wandb_log import log_table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from rlhf_recipes.evaluation.judges import PairJudge

Row = dict[str, Any]

logger = logging.getLogger(__name__)

_NGRAM = 4


class PolicyEvaluation(TrainerCallback):
    """Sample from the policy on held-out prompts every `every` steps and at the end, and compare with the reference.

    The sampling has its own seed: every evaluation, and every run with this seed, draws with the same random numbers,
    and the training draws what it would have drawn without it. With several processes each takes its share of the
    batches, and the numbers are those of one process. The reference is sampled once.

    With `PPOTrainer`, GRPO and RLOO the reward functions of the trainer score. Other trainers (SFT) have none: then
    lengths, entropies, diversity and the judge are left. Without a reference (GRPO on all weights with `beta: 0`,
    say) there is nothing to compare with.

    What comes out is logged with the prefix `eval_` (docs/evaluation.md explains each) and is one line of
    `policy_evaluation.jsonl` in the run's folder, with some samples side by side. W&B gets all of them as the table
    `eval/samples`, which says of each whether it is a win, a loss or a tie.

    Args:
        trainer: A trainer of a causal language model.
        dataset: Held-out rows with a column `prompt`. Other columns go to the reward functions; a judge reads
            `reward_prompt` in place of the prompt where it is there.
        every: Optimizer steps between two evaluations, at least 1.
        gold: Name of the reward function that measures the truth; give it the weight 0.
        rows: Completions of each side; prompts are repeated if there are fewer.
        seed: Seed of the sampling and of the bootstrap.
        judge: A judge that compares completions of both sides (`rlhf_recipes.evaluation.judges`).
        at_end: Evaluate also at the end of the training, unless its last step was evaluated.
        max_new_tokens: Longest completion with a trainer that does not generate, such as SFT's.

    Raises:
        ValueError: If there is no prompt, a number is below 1, no reward function is named `gold`, or 4-bit weights
            are repacked.

    Example:
        >>> trainer.add_callback(PolicyEvaluation(trainer, rows["test"], every=100))  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        every: int = 100,
        gold: str | None = None,
        rows: int = 128,
        seed: int = 0,
        judge: PairJudge | None = None,
        at_end: bool = True,
        max_new_tokens: int = 128,
    ) -> None:
        self._trainer: Any = trainer
        model: Any = trainer.model
        keep_4bit_differentiable(model)  # it is sampled from between training steps
        names = getattr(trainer, "reward_func_names", [])
        if gold is not None and gold not in names:
            raise ValueError(f"No reward function is named {gold!r}; there are {names}.")
        if len(dataset) == 0:
            raise ValueError("The evaluation needs at least one held-out prompt, and the dataset is empty.")
        for name, value in (("every", every), ("rows", rows), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._dataset, self._every, self._gold, self._seed = dataset, every, gold, seed
        self._judge, self._at_end, self._max_new_tokens = judge, at_end, max_new_tokens
        self._indices = [row % len(dataset) for row in range(rows)]
        self._reference: list[Row] | None = None
        self._evaluated: int | None = None
        if not isinstance(trainer, PPOTrainer):  # which has said it
            warn_of_ignored_settings(self._trainer.model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file, or take up the one of the run that is resumed."""
        self._evaluated = None
        if state.is_world_process_zero:
            kept = [row for row in read_records(self._file()) if row["step"] <= state.global_step]
            self._file().parent.mkdir(parents=True, exist_ok=True)
            self._file().write_text("".join(_line(row) for row in kept), encoding="utf-8")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate, if it is time."""
        if state.global_step % self._every == 0:
            self._evaluate(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate what the training ended with."""
        if self._at_end and self._evaluated != state.global_step:
            self._evaluate(state)

    def _evaluate(self, state: TrainerState) -> None:
        trainer = self._trainer
        training = trainer.model.training
        trainer.model.eval()
        # Independent draws: with the same random numbers both would often say the same, and all would look like ties.
        policy = self._sample(2 * self._seed, of_reference=False)
        if self._reference is None and has_reference(trainer):
            self._reference = self._sample(2 * self._seed + 1, of_reference=True)
        trainer.model.train(training)

        metrics = {f"policy/{name}": value for name, value in side_metrics(policy).items()}
        if self._reference is not None:
            metrics |= {f"reference/{name}": value for name, value in side_metrics(self._reference).items()}
            metrics |= comparison(policy, self._reference, self._indices, self._seed)
            metrics |= self._judged(policy)
        self._evaluated = state.global_step
        log_apart(trainer, {f"eval_{name}": value for name, value in metrics.items()})
        if state.is_world_process_zero:
            prompts = [self._dataset[index]["prompt"] for index in self._indices]
            rows = side_by_side(prompts, policy, self._reference)
            log_table(trainer, "eval/samples", rows)
            record = {"step": state.global_step, "seed": self._seed, **metrics, "samples": rows[:SAMPLES]}
            with self._file().open("a", encoding="utf-8") as file:
                file.write(_line(record))

    def _sample(self, seed: int, of_reference: bool) -> list[Row]:
        return sample_rows(
            self._trainer,
            self._dataset,
            self._indices,
            of_reference=of_reference,
            gold=self._gold,
            seed=seed,
            max_new_tokens=self._max_new_tokens,
        )

    def _judged(self, policy: list[Row]) -> dict[str, float]:
        """Ask the judge on the main process only; whatever goes wrong there, the training goes on."""
        if self._judge is None or self._reference is None:
            return {}
        answer: list[Any] = [{}]
        if self._trainer.is_world_process_zero():
            sides = ([row["completion"] for row in rows] for rows in (policy, self._reference))
            prompts = [graded_prompt(self._dataset[index]) for index in self._indices]
            try:
                verdicts = self._judge.compare(prompts, list(zip(*sides, strict=True)))
                answer = [verdicts.metrics(self._indices, self._seed)]
            except Exception:  # a judge is somebody else's code or service
                logger.exception("The judge failed, and its numbers are left out.")
        broadcast_object_list(answer)
        return {f"judge_{name}": value for name, value in answer[0].items()}

    def _file(self) -> Path:
        return Path(self._trainer.args.output_dir) / "policy_evaluation.jsonl"


def side_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Sum up the completions of one side. What the rows do not have (a score, say) is left out.

    Args:
        rows: Completions as `sample_rows` gives them.

    Returns:
        Means of `reward_score` and `gold_score`; `kl` per completion and `kl_per_token`, in nats; `length` in tokens;
        `eos_rate` and `truncation_rate`, which add up to 1; `entropy` in nats per token; `distinct_2`, `self_bleu`
        (left out without sacrebleu) and `top_ngram`, the share of the completions that hold the most frequent sequence
        of 4 tokens.
    """
    lengths, ids = [row["length"] for row in rows], [row["completion_ids"] for row in rows]
    metrics = {
        name: fmean(row[name] for row in rows)
        for name in ("reward_score", "gold_score", "kl", "length", "eos_rate")
        if rows[0][name] is not None
    }
    if "kl" in metrics:
        metrics["kl_per_token"] = token_mean([row["kl"] for row in rows], lengths)
    metrics["truncation_rate"] = 1.0 - metrics["eos_rate"]
    metrics["entropy"] = token_mean([row["entropy"] for row in rows], lengths)
    metrics["distinct_2"] = distinct_n(ids, 2)
    try:
        metrics["self_bleu"] = self_bleu(ids) if len(ids) > 1 else 1.0
    except ModuleNotFoundError as error:
        _log_once(f"Left out: {error}")
    most_frequent = top_ngrams(ids, _NGRAM, most=1)
    metrics["top_ngram"] = most_frequent[0][1] if most_frequent else 0.0
    return metrics


@cache
def _log_once(message: str) -> None:
    logger.warning(message)


def comparison(policy: Sequence[Row], reference: Sequence[Row], indices: Sequence[int], seed: int) -> dict[str, float]:
    """Compare the completions of both sides prompt by prompt, by the gold score or, without one, by the reward.

    Args:
        policy: The policy's completions.
        reference: The reference's, for the same prompts.
        indices: Which prompt each row has.
        seed: Seed of the bootstrap.

    Returns:
        `win_rate` with `win_rate_low` and `win_rate_high` (95 %, a bootstrap over prompts; left out for one prompt),
        `length_controlled_win_rate`, and `length_controlled_reward`; nothing without scores.
    """
    if policy[0]["reward_score"] is None:
        return {}
    judge = "reward_score" if policy[0]["gold_score"] is None else "gold_score"
    outcomes = win_outcomes([row[judge] for row in policy], [row[judge] for row in reference])
    ours, theirs = ([row["length"] for row in rows] for rows in (policy, reference))
    metrics = {
        "win_rate": float(outcomes.mean()),
        "length_controlled_win_rate": length_controlled_win_rate(
            outcomes, [mine - other for mine, other in zip(ours, theirs, strict=True)]
        ),
        "length_controlled_reward": length_controlled_reward(
            [row["reward_score"] for row in policy], ours, [row["reward_score"] for row in reference], theirs
        ),
    }
    if len(set(indices)) > 1:
        metrics["win_rate_low"], metrics["win_rate_high"] = share_interval(outcomes, list(indices), seed=seed)
    return metrics


def _line(record: Row) -> str:
    return json.dumps(none_for_nonfinite(record), ensure_ascii=False) + "\n"
