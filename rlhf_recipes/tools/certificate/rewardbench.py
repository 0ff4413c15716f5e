"""Read RewardBench files, and score a reward model on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_recipes.data.loading import load_rows
from rlhf_recipes.tools.certificate.functional.accuracy import accuracy_by
from rlhf_recipes.tools.certificate.functional.benchmark import (
    best_of_k_credit,
    section_scores,
    ties_score,
)
from rlhf_recipes.tools.certificate.functional.resampling import mean_summary

if TYPE_CHECKING:
    from rlhf_recipes.tools.certificate.scoring import Encoded, Scorer

_TIES = "ties"


def reward_bench(scorer: Scorer, path: str) -> dict[str, Any]:
    """Score a reward model on a local file of RewardBench or RewardBench 2.

    Args:
        scorer: The reward model. With a chat template in its tokenizer, prompt and completion become a chat of one
            turn each, as in the benchmark's own code; without one, text after text.
        path: A json, jsonl or parquet file with `prompt`, `chosen`, `rejected` and `subset`. In RewardBench 2
            `chosen` and `rejected` are lists, and rows of the subset `Ties` also have an `id`.

    Returns:
        `version` (1 or 2); `subsets`, the accuracy of each with its interval and `n` (for ties their score and its
        parts); `sections`, the scores of the benchmark's sections (version 2: its subsets, and their mean if all six
        are there); `left_out`, the rows that were too long.

    Raises:
        ValueError: If a column is missing, or a row's `chosen` or `rejected` is empty.
    """
    rows = load_rows(path, split="train").to_list()
    for index, row in enumerate(rows):
        missing = [column for column in ("prompt", "chosen", "rejected", "subset") if not row.get(column)]
        if missing:
            raise ValueError(
                f"{path}, row {index} has no {', '.join(f'`{column}`' for column in missing)}. RewardBench files have "
                "the columns `prompt`, `chosen`, `rejected` and `subset`."
            )
    several = any(isinstance(row["chosen"], list) for row in rows)
    for row in rows:
        sides = [row[side] if isinstance(row[side], list) else [row[side]] for side in ("chosen", "rejected")]
        row["right"] = len(sides[0])
        row["encoded"] = [_encode(scorer, row["prompt"], text) for side in sides for text in side]
    usable = [row for row in rows if all(map(scorer.fits, row["encoded"]))]
    if not usable:
        raise ValueError(f"No row of {path} fits into {scorer.max_length} tokens. Raise `max_length`.")
    scores = scorer.score([encoded for row in usable for encoded in row["encoded"]])
    ends = np.cumsum([len(row["encoded"]) for row in usable])
    for row, own in zip(usable, np.split(scores, ends[:-1]), strict=True):
        row["scores"] = own
    result = _second_version(usable) if several else _first_version(usable)
    return {**result, "n": len(usable), "left_out": len(rows) - len(usable)}


def _encode(scorer: Scorer, prompt: Any, text: str) -> Encoded:
    if scorer.tokenizer.chat_template is None:
        return scorer.encode(prompt, text)
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return scorer.encode(messages, [{"role": "assistant", "content": text}])


def _first_version(rows: list[dict[str, Any]]) -> dict[str, Any]:
    differences = [row["scores"][0] - row["scores"][1] for row in rows]
    subsets = accuracy_by(differences, [row["subset"] for row in rows], [repr(row["prompt"]) for row in rows])
    sections = section_scores({row["group"]: row["value"] for row in subsets})
    return {"version": 1, "subsets": subsets, "sections": sections}


def _second_version(rows: list[dict[str, Any]]) -> dict[str, Any]:
    subsets: list[dict[str, Any]] = []
    for subset in dict.fromkeys(row["subset"] for row in rows):
        own = [row for row in rows if row["subset"] == subset]
        if subset.lower() == _TIES:
            parts = ties_score([(str(row.get("id")), row["scores"].tolist(), row["right"]) for row in own])
            subsets.append({"group": subset, "value": parts["score"], "interval": None, "n": len(own), **parts})
        else:
            credits = [best_of_k_credit(row["scores"]) for row in own]
            subsets.append({"group": subset, **mean_summary(credits, [repr(row["prompt"]) for row in own])})
    sections = {row["group"]: float(row["value"]) for row in subsets}
    if len(sections) == 6:
        sections["Average"] = float(np.mean(list(sections.values())))
    return {"version": 2, "subsets": subsets, "sections": sections}
