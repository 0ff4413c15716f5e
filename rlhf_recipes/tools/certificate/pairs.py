"""Pairs of completions with their scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_recipes.data.chat_templates import options_of
from rlhf_recipes.data.dialogues import BadRow, check_kind
from rlhf_recipes.data.preferences import to_pairs
from rlhf_recipes.data.preferences.schema import quoted
from rlhf_recipes.data.reward_prompts import with_graded_prompts
from rlhf_recipes.tools.certificate.scoring import Encoded, Scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset


@dataclass(frozen=True)
class Pairs:
    """Scored pairs. Everything has one entry per pair, shape `(N,)`.

    Args:
        rows: The rows that fit into the model.
        chosen: Raw scores of the chosen completions.
        rejected: Raw scores of the rejected completions.
        chosen_lengths: Tokens of the chosen completions.
        rejected_lengths: Tokens of the rejected completions.
        prompts: A key of each prompt.
        labels: Probability that the chosen completion is preferred.
        left_out: Rows that are too long for the model.
    """

    rows: list[dict[str, Any]]
    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]
    chosen_lengths: NDArray[np.int64]
    rejected_lengths: NDArray[np.int64]
    prompts: list[str]
    labels: NDArray[np.float64]
    left_out: int

    @property
    def differences(self) -> NDArray[np.float64]:
        """Score of the chosen minus score of the rejected completion."""
        return self.chosen - self.rejected

    @property
    def decided(self) -> NDArray[np.bool_]:
        """Mask of the pairs that are no ties."""
        decided: NDArray[np.bool_] = self.labels != 0.5
        return decided

    def decided_rows(self) -> list[dict[str, Any]]:
        """Return the rows that are no ties."""
        return [row for row, decided in zip(self.rows, self.decided, strict=True) if decided]


def score_pairs(scorer: Scorer, rows: Dataset) -> Pairs:
    """Score both sides of pairs.

    Args:
        scorer: The reward model.
        rows: Rows as of `to_preferences`, or a preference table, whose groups become pairs. `label` is the probability
            that the chosen (or first) completion is preferred, 1 where there is none; where it is below 0.5 the two
            change sides. Rows that bring their token ids are scored by these. `reward_prompt` stands for the prompt.

    Returns:
        The scores, with what is needed beside them.

    Raises:
        ValueError: If a column is missing, a row cannot be scored, none fits into the model, or a label is no
            probability.
    """
    pairs = pair_rows(rows)
    encoded = [[_encode_side(scorer, pair, side) for side in ("chosen", "rejected")] for pair in pairs]
    indices = [index for index, sides in enumerate(encoded) if all(map(scorer.fits, sides))]
    if not indices:
        raise ValueError(f"None of the {len(pairs)} pairs fits into {scorer.max_length} tokens. Raise `max_length`.")
    chosen, rejected = ([encoded[index][side] for index in indices] for side in (0, 1))
    return Pairs(
        rows=[pairs[index] for index in indices],
        chosen=scorer.score(chosen),
        rejected=scorer.score(rejected),
        chosen_lengths=np.array([side.length for side in chosen]),
        rejected_lengths=np.array([side.length for side in rejected]),
        prompts=[prompt_key(pairs[index]["prompt"]) for index in indices],
        labels=np.array([pairs[index]["label"] for index in indices]),
        left_out=len(pairs) - len(indices),
    )


def pair_rows(rows: Dataset) -> list[dict[str, Any]]:
    """Bring pairs, or the groups of a preference table, to `chosen`, `rejected` and a `label` from 0.5 to 1.

    Example:
        >>> from datasets import Dataset
        >>> rows = {"prompt": ["Hi"], "chosen": ["No."], "rejected": ["Hello!"], "label": [0.25]}
        >>> [row] = pair_rows(Dataset.from_dict(rows))
        >>> row["chosen"], row["rejected"], row["label"]
        ('Hello!', 'No.', 0.75)
    """
    rows = with_graded_prompts(rows)
    names = set(rows.column_names)
    if "completions" in names:
        return [_chosen_first(index, row) for index, row in enumerate(to_pairs(rows).to_list())]
    if missing := [side for side in ("prompt", "chosen", "rejected") if side not in names]:
        raise ValueError(
            f"Pairs need the columns `prompt`, `chosen` and `rejected`; {quoted(missing)} is missing, found "
            f"{quoted(rows.column_names) or 'none'}. Convert whole dialogues with `to_preferences`, and preferences "
            "of any other kind with `to_preference_table`."
        )
    pairs = rows.to_list()
    for index, row in enumerate(pairs):
        check_texts(row, ("prompt", "chosen", "rejected"), f"Row {index}")
    return [_chosen_first(index, row) for index, row in enumerate(pairs)]


def check_texts(row: dict[str, Any], columns: Sequence[str], place: str) -> None:
    """Check the prompt and the completions of a row, before any of them is scored.

    Args:
        row: Values by column.
        columns: Those of the prompt and the completions.
        place: What the error calls the row.

    Raises:
        ValueError: If they are not all text or all chats.

    Example:
        >>> check_texts({"prompt": "Hi", "completion": None}, ("prompt", "completion"), "Sample 2")
        Traceback (most recent call last):
        ...
        ValueError: Sample 2 cannot be scored: `completion` is null. Correct it, or leave it out.
    """
    try:
        for column in columns:
            if row[column] is None:
                raise BadRow(f"`{column}` is null")
            check_kind(row[column], column)
        if len({isinstance(row[column], list) for column in columns}) > 1:
            raise BadRow(f"{quoted(columns)} are not all text or all chats")
    except BadRow as problem:
        raise ValueError(f"{place} cannot be scored: {problem}. Correct it, or leave it out.") from problem


def pair_key(row: dict[str, Any]) -> tuple[str, ...]:
    """Name a pair, whichever of its completions won, so that equal ones have equal names.

    Example:
        >>> pair_key({"prompt": "Hi", "chosen": "b", "rejected": "a"})
        ('Hi', '"a"', '"b"')
    """
    sides = (json.dumps(row[side], sort_keys=True) for side in ("chosen", "rejected"))
    return prompt_key(row["prompt"]), *sorted(sides)


def prompt_key(prompt: Any) -> str:
    """Name a prompt, text or chat, so that equal ones have equal names."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _chosen_first(index: int, row: dict[str, Any]) -> dict[str, Any]:
    label = 1.0 if row.get("label") is None else row["label"]
    if not 0 <= label <= 1:
        raise ValueError(f"Row {index} has the label {label}: expected a probability, from 0 to 1.")
    if "completions" in row:
        ids = row.get("completion_ids") or (None, None)
        sides = list(zip(row["completions"], ids, strict=True))
    else:
        sides = [(row[side], row.get(f"{side}_ids")) for side in ("chosen", "rejected")]
    if label < 0.5:
        sides, label = sides[::-1], 1 - label
    (chosen, chosen_ids), (rejected, rejected_ids) = sides
    texts = {"chosen": chosen, "rejected": rejected, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
    return {**row, **texts, "label": label}


def _encode_side(scorer: Scorer, pair: dict[str, Any], side: str) -> Encoded:
    ids, options = pair[f"{side}_ids"], options_of(pair)
    if ids is None:
        return scorer.encode(pair["prompt"], pair[side], **options)
    return scorer.encoded(ids, pair["prompt"], **options)
