"""Measure a reward model for its certificate."""

from __future__ import annotations

import logging
import math
import random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from rlhf_recipes.data.chat_templates import options_of
from rlhf_recipes.data.reward_prompts import with_graded_prompts
from rlhf_recipes.reward_modeling.baselines import fit_tfidf, margin_accuracy, winners_and_losers
from rlhf_recipes.tools.certificate.functional.accuracy import (
    accuracy_advantage,
    accuracy_by,
    accuracy_by_value,
    accuracy_gap,
    pair_accuracy,
)
from rlhf_recipes.tools.certificate.functional.calibration import calibration
from rlhf_recipes.tools.certificate.functional.length import correlation, length_controlled_accuracy
from rlhf_recipes.tools.certificate.functional.resampling import mean_summary
from rlhf_recipes.tools.certificate.functional.samples import best_of_n, describe, score_spread
from rlhf_recipes.tools.certificate.functional.verdict import judge
from rlhf_recipes.tools.certificate.pairs import (
    Pairs,
    check_texts,
    pair_key,
    pair_rows,
    prompt_key,
    score_pairs,
)
from rlhf_recipes.tools.certificate.probes import probe
from rlhf_recipes.tools.certificate.scoring import DivergedError, Scorer

logger = logging.getLogger(__name__)

_EXAMPLES = 5


def certify(
    scorer: Scorer,
    test: Dataset,
    *,
    train: Dataset | None = None,
    samples: Dataset | None = None,
    category_column: str | None = None,
    margin_column: str = "margin",
    gold_column: str = "gold_score",
    train_rows: int = 500,
    probe_rows: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a reward model on held-out pairs, and on a policy's samples where there are some.

    Args:
        scorer: The reward model.
        test: Held-out pairs, as of `score_pairs`.
        train: Pairs that it was trained on. The TF-IDF baseline is fitted to all of them.
        samples: Rows with `prompt` and `completion` (and gold scores), several per prompt for the best-of-n curve.
        category_column: Column of `test` with the kind of each pair.
        margin_column: Column of `test` with the strength of each preference, used where it is there.
        gold_column: Column of `samples` with gold scores, used where it is there.
        train_rows: Number of training pairs that are scored, for the gap.
        probe_rows: Number of pairs whose chosen completions are changed.
        seed: Seed of the choice of rows.

    Returns:
        The measures by name, with the `verdict`, its reasons, and the scores for the plots. Where the rows of a
        measure have fewer than ten different prompts, its `unit` is `"rows"`: its interval holds for these prompts.

    Raises:
        ValueError: If columns are missing, or nothing fits into the model.
    """
    pairs = score_pairs(scorer, test)
    measures: dict[str, Any] = {}
    measures["data"] = {"pairs": len(pairs.rows), "left_out": pairs.left_out, "ties": int((~pairs.decided).sum())}
    measures |= _scores(scorer, pairs)
    if measures["scores"]["not_finite"] or measures["scores"]["constant"]:
        return {**measures, "verdict": judge(measures)}
    if not pairs.decided.any():
        raise ValueError("All held-out pairs are ties (label 0.5): there is no accuracy to measure.")
    results = _pair_measures(pairs, category_column, margin_column)
    results["baselines"] = _baselines(pairs, train)
    try:  # other texts than those of the pairs
        results["probes"] = probe(scorer, pairs, probe_rows, seed)
        if train is not None and len(train):
            gap, measures["data"]["shared"] = _gap(pairs, score_pairs(scorer, _draw(train, train_rows, seed)))
            results["train_gap"] = gap
        if samples is not None:
            results |= _sample_measures(scorer, pairs, samples, gold_column)
    except DivergedError as error:
        measures["scores"] |= {"not_finite": error.bad, "n": error.n}
        return {**measures, "verdict": judge(measures)}
    measures |= {**results, "examples": _worst_errors(scorer, pairs)}
    measures["verdict"] = judge(measures)
    return measures


def _scores(scorer: Scorer, pairs: Pairs) -> dict[str, Any]:
    all_scores = np.concatenate([pairs.chosen, pairs.rejected])
    bad = int((~np.isfinite(all_scores)).sum())
    scores: dict[str, Any] = {"not_finite": bad, "n": len(all_scores), "constant": False}
    if not bad:
        scores["constant"] = bool(np.ptp(all_scores) <= 1e-5 * max(1.0, float(np.abs(all_scores).max())))
        sides = {"chosen": _normalised(scorer, pairs.chosen), "rejected": _normalised(scorer, pairs.rejected)}
        scores |= {"all": describe(_normalised(scorer, all_scores))}
        scores |= {name: describe(values) for name, values in sides.items()}
        scores["values"] = {name: values.tolist() for name, values in sides.items()}
    readout = {"readout": scorer.readout.readout, "gain": scorer.readout.gain, "bias": scorer.readout.bias}
    return {"readout": readout, "scores": scores}


def _pair_measures(pairs: Pairs, category_column: str | None, margin_column: str) -> dict[str, Any]:
    part, rows = pairs.decided, pairs.decided_rows()
    differences, prompts = pairs.differences[part], np.array(pairs.prompts)[part]
    lengths = (pairs.chosen_lengths[part], pairs.rejected_lengths[part])
    std = float(np.concatenate([pairs.chosen, pairs.rejected]).std())
    margins: list[Any] = [row.get(margin_column) for row in rows]
    measures: dict[str, Any] = {
        "accuracy": pair_accuracy(differences, prompts),
        "margin": mean_summary(differences, prompts),
        "equal_scores": float((np.abs(differences) <= 1e-3 * std).mean()),
        "by_difference": accuracy_by_value(differences, np.abs(differences), prompts),
        "calibration": calibration(pairs.differences, pairs.labels, pairs.prompts),
        "length": {
            "completions": correlation(
                np.stack([pairs.chosen, pairs.rejected], axis=1),
                np.stack([pairs.chosen_lengths, pairs.rejected_lengths], axis=1),
                pairs.prompts,
            ),
            "pairs": correlation(differences, lengths[0] - lengths[1], prompts),
            "controlled": length_controlled_accuracy(differences, *lengths, prompts),
            "values": np.concatenate([pairs.chosen_lengths, pairs.rejected_lengths]).tolist(),
        },
    }
    if category_column is not None:
        if category_column not in pairs.rows[0]:
            raise ValueError(f"The pairs have no column {category_column!r}. They have {sorted(pairs.rows[0])}.")
        measures["by_category"] = accuracy_by(differences, [str(row[category_column]) for row in rows], prompts)
    if all(map(_is_number, margins)):
        measures["by_margin"] = accuracy_by_value(differences, margins, prompts)
    if len(np.unique(pairs.labels[part])) > 1:
        measures["by_confidence"] = accuracy_by_value(differences, pairs.labels[part], prompts)
    return measures


def _is_number(value: Any) -> bool:
    """Return whether a cell holds something: pandas writes nan into empty ones."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _gap(pairs: Pairs, train: Pairs) -> tuple[dict[str, Any] | None, int]:
    """Measure the gap on training pairs that are no held-out pairs, and count those that are."""
    if not np.isfinite(train.differences).all():
        raise DivergedError(np.concatenate([train.chosen, train.rejected]))
    known = set(map(pair_key, pairs.rows))
    both = np.array([pair_key(row) in known for row in train.rows])
    shared = int(both.sum())
    if shared:
        logger.warning(
            "%d of %d training pairs that were drawn are held-out pairs, too: what is measured on them may be learned "
            "by heart. They do not count for the gap between training and held-out accuracy.",
            *(shared, len(both)),
        )
    held_out, trained = pairs.decided, train.decided & ~both
    if not trained.any():
        return None, shared
    prompts, train_prompts = np.array(pairs.prompts), np.array(train.prompts)
    sides = (train.differences[trained], train_prompts[trained], pairs.differences[held_out], prompts[held_out])
    return accuracy_gap(*sides), shared


def _baselines(pairs: Pairs, train: Dataset | None) -> dict[str, Any]:
    """Measure simple rules on the same pairs."""
    chosen, rejected = winners_and_losers(_texts(pairs.decided_rows()))
    longer = np.array([len(text.strip()) for text in chosen]) - [len(text.strip()) for text in rejected]
    margins = {"longer": longer, "shorter": -longer}
    decided = [] if train is None else [row for row in pair_rows(train) if row["label"] != 0.5]
    if decided:
        try:
            rule = fit_tfidf(_texts(decided))
            margins["tfidf"] = rule(chosen) - rule(rejected)
        except ValueError as error:
            logger.warning("No TF-IDF baseline: %s", error)
    differences, prompts = pairs.differences[pairs.decided], np.array(pairs.prompts)[pairs.decided]
    return {
        name: {**margin_accuracy(values), "advantage": accuracy_advantage(differences, values, prompts)}
        for name, values in margins.items()
    }


def _texts(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])


