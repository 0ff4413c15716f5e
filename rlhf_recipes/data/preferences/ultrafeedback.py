"""Reader of rows as in UltraFeedback: several completions, each rated on several aspects."""

from __future__ import annotations

from typing import Any, Literal

from datasets import Dataset

from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.preferences.reading import Rows, read


def from_ultrafeedback(
    rows: Rows,
    *,
    rating: Literal["mean", "overall"] = "mean",
    drop_bad_rows: bool = False,
    source: str | None = None,
) -> Dataset:
    """Read ratings in the form of UltraFeedback (https://huggingface.co/papers/2310.01377).

    Args:
        rows: Rows with `instruction` and `completions`: a list of `{"response": text, "annotations": {aspect:
            {"Rating": number or text}}, "overall_score": number}`.
        rating: What the rating of a completion is: "mean" of the aspects that are rated for all completions of the
            row, or "overall", its `overall_score`.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `ratings`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> def rated(response, helpfulness, honesty):
        ...     ratings = {"helpfulness": {"Rating": helpfulness}, "honesty": {"Rating": honesty}}
        ...     return {"response": response, "annotations": ratings}
        >>> rows = [{"instruction": "Hi", "completions": [rated("Hello!", "5", "4"), rated("No.", "1", "N/A")]}]
        >>> from_ultrafeedback(rows)[0]["ratings"]
        [5.0, 1.0]
    """
    if rating not in ("mean", "overall"):
        raise ValueError(f'`rating` must be "mean" or "overall", got {rating!r}.')
    rate = _means if rating == "mean" else _overall_scores

    def convert(row: Row) -> Row:
        completions = row["completions"]
        if not (
            isinstance(completions, list)
            and all(isinstance(completion, dict) and "response" in completion for completion in completions)
        ):
            raise BadRow("`completions` is not a list of objects with a `response`")
        return {
            "prompt": row["instruction"],
            "completions": [completion["response"] for completion in completions],
            "ratings": rate(completions),
        }

    return read(rows, convert, needs=["instruction", "completions"], drop_bad_rows=drop_bad_rows, source=source)


def _means(completions: list[Row]) -> list[float]:
    rated = [
        {
            aspect: value
            for aspect, rating in _dict(completion.get("annotations")).items()
            if (value := _number(rating)) is not None
        }
        for completion in completions
    ]
    shared = set.intersection(*map(set, rated)) if rated else set()
    if not shared:
        raise BadRow("no aspect in `annotations` is rated for all completions")
    return [sum(ratings[aspect] for aspect in sorted(shared)) / len(shared) for ratings in rated]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _overall_scores(completions: list[Row]) -> list[float]:
    scores = [_number({"Rating": completion.get("overall_score")}) for completion in completions]
    if any(score is None for score in scores):
        raise BadRow("a completion has no `overall_score`")
    return [score for score in scores if score is not None]


def _number(annotation: Any) -> float | None:
    """Read a rating; "N/A" and what is missing are None."""
    try:
        return float(annotation["Rating"])
    except (KeyError, TypeError, ValueError):
        return None
