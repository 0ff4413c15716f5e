"""Turn groups of K completions into pairs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

from datasets import Dataset, Value, concatenate_datasets

from rlhf_recipes.data.dialogues import Row
from rlhf_recipes.data.preferences.checks import compare, same
from rlhf_recipes.data.preferences.schema import TABLE_COLUMNS, make_table, place_of

logger = logging.getLogger(__name__)

_ORDERS = ("label", "ranks", "best", "ratings")  # the first one that compares a pair decides


def to_pairs(table: Dataset) -> Dataset:
    """Make a row of each pair of completions that a judgement compares.

    A ranking or ratings of K completions give C(K,2) pairs (https://huggingface.co/papers/2203.02155, section 3.5), a
    best one of K gives K - 1. Completions keep their order; `label` says which one is better. Two equal completions
    are no pair.

    Args:
        table: A preference table.

    Returns:
        A preference table of rows with two completions and a `label`: 1 or 0 for a winner, 0.5 for a tie, or as it
        was. `margin` and `ratings` stay. The column `group` numbers the rows of the given table: pairs of one group
        belong in one batch, with weight 1 / number of pairs. All other columns stay beside their rows.

    Raises:
        ValueError: If no row compares completions, or one does not (a rating of one completion, labels of steps).

    Example:
        >>> from rlhf_recipes.data.preferences.schema import make_table
        >>> rows = [{"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [2, 1, 2], "row": 0}]
        >>> pairs = to_pairs(make_table(rows))
        >>> list(zip(pairs["completions"], pairs["label"]))
        [(['a', 'b'], 0.0), (['a', 'c'], 0.5), (['b', 'c'], 1.0)]
    """
    rows: list[Row] = []
    for index, row in enumerate(table.with_format(None)):
        if not _compares(row):
            raise ValueError(
                f"{place_of(row)} compares no completions, so no pair can be made of it. Leave out rows with one "
                "completion, and rows with labels of steps or tokens only."
            )
        group = row.get("group")
        rows += ({**pair, "group": index if group is None else group} for pair in _pairs(row))
    if not rows:
        raise ValueError("No row has two different completions that are compared.")
    others = {name: kind for name, kind in table.features.items() if name not in TABLE_COLUMNS}
    return make_table(rows, {**others, "group": Value("int64")})


def compared_pairs(table: Dataset) -> Dataset:
    """Turn groups into pairs for a loss of pairs; rows that compare nothing are left out and counted.

    Args:
        table: A preference table.

    Returns:
        The pairs (see `to_pairs`); the table itself where every row has a `label`, or none compares anything.

    Raises:
        ValueError: If no two completions of a row differ.

    Example:
        >>> from rlhf_recipes.data.preferences.schema import make_table
        >>> rows = [{"prompt": "Hi", "completions": ["a", "b"], "ratings": [1, 4], "row": 0}]
        >>> compared_pairs(make_table(rows))["label"][:]
        [0.0]
    """
    if all(label is not None for label in table["label"]):
        return table
    comparing = [index for index, row in enumerate(table.with_format(None)) if _compares(row)]
    silent = sorted(set(range(len(table))) - set(comparing))
    if not comparing:
        return table
    if silent:
        logger.warning(
            "Left out: %d of %d rows compare no completions, so that no pair can be made of them (first: %s).",
            *(len(silent), len(table), place_of(table[silent[0]])),
        )
    return to_pairs(table.select(comparing))


def best_completions(table: Dataset) -> Dataset:
    """Make a row of each prompt with its best completion, to imitate it.

    Args:
        table: A preference table.

    Returns:
        `prompt`, `completion` (the first one of those that share the best place), and the columns that are not those
        of a table.

    Raises:
        ValueError: If a row says nothing about which completion is best (labels of steps or tokens only).

    Example:
        >>> from rlhf_recipes.data.preferences.schema import make_table
        >>> table = make_table([{"prompt": "Hi", "completions": ["No.", "Hello!"], "ratings": [1, 4], "row": 0}])
        >>> best_completions(table)[0]
        {'prompt': 'Hi', 'completion': 'Hello!'}
    """
    others = table.select_columns([name for name in table.column_names if name not in TABLE_COLUMNS])
    best = [row["completions"][_best(row)] for row in table.with_format(None)]
    rows = table.select_columns("prompt").add_column("completion", best, feature=table.features["completions"].feature)
    return concatenate_datasets([rows, others], axis=1) if others.column_names else rows


def _best(row: Row) -> int:
    if row.get("label") is not None:
        return int(row["label"] < 0.5)
    if row.get("best") is not None:
        return int(row["best"])
    if row.get("ranks") is not None:
        return int(row["ranks"].index(min(row["ranks"])))
    if row.get("ratings") is not None:
        return int(row["ratings"].index(max(row["ratings"])))
    raise ValueError(
        f"{place_of(row).capitalize()} has labels of steps or tokens only, which do not say which completion is to be "
        "imitated. Give rows with `prompt` and `completion`."
    )


def _compares(row: Row) -> bool:
    return len(row["completions"]) > 1 and any(row.get(name) is not None for name in _ORDERS)


def _pairs(row: Row) -> Iterator[Row]:
    for pair in itertools.combinations(range(len(row["completions"])), 2):
        verdicts = compare(row, *pair)
        if verdicts and not same(row, *pair):
            label = next(verdicts[name] for name in _ORDERS if name in verdicts)
            chosen = {
                name: [row[name][index] for index in pair]
                for name in ("completions", "completion_ids", "ratings", "steps", "step_labels", "token_labels")
                if row.get(name) is not None
            }
            yield {**row, **chosen, "label": label, "ranks": None, "best": None}