def _draw(rows: Dataset, most: int, seed: int) -> Dataset:
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), min(most, len(rows)))))


def _sample_measures(scorer: Scorer, pairs: Pairs, samples: Dataset, gold_column: str) -> dict[str, Any]:
    samples = with_graded_prompts(samples)
    missing = {"prompt", "completion"} - set(samples.column_names)
    if missing:
        raise ValueError(f"Samples need the columns `prompt` and `completion`, found {samples.column_names}.")
    rows = samples.to_list()
    for index, row in enumerate(rows):
        check_texts(row, ("prompt", "completion"), f"Sample {index}")
    encoded = [scorer.encode(row["prompt"], row["completion"], **options_of(row)) for row in rows]
    indices = [index for index, text in enumerate(encoded) if scorer.fits(text)]
    if not indices:
        raise ValueError(f"None of the {len(rows)} samples fits into {scorer.max_length} tokens. Raise `max_length`.")
    scores = scorer.finite_scores([encoded[index] for index in indices])
    gold = [rows[index].get(gold_column) for index in indices]
    known = all(map(_is_number, gold))
    if not known and any(map(_is_number, gold)):
        index = indices[[_is_number(value) for value in gold].index(False)]
        raise ValueError(f"Sample {index} has no `{gold_column}`, but others have one. Give it to all or to none.")
    normalised, prompts = _normalised(scorer, scores), [prompt_key(rows[index]["prompt"]) for index in indices]
    data = _normalised(scorer, np.concatenate([pairs.chosen, pairs.rejected]))
    return {
        "samples": {"n": len(indices), "left_out": len(rows) - len(indices), "values": normalised.tolist()},
        "spread": score_spread(data, normalised, prompts),
        "best_of_n": best_of_n(normalised, prompts, gold if known else None),
    }


def _worst_errors(scorer: Scorer, pairs: Pairs) -> list[dict[str, Any]]:
    order = [index for index in np.argsort(pairs.differences, kind="stable") if pairs.decided[index]]
    worst = [index for index in order[:_EXAMPLES] if pairs.differences[index] < 0]
    chosen, rejected = _normalised(scorer, pairs.chosen), _normalised(scorer, pairs.rejected)
    return [
        {
            **{column: pairs.rows[index][column] for column in ("prompt", "chosen", "rejected")},
            "chosen_score": float(chosen[index]),
            "rejected_score": float(rejected[index]),
        }
        for index in worst
    ]


def _normalised(scorer: Scorer, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = scorer.readout.apply(torch.from_numpy(scores)).numpy()
    return result
