"""Check one row of a preference table: no column contradicts itself, the completions, or another column."""

from __future__ import annotations

import itertools
from numbers import Integral
from typing import Any, TypeGuard

from rlhf_recipes.data.dialogues import BadRow, Row, check_kind, filled
from rlhf_recipes.statistics.numbers import is_number


def check_row(row: Row) -> None:
    """Check one row of a preference table.

    Args:
        row: Values by the columns of `preference_features`; those that are missing or null are not there.

    Raises:
        BadRow: If
            - the prompt or a completion is empty, or they are not all text or all chats;
            - nothing is judged, or a judgement that compares has only one completion;
            - `label` is not between 0 and 1 or there are not two completions; `margin` is negative or not a number,
              or stands without a label or beside a tie;
            - `ranks` or `ratings` do not have one number per completion; ranks skip a place; ratings are not finite;
            - `best` is not the index of a completion;
            - steps do not make up their completion, or have not one label each, between 0 and 1;
            - `completion_ids` are empty, or `token_labels` do not have one finite number or null per token;
            - equal completions are told apart, or two columns say the opposite of a pair.

    Example:
        >>> check_row({"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]})
        >>> check_row({"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [1, 2]})
        Traceback (most recent call last):
        ...
        rlhf_recipes.data.dialogues.BadRow: `ranks` does not have one rank per completion
    """
    _check_texts(row)
    _check_ids(row)
    judged = [check(row) for check in (_label, _ranks, _best, _ratings, _steps, _token_labels)]
    if not any(judged):
        raise BadRow("nothing is judged: no `label`, `ranks`, `best`, `ratings`, `step_labels` or `token_labels`")
    _check_agreement(row)


def compare(row: Row, first: int, second: int) -> dict[str, float]:
    """Compare two completions of a row by each of its judgements.

    Args:
        row: A checked row.
        first: Index of a completion.
        second: Index of another one.

    Returns:
        By column, the probability that the first one is better: 1, 0, 0.5 for a tie, or `label`. `best` gives
        nothing for two completions that were not chosen.

    Example:
        >>> compare({"completions": ["a", "b", "c"], "ranks": [1, 2, 2], "best": 0}, 0, 2)
        {'ranks': 1.0, 'best': 1.0}
    """
    preferences: dict[str, float] = {}
    if row.get("label") is not None:
        preferences["label"] = float(row["label"]) if first < second else 1.0 - float(row["label"])
    if row.get("ranks") is not None:
        preferences["ranks"] = _wins(row["ranks"][second], row["ranks"][first])
    if row.get("best") in (first, second):
        preferences["best"] = float(row["best"] == first)
    if row.get("ratings") is not None:
        preferences["ratings"] = _wins(row["ratings"][first], row["ratings"][second])
    return preferences


def same(row: Row, first: int, second: int) -> bool:
    """Return whether two completions of a row are equal: in their token ids where it has them, else in their text.

    Args:
        row: A row.
        first: Index of a completion.
        second: Index of another one.

    Returns:
        Whether nothing tells them apart.

    Example:
        >>> same({"completions": ["a", "b", "a"]}, 0, 2)
        True
    """
    texts, ids = row["completions"], row.get("completion_ids")
    return bool(texts[first] == texts[second] and (ids is None or ids[first] == ids[second]))


