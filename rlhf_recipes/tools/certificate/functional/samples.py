"""Measures of a reward model on a policy's own samples: the spread of its scores, and the best of n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from rlhf_recipes.tools.certificate.functional.resampling import mean_summary, resampled_interval

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def expected_best_of_n(proxy: ArrayLike, gold: ArrayLike) -> NDArray[np.float64]:
    r"""Expected gold score of the sample that the proxy likes best, of n drawn without replacement from N of a prompt.

    With the samples sorted by the proxy, the i-th is the best of n in `C(i - 1, n - 1)` of the `C(N, n)` draws. So
    this is the mean over all draws, and the unbiased estimate for n fresh samples. Samples with equal proxy scores are
    equally likely to be taken.

    Source: https://huggingface.co/papers/2112.09332, appendix I; https://huggingface.co/papers/2210.10760.

    Args:
        proxy: Scores of the reward model, shape `(N,)`.
        gold: What is to be measured of the chosen sample: gold scores, or the proxy itself, shape `(N,)`.

    Returns:
        One value for each n from 1 to N, shape `(N,)`; the first is the mean of `gold`.

    Example:
        >>> [round(value, 6) for value in expected_best_of_n([1.0, 2.0, 3.0], [0.0, 6.0, 3.0]).tolist()]
        [3.0, 4.0, 3.0]
    """
    scores, values = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    total = len(scores)
    _, tied = np.unique(scores, return_inverse=True)
    values = (np.bincount(tied, weights=values) / np.bincount(tied))[tied][np.argsort(scores, kind="stable")]
    rank, n = np.arange(1, total + 1)[None, :], np.arange(1, total + 1)[:, None]
    # Logarithms, because C(N, n) overflows; a rank below n is never the best of n.
    log_weights = _log_choose(rank - 1, np.minimum(n - 1, rank - 1)) - _log_choose(total, n)
    weights = np.where(rank >= n, np.exp(log_weights), 0.0)
    result: NDArray[np.float64] = weights @ values
    return result


def best_of_n(
    proxy: ArrayLike, prompts: Sequence[str], gold: ArrayLike | None = None, level: float = 0.95
) -> dict[str, Any] | None:
    """The best-of-n curve over prompts: what is gained by choosing with the reward model, at which distance.

    Source: https://huggingface.co/papers/2210.10760, where gold scores that fall with n show over-optimisation.

    Args:
        proxy: The reward model's score of each sample, shape `(S,)`.
        prompts: The prompt of each sample, length `S`. Prompts with fewer samples than the median are left out.
        gold: The gold score of each sample, shape `(S,)`, where it is known.
        level: Probability that the intervals are to cover the true means.

    Returns:
        `None` if most prompts have one sample only; else `prompts`, their number, and `curve`, a row for each n (all
        up to 8, then powers of 2, and the largest): `n`, `kl`, the most that best-of-n is away from the policy
        (`log n - (n - 1) / n` nats), `proxy`, and with gold scores `gold` and `oracle`, the gold score that choosing
        by it would give, each with `value` and `interval` (`None` below `FEWEST` prompts). With gold scores also
        `gain`, gold at the largest n minus gold at 1, `best_n`, where gold is highest, and `drop`, gold at the largest
        n minus gold there.

    Example:
        >>> result = best_of_n([1.0, 2.0, 3.0, 5.0], ["a", "a", "b", "b"], gold=[0.0, 1.0, 1.0, 0.0])
        >>> [(row["n"], row["proxy"]["value"], row["gold"]["value"]) for row in result["curve"]]
        [(1, 2.75, 0.5), (2, 3.5, 0.5)]
    """
    scores, names = np.asarray(proxy, dtype=np.float64), np.asarray(prompts)
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(prompts)]
    most = int(np.median([len(group) for group in groups]))
    used = [group for group in groups if len(group) >= most]
    if most < 2:
        return None
    curves = {"proxy": [expected_best_of_n(scores[p], scores[p])[:most] for p in used]}
    if gold is not None:
        values = np.asarray(gold, dtype=np.float64)
        curves["gold"] = [expected_best_of_n(scores[p], values[p])[:most] for p in used]
        curves["oracle"] = [expected_best_of_n(values[p], values[p])[:most] for p in used]
    steps = sorted({n for n in [*range(1, 9), *(2**power for power in range(4, 20)), most] if n <= most})
    rows = []
    for n in steps:
        means = {
            name: mean_summary(np.stack(values)[:, n - 1], np.arange(len(used)), level)
            for name, values in curves.items()
        }
        rows.append({"n": n, "kl": float(np.log(n) - (n - 1) / n), **means})
    result: dict[str, Any] = {"prompts": len(used), "curve": rows}
    if gold is not None:
        paths = np.stack(curves["gold"])
        best = int(paths.mean(axis=0).argmax())
        result["gain"] = mean_summary(paths[:, -1] - paths[:, 0], np.arange(len(used)), level)
        result["drop"] = mean_summary(paths[:, -1] - paths[:, best], np.arange(len(used)), level)
        result["best_n"] = best + 1
    return result


def score_spread(
    data: ArrayLike, samples: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95
) -> dict[str, Any]:
    """Compare the scores of a policy's samples with those of the data that the reward model was made for.

    Args:
        data: Scores of held-out completions, shape `(N,)`.
        samples: Scores of the policy's samples, shape `(S,)`.
        clusters: The prompt of each sample, shape `(S,)`. By default each has its own.
        level: Probability that the intervals are to cover the true values.

    Returns:
        For `data` and `samples` the `mean`, `std`, `quantiles` and `n`; `shift`, the difference of the means in
        standard deviations of the data; `std_ratio`, samples over data; `intervals`, for these two the `interval` and
        its `unit`, drawing samples (the data are taken as they are); and `outside`, the share of samples outside of
        the data's range. The ratios are `None` if all data score the same.

    Example:
        >>> spread = score_spread([-1.0, 1.0], [1.0, 3.0])
        >>> spread["shift"], spread["std_ratio"], spread["outside"]
        (2.0, 1.0, 0.5)
    """
    first, second = np.asarray(data, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    std, mean = float(first.std()), float(second.mean())
    outside = (second < first.min()) | (second > first.max())
    unit, centred = std if std > 0 else np.nan, second - mean  # centred: no digits are lost in the squares
    columns = np.stack([np.ones_like(second), centred, centred**2], axis=1)

    def shifts(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = (mean - first.mean() + sums[:, 1] / sums[:, 0]) / unit
        return result

    def ratios(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        variance = sums[:, 2] / sums[:, 0] - (sums[:, 1] / sums[:, 0]) ** 2
        result: NDArray[np.float64] = np.sqrt(np.maximum(variance, 0.0)) / unit
        return result

    prompts = np.arange(len(second)) if clusters is None else clusters
    return {
        "data": describe(first),
        "samples": describe(second),
        "shift": (mean - float(first.mean())) / std if std > 0 else None,
        "std_ratio": float(second.std()) / std if std > 0 else None,
        "intervals": {
            "shift": resampled_interval(columns, prompts, shifts, level),
            "std_ratio": resampled_interval(columns, prompts, ratios, level),
        },
        "outside": float(outside.mean()),
    }


def describe(scores: ArrayLike) -> dict[str, Any]:
    """Mean, standard deviation (of the population), quantiles and number of scores.

    Example:
        >>> summary = describe([0.0, 2.0])
        >>> summary["mean"], summary["std"], summary["quantiles"]["0.5"], summary["n"]
        (1.0, 1.0, 1.0, 2)
    """
    values = np.asarray(scores, dtype=np.float64)
    quantiles = {str(q): float(np.quantile(values, q)) for q in _QUANTILES}
    return {"mean": float(values.mean()), "std": float(values.std()), "quantiles": quantiles, "n": len(values)}


def _log_choose(n: ArrayLike, k: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64)
    result: NDArray[np.float64] = gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)
    return result
