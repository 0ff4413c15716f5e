"""Baselines of a reward model on held-out pairs: the length of a completion, and a linear model of its words."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from rlhf_recipes.extras import from_extra
from rlhf_recipes.messages import contents
from rlhf_recipes.statistics.metrics import proportion_interval

logger = logging.getLogger(__name__)

_FOLDS = 5
_STRENGTHS = tuple(float(10.0**power) for power in np.arange(-1.0, 3.1, 0.5))  # sklearn's `C`, from strong to weak


@dataclass(frozen=True)
class TfidfScorer:
    """A linear reward model on the words and word pairs of a text: a score per text, the same for all prompts.

    The difference of two scores is the log odds that the first text is preferred, so swapping the two texts turns its
    sign.

    Attributes:
        vectorizer: A fitted `TfidfVectorizer`.
        weights: One weight per word or word pair, shape `(F,)`.
        strength: The inverse strength of the L2 penalty that was chosen (scikit-learn's `C`).
    """

    vectorizer: Any
    weights: NDArray[np.float64]
    strength: float

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Score texts: shape `(N,)`, in log odds. A text without a known word gets 0."""
        scores: NDArray[np.float64] = self.vectorizer.transform(texts) @ self.weights
        return scores


def pair_baselines(train: Dataset, test: Dataset, level: float = 0.95) -> dict[str, dict[str, Any]]:
    """Measure three simple rules on held-out pairs, to compare a reward model with.

    `longer` and `shorter` prefer the completion with more or with fewer characters, without the white space around
    it. `tfidf` is `fit_tfidf` on the training pairs; without scikit-learn it is left out, and the log says so. A rule
    that does not tell the two completions apart is half right on that pair.

    Args:
        train: Training pairs with the columns `prompt`, `chosen` and `rejected`, text or chats, and maybe `label`,
            the probability that `chosen` wins: 1 where it is missing. Ties (0.5) are left out.
        test: Held-out pairs with the same columns.
        level: Probability that the intervals are to cover the true accuracy, taking the pairs as independent.

    Returns:
        For each rule `accuracy`, the share of pairs that it gets right; `accuracy_ci`, its Wilson interval
        `[low, high]`; and `n`, the number of pairs. `tfidf` also has `C`, the chosen strength, and `features`, the
        number of words and word pairs.

    Raises:
        ValueError: If a column is missing, there is no pair to measure, or no training completion has a word.

    Example:
        >>> rows = {"prompt": ["a", "b"], "chosen": ["so good", "good film"], "rejected": ["bad", "dull"]}
        >>> baselines = pair_baselines(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows))
        >>> {name: baseline["accuracy"] for name, baseline in baselines.items()}
        {'longer': 1.0, 'shorter': 0.0, 'tfidf': 1.0}
    """
    chosen, rejected = winners_and_losers(test)
    longer = np.array([len(text.strip()) for text in chosen]) - [len(text.strip()) for text in rejected]
    baselines = {"longer": margin_accuracy(longer, level), "shorter": margin_accuracy(-longer, level)}
    try:
        scorer = fit_tfidf(train)
    except ModuleNotFoundError as error:
        logger.warning("Left out: %s", error)
        return baselines
    tfidf = margin_accuracy(scorer(chosen) - scorer(rejected), level)
    baselines["tfidf"] = {**tfidf, "C": scorer.strength, "features": len(scorer.weights)}
    return baselines


def margin_accuracy(margins: Sequence[float] | NDArray[Any], level: float = 0.95) -> dict[str, Any]:
    """Accuracy of a rule on pairs; a margin of 0 counts half.

    Args:
        margins: What the rule gives `chosen` more than `rejected`, shape `(N,)`.
        level: Probability that the interval is to cover the true accuracy, taking the pairs as independent.

    Returns:
        `accuracy`, `accuracy_ci` (Wilson's interval `[low, high]`; with ties it is wider than need be) and `n`.

    Raises:
        ValueError: If there is no pair.

    Example:
        >>> margin_accuracy([2.0, 0.0, -1.0, 3.0])["accuracy"]
        0.625
    """
    signs = np.sign(np.asarray(margins, dtype=np.float64))
    if not len(signs):
        raise ValueError("There is no pair to measure a baseline on.")
    n, right = len(signs), float((signs + 1).sum() / 2)
    return {"accuracy": right / n, "accuracy_ci": list(proportion_interval(right, n, level)), "n": n}


def fit_tfidf(train: Dataset) -> TfidfScorer:
    """Fit a logistic regression without intercept to the differences of two completions' TF-IDF features.

    Features are words and pairs of neighbouring words, with logarithmic counts. The strength of the L2 penalty is the
    one with the smallest log loss in 5-fold cross-validation. A fold holds out whole prompts. Where there are fewer
    than 5 prompts it holds out completions, and leaves out pairs of a held-out and another completion, so that no
    text is on both sides. Rows that allow no fold get scikit-learn's default strength.

    Args:
        train: Pairs with the columns `prompt`, `chosen` and `rejected`, text or chats, and maybe `label`, as for
            `pair_baselines`.

    Returns:
        The scorer.

    Raises:
        ValueError: If a column is missing, or no completion has a word.
        ModuleNotFoundError: Without the extra `report`, which brings scikit-learn.

    Example:
        >>> rows = {"prompt": list("abcdefgh") * 3, "chosen": ["good film"] * 24, "rejected": ["bad film"] * 24}
        >>> good, bad, unknown = fit_tfidf(Dataset.from_dict(rows))(["good", "bad", "?"])
        >>> bool(good > 0 > bad), float(unknown)
        (True, 0.0)
    """
    with from_extra("report", needed_by="The baseline `tfidf`"):
        from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import, and needed only here

    train = _decided(train)
    chosen, rejected = winners_and_losers(train)
    # A punctuation mark is a word too: `!` and `?` say something.
    words = r"\w+(?:['-]\w+)*|[^\w\s]"
    vectorizer = TfidfVectorizer(token_pattern=words, ngram_range=(1, 2), sublinear_tf=True)
    try:
        vectorizer.fit(sorted({*chosen, *rejected}))
    except ValueError as error:
        raise ValueError(
            f"There is no word in the completions of the {len(chosen)} training pairs: all are blank."
        ) from error
    differences = vectorizer.transform(chosen) - vectorizer.transform(rejected)
    strength = _choose_strength(differences, _fold_pairs(train, chosen, rejected))
    return TfidfScorer(vectorizer, _fit(differences, strength), strength)


def winners_and_losers(pairs: Dataset) -> tuple[list[str], list[str]]:
    """Return the preferred and the other completions as texts; of a chat, the messages' contents, one a line.

    Args:
        pairs: Rows with the columns `prompt`, `chosen` and `rejected`, and maybe `label`, as for `pair_baselines`.

    Returns:
        `(winners, losers)`, two lists of texts, without the ties.

    Raises:
        ValueError: If a column is missing.

    Example:
        >>> chat = [{"role": "assistant", "content": "Hello!"}]
        >>> rows = {"prompt": ["Hi"], "chosen": [[]], "rejected": [chat], "label": [0.1]}
        >>> winners_and_losers(Dataset.from_dict(rows))
        (['Hello!'], [''])
    """
    pairs = _decided(pairs)
    sides = [[contents(value) for value in pairs[side]] for side in ("chosen", "rejected")]
    rows = [(a, b) if label > 0.5 else (b, a) for a, b, label in zip(*sides, _labels(pairs), strict=True)]
    return [winner for winner, _ in rows], [loser for _, loser in rows]


def _decided(pairs: Dataset) -> Dataset:
    """The pairs without the ties."""
    missing = {"prompt", "chosen", "rejected"} - set(pairs.column_names)
    if missing:
        raise ValueError(
            f"Baselines need the columns `prompt`, `chosen` and `rejected`; missing: {', '.join(sorted(missing))}. "
            "Give rows as `to_preferences` makes them."
        )
    return pairs.select([row for row, label in enumerate(_labels(pairs)) if label != 0.5])


def _labels(pairs: Dataset) -> list[float]:
    labels = pairs["label"] if "label" in pairs.column_names else [None] * len(pairs)
    return [1.0 if label is None else label for label in labels]


def _fold_pairs(train: Dataset, chosen: list[str], rejected: list[str]) -> list[tuple[int, int]]:
    """Give both sides of every pair a fold: their prompt's, or where there are few prompts their own."""
    prompts = [repr(prompt) for prompt in train["prompt"]]
    by_prompt = len(set(prompts)) >= _FOLDS
    left, right = (prompts, prompts) if by_prompt else (chosen, rejected)
    # Ranks of hashes: the folds are of one size, and do not depend on the order of the rows.
    order = sorted({*left, *right}, key=lambda text: hashlib.sha256(text.encode()).digest())
    fold = {text: rank % _FOLDS for rank, text in enumerate(order)}
    return [(fold[a], fold[b]) for a, b in zip(left, right, strict=True)]


def _choose_strength(differences: Any, folds: list[tuple[int, int]]) -> float:
    sides = np.array(folds)
    losses = np.zeros(len(_STRENGTHS))
    for fold in range(_FOLDS):
        inside = sides == fold
        fit, held_out = np.flatnonzero(~inside.any(axis=1)), np.flatnonzero(inside.all(axis=1))
        if not len(fit) or not len(held_out):
            continue
        for index, strength in enumerate(_STRENGTHS):
            margins = differences[held_out] @ _fit(differences[fit], strength)
            losses[index] += np.logaddexp(0.0, -margins).sum()
    return float(_STRENGTHS[int(losses.argmin())]) if losses.any() else 1.0


def _fit(differences: Any, strength: float) -> NDArray[np.float64]:
    """Weights without intercept, under which every difference is to be positive."""
    from scipy.sparse import csr_array, vstack
    from sklearn.linear_model import LogisticRegression

    # scikit-learn asks for a second class: a row of zeros, which has the same loss under all weights.
    features = vstack([differences, csr_array((1, differences.shape[1]))], format="csr")
    labels = np.append(np.ones(differences.shape[0]), 0.0)
    model = LogisticRegression(C=strength, fit_intercept=False, solver="liblinear", tol=1e-6, max_iter=1000)
    weights: NDArray[np.float64] = model.fit(features, labels).coef_[0]
    return weights