def is_whole(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number and neither true nor false.

    Args:
        value: Any value, also of numpy.

    Returns:
        Whether it is one.

    Example:
        >>> [is_whole(value) for value in (2, 2.0, "2", True)]
        [True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def _wins(high: float, low: float) -> float:
    return 0.5 if high == low else float(high > low)


def _check_texts(row: Row) -> None:
    prompt, completions = row["prompt"], row["completions"]
    check_kind(prompt, "prompt")
    filled(prompt, "prompt")
    if not isinstance(completions, list) or not completions:
        raise BadRow("`completions` is not a list of at least one completion")
    for completion in completions:
        check_kind(completion, "completions")
        filled(completion, "completion")
        if isinstance(completion, list) != isinstance(prompt, list):
            raise BadRow("`prompt` and `completions` are not all text or all chats")


def _check_ids(row: Row) -> None:
    ids = row.get("completion_ids")
    if ids is None:
        return
    if not _lists(ids, len(row["completions"])):
        raise BadRow("`completion_ids` does not have one list per completion")
    if not all(sequence and all(is_whole(token) and token >= 0 for token in sequence) for sequence in ids):
        raise BadRow("`completion_ids` has a sequence that is empty or not made of token ids")


def _lists(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(entry, list) for entry in value)


def _target(value: Any) -> bool:
    return isinstance(value, bool) or is_number(value)


def _check_compared(row: Row, name: str) -> None:
    if len(row["completions"]) < 2:
        raise BadRow(f"`{name}` compares completions, but there is only one")


def _label(row: Row) -> bool:
    label, margin = row.get("label"), row.get("margin")
    if label is None:
        if margin is not None:
            raise BadRow("`margin` stands without a `label`")
        return False
    _check_compared(row, "label")
    if len(row["completions"]) > 2:
        raise BadRow("`label` compares two completions, but there are more")
    if not (is_number(label) and 0 <= label <= 1):
        raise BadRow("`label` is not a probability between 0 and 1")
    if same(row, 0, 1):
        raise BadRow("the two completions are the same")
    if margin is not None and not (is_number(margin) and margin >= 0):
        raise BadRow("`margin` is not a number of at least 0")
    if margin and label == 0.5:
        raise BadRow("`margin` is above 0, but `label` is a tie")
    return True


def _ranks(row: Row) -> bool:
    ranks = row.get("ranks")
    if ranks is None:
        return False
    _check_compared(row, "ranks")
    if not isinstance(ranks, list) or len(ranks) != len(row["completions"]):
        raise BadRow("`ranks` does not have one rank per completion")
    if not all(map(is_whole, ranks)):
        raise BadRow("`ranks` is not made of whole numbers")
    places = sorted(set(ranks))
    by_count = [1 + sum(rank < place for rank in ranks) for place in places]  # ties take up places: 1, 1, 3
    if places not in (by_count, list(range(1, len(places) + 1))):
        raise BadRow("`ranks` does not count from 1 without gaps (ties as 1, 1, 2 or 1, 1, 3)")
    return True


def _best(row: Row) -> bool:
    best = row.get("best")
    if best is None:
        return False
    _check_compared(row, "best")
    if not is_whole(best) or not 0 <= best < len(row["completions"]):
        raise BadRow("`best` is not the index of a completion, from 0")
    return True


def _ratings(row: Row) -> bool:
    ratings = row.get("ratings")
    if ratings is None:
        return False
    if not isinstance(ratings, list) or len(ratings) != len(row["completions"]):
        raise BadRow("`ratings` does not have one rating per completion")
    if not all(map(is_number, ratings)):
        raise BadRow("`ratings` has a value that is not a finite number")
    return True


def _steps(row: Row) -> bool:
    steps, labels = row.get("steps"), row.get("step_labels")
    if steps is None and labels is None:
        return False
    if steps is None or labels is None:
        raise BadRow("`steps` and `step_labels` are not both there")
    if not all(_lists(value, len(row["completions"])) for value in (steps, labels)):
        raise BadRow("`steps` and `step_labels` do not have one list per completion")
    for texts, values, completion in zip(steps, labels, row["completions"], strict=True):
        if len(texts) != len(values):
            raise BadRow("`step_labels` does not have one label per step")
        if not all(isinstance(text, str) for text in texts) or "".join(texts) != (
            completion[-1]["content"] if isinstance(completion, list) else completion
        ):
            raise BadRow("`steps` do not make up their completion")
        if not all(value is None or (_target(value) and 0 <= value <= 1) for value in values):
            raise BadRow("`step_labels` has a label that is not between 0 and 1")
    if all(value is None for values in labels for value in values):
        raise BadRow("`step_labels` labels no step")
    return True


def _token_labels(row: Row) -> bool:
    labels, ids = row.get("token_labels"), row.get("completion_ids")
    if labels is None:
        return False
    if ids is None:
        raise BadRow("`token_labels` stands without `completion_ids`")
    if not _lists(labels, len(ids)) or list(map(len, labels)) != list(map(len, ids)):
        raise BadRow("`token_labels` does not have one label per token id")
    if not all(value is None or _target(value) for values in labels for value in values):
        raise BadRow("`token_labels` has a value that is not a finite number")
    if all(value is None for values in labels for value in values):
        raise BadRow("`token_labels` labels no token")
    return True


def _check_agreement(row: Row) -> None:
    for first, second in itertools.combinations(range(len(row["completions"])), 2):
        verdicts = compare(row, first, second)
        if same(row, first, second) and any(verdict != 0.5 for verdict in verdicts.values()):
            raise BadRow("equal completions are ranked or rated differently")
        better = [name for name, verdict in verdicts.items() if verdict > 0.5]
        worse = [name for name, verdict in verdicts.items() if verdict < 0.5]
        if better and worse:
            raise BadRow("`" + "` and `".join(sorted(better + worse)) + "` contradict each other")
