"""Rows of their own for each member of an ensemble of reward models, of which each is tested on rows it never saw."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def bootstrap_count(key: str, member: int, seed: int = 0) -> int:
    """Draw how often a member of an ensemble trains on the rows of a key: 0 or more times, once in the mean.

    A bootstrap sample draws `N` of `N` rows with replacement. As `N` grows, the number of times that it has a given
    row follows Poisson's distribution with mean 1, and `1/e` of the rows are in it not at all: these can test the
    member. Here each row gets its number by itself. So rows may come later, and those that came before keep theirs: a
    member that goes on training never meets what tests it.

    Source: https://huggingface.co/papers/1706.03741, section 2.2.3 (a sample with replacement for each member, `1/e`
    held out); N. C. Oza and S. Russell, "Online Bagging and Boosting", 2001 (Poisson's numbers).

    Args:
        key: What the rows share, such as their prompt.
        member: Number of the member.
        seed: Seed of the draws.

    Returns:
        The number.

    Example:
        >>> [bootstrap_count(prompt, member=0) for prompt in "abcdefgh"]
        [1, 3, 1, 0, 1, 1, 0, 2]
    """
    drawn = random.Random(f"{seed}/{member}/{key}").random()
    count, probability = 0, math.exp(-1.0)
    while drawn >= probability and probability > 0.0:
        drawn -= probability
        count += 1
        probability /= count
    return count


def member_rows(rows: Sequence[Row], member: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Split labelled pairs into those that a member of an ensemble trains on and those that test it.

    Args:
        rows: Pairs with `prompt` and `label`, the probability that the first is better. All rows of a prompt stay
            together.
        member: Number of the member.
        seed: Seed of the draws.

    Returns:
        The rows to train on, some of them several times, and the held-out ones.

    Raises:
        ValueError: If no pair is left to train on, or only ties to test on.

    Example:
        >>> rows = [{"prompt": prompt, "completions": [" yes", " no"], "label": 1.0} for prompt in "abcdefgh"]
        >>> train, test = member_rows(rows, member=0)
        >>> "".join(row["prompt"] for row in train), "".join(row["prompt"] for row in test)
        ('abefggg', 'cdh')
    """
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        count = bootstrap_count(json.dumps(row["prompt"], sort_keys=True), member, seed)
        train += [row] * count
        held_out += [] if count else [row]
    if not train or all(row["label"] == 0.5 for row in held_out):
        raise ValueError(
            f"Of {len(rows)} labelled pairs member {member} has {len(train)} to train on and {len(held_out)} to be "
            "tested on, and needs one to train on and one that is no tie to be tested on. Label more pairs in the "
            "first round, of more prompts."
        )
    return train, held_out
