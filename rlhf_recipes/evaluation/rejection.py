"""Rejection sampling: K completions of each prompt, scored by the rewards of a trainer, and the best of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlhf_recipes.checkpoints import write_whole
from rlhf_recipes.data.chat_templates import with_first_space
from rlhf_recipes.evaluation.records import SETTINGS, write_records
from rlhf_recipes.evaluation.sampling import sample_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from rlhf_recipes.ppo.trainer import PPOTrainer

Row = dict[str, Any]

SAMPLES, BEST, SUMMARY = "samples.jsonl", "train.jsonl", "rejection.json"


def sample_best(
    trainer: PPOTrainer,
    dataset: Dataset,
    folder: str | Path,
    settings: dict[str, Any],
    *,
    best_of: int,
    prompts_per_round: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Sample completions of each prompt from a trainer's policy, score them by its rewards, and keep the best ones.

    Rounds of prompts are written as they come, each sampled with a seed of its own: a run that was stopped goes on
    with the round that it was in, and ends with the same files. The number of processes changes nothing.

    Source: https://huggingface.co/papers/2307.09288, section 3.2.3, "Rejection Sampling fine-tuning".

    Args:
        trainer: A PPO trainer, whose policy writes and whose rewards score, `N` at a time per process
            (`per_device_eval_batch_size`).
        dataset: Rows with a column `prompt`; other columns go to the reward functions and into the samples.
        folder: Gets `samples.jsonl`, a row per completion: the prompt's columns, `completion`, `score` (all rewards,
            weighted), `rewards` (each by its name), `rank` among those of its prompt (1 is the best; equal scores
            share one), `finished` (whether it ended by itself), `length` in tokens, `kl` to the reference in nats,
            `row` (of the prompt) and `sample` (number among its completions), both from 0, and `seed`. At the end also
            `train.jsonl`, of each prompt the completion with the highest score among those that SFT can learn, which
            say something and ended by themselves, and `rejection.json`, what is returned.
        settings: As for `check_settings`, which has accepted the folder.
        best_of: Completions of each prompt, K.
        prompts_per_round: Prompts in a round.
        seed: Seed of the sampling.

    Returns:
        `prompts`, `best_of`, `score` and `best_score`, the means over all completions and over those that were kept,
        `highest_of_k`, by k from 1 to K the mean over prompts of the highest of the first k scores (figure 7), and
        `left_out`, the prompts of which no completion can be learned.
    """
    folder = Path(folder)
    firsts = range(0, len(dataset), prompts_per_round)
    sizes = [best_of * min(prompts_per_round, len(dataset) - first) for first in firsts]
    rows = _whole_rounds(folder / SAMPLES, sizes)
    done = [sum(sizes[:number]) for number in range(len(sizes) + 1)].index(len(rows))
    trainer.accelerator.wait_for_everyone()  # all have read before the file is written anew
    if trainer.is_world_process_zero():
        write_records(folder / SETTINGS, settings)
        _write_lines(folder / SAMPLES, rows)
    training = trainer.model.training
    trainer.model.eval()
    for number in range(done, len(sizes)):
        indices = [number * prompts_per_round + place // best_of for place in range(sizes[number])]
        own_seed = seed * 1_000_003 + number
        sampled = sample_rows(trainer, dataset, indices, of_reference=False, gold=None, seed=own_seed)
        new = [_row(trainer, dataset[index], one) for index, one in zip(indices, sampled, strict=True)]
        places = ({"row": index, "sample": place % best_of} for place, index in enumerate(indices))
        new = _ranked([row | place | {"seed": seed} for row, place in zip(new, places, strict=True)])
        rows += new
        if trainer.is_world_process_zero():
            with (folder / SAMPLES).open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, new)))
    trainer.model.train(training)
    best = [winner for group in _groups(rows) if (winner := _winner(group)) is not None]
    summary = _summary(rows, best, best_of)
    if trainer.is_world_process_zero():
        write_records(folder / SUMMARY, summary)
        if best:
            _write_lines(folder / BEST, best)  # the last file: with it the stage is finished
    trainer.accelerator.wait_for_everyone()
    return summary


def _row(trainer: Any, prompt: Row, sampled: Row) -> Row:
    texts = (prompt["prompt"], sampled["completion"], sampled["completion_ids"])
    return prompt | {
        "completion": with_first_space(trainer.processing_class, *texts),
        "score": sampled["reward_score"],
        "rewards": sampled["rewards"],
        "finished": bool(sampled["eos_rate"]),
        "length": sampled["length"],
        "kl": sampled["kl"],
    }


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: row["row"])]


def _ranked(rows: Iterable[Row]) -> list[Row]:
    return [
        row | {"rank": 1 + sum(other["score"] > row["score"] for other in group)}
        for group in _groups(rows)
        for row in group
    ]


def _winner(group: Sequence[Row]) -> Row | None:
    able = [row for row in group if row["finished"] and _content(row["completion"])]
    return max(able, key=lambda row: row["score"], default=None)


def _content(completion: Any) -> str:
    last = completion[-1]["content"] if isinstance(completion, list) else completion
    return str(last).strip()


def _summary(rows: Sequence[Row], best: Sequence[Row], best_of: int) -> dict[str, Any]:
    groups = _groups(rows)
    highest = [[max(row["score"] for row in group[:k]) for group in groups] for k in range(1, best_of + 1)]
    return {
        "prompts": len(groups),
        "best_of": best_of,
        "score": fmean(row["score"] for row in rows),
        "best_score": fmean(row["score"] for row in best) if best else None,
        "highest_of_k": [fmean(scores) for scores in highest],
        "left_out": len(groups) - len(best),
    }


def _whole_rounds(path: Path, sizes: Sequence[int]) -> list[Row]:
    """The rows of the rounds that are whole in a file of samples; the last one may have been cut off anywhere."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    whole = 0
    for size in sizes:
        if whole + size > len(rows):
            break
        whole += size
    return rows[:whole]


def _write_lines(path: Path, rows: Iterable[Row]) -> None:
    write_whole(path, "".join(map(_line, rows)))


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
