"""Statistics for comparing a policy with its reference: arrays in, numbers out."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import binomtest

_MOST_DRAWS = 10_000_000
_MOST_STEPS = 200  # of Newton's method, each at most 1 long


def win_outcomes(policy_scores: ArrayLike, reference_scores: ArrayLike) -> NDArray[np.float64]:
    """Compare each score of the policy with the reference's score for the same prompt.

    Args:
        policy_scores: Scores of the policy's completions, shape `(N,)`. Higher is better.
        reference_scores: Scores of the reference's completions, shape `(N,)`.

    Returns:
        1 where the policy wins, 0 where it loses and 0.5 where they tie, shape `(N,)`.

    Raises:
        ValueError: If the shapes differ, there are no scores, or a score is nan.

    Example:
        >>> win_outcomes([3.0, 1.0, 2.0], [1.0, 1.0, 5.0]).tolist()
        [1.0, 0.5, 0.0]
    """
    policy = _check_rows("policy_scores", policy_scores)
    reference = _check_rows("reference_scores", reference_scores)
    if policy.shape != reference.shape:
        raise ValueError(
            f"`policy_scores` has {len(policy)} entries and `reference_scores` has {len(reference)}. "
            "Give both one score per prompt, in the same order."
        )
    return np.where(policy == reference, 0.5, policy > reference)


def win_rate(policy_scores: ArrayLike, reference_scores: ArrayLike) -> float:
    """Share of the prompts on which the policy beats the reference; a tie counts half.

    Args:
        policy_scores: Scores of the policy's completions, shape `(N,)`. Higher is better.
        reference_scores: Scores of the reference's completions, shape `(N,)`.

    Returns:
        A number in [0, 1]; 0.5 if neither is better.

    Raises:
        ValueError: If the shapes differ, there are no scores, or a score is nan.

    Example:
        >>> win_rate([3.0, 1.0, 2.0, 2.0], [1.0, 1.0, 5.0, 0.0])
        0.625
    """
    return float(win_outcomes(policy_scores, reference_scores).mean())


def bootstrap_interval(
    values: ArrayLike, clusters: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of a mean whose rows come in clusters, such as several completions of one prompt.

    Rows of one cluster resemble each other, so whole clusters are drawn with replacement, and the interval is cut
    from the percentiles of the mean over all drawn rows.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997).

    Args:
        values: One value per row, shape `(N,)`.
        clusters: The cluster of each row, shape `(N,)`: numbers or strings.
        level: Probability that the interval is to cover the true mean, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Returns:
        `(low, high)`.

    Raises:
        ValueError: If the shapes differ, a value is nan, there are fewer than two clusters, or `level` is not in
            (0, 1).

    Example:
        >>> low, high = bootstrap_interval([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], clusters=["a", "a", "b", "b", "c", "c"])
        >>> round(low, 2), round(high, 2)
        (0.0, 1.0)
    """
    rows, labels = _check_rows("values", values), np.asarray(clusters)
    if rows.shape != labels.shape:
        raise ValueError(
            f"`values` has shape {rows.shape}, but `clusters` has shape {labels.shape}. Give one per row."
        )
    _, index = np.unique(labels, return_inverse=True)
    sums, sizes = np.bincount(index, weights=rows), np.bincount(index)
    if len(sizes) < 2:
        raise ValueError("All rows are in one cluster, which says nothing about others. Give at least two clusters.")
    return ratio_interval(sums, sizes, level, resamples, seed)


def ratio_interval(
    sums: ArrayLike, sizes: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of a mean over all items of rows of different sizes, such as the loss per token of texts.

    Rows are drawn with replacement, each with all of its items, and the interval is cut from the percentiles of
    `sum(sums) / sum(sizes)` over the drawn rows.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997).

    Args:
        sums: Sum of each row's items, shape `(N,)`.
        sizes: Number of each row's items, above 0, shape `(N,)`.
        level: Probability that the interval is to cover the true mean, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Returns:
        `(low, high)`.

    Raises:
        ValueError: If the shapes differ, a number is nan, there are fewer than two rows, a size is not above 0, or
            `level` is not in (0, 1).

    Example:
        >>> low, high = ratio_interval([1.0, 20.0], [1, 10])  # losses of a text of 1 token and of one of 10
        >>> low, high
        (1.0, 2.0)
    """
    totals, counts = _check_pair("sums", sums, "sizes", sizes)
    if len(totals) < 2 or counts.min() <= 0:
        raise ValueError(
            f"An interval needs at least two rows, of sizes above 0; got {len(totals)}, the smallest {counts.min():g}."
        )
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
    rng, rows = np.random.default_rng(seed), len(totals)
    at_once = max(1, _MOST_DRAWS // rows)  # a table of all resamples of many rows would not fit into memory
    means = []
    for start in range(0, resamples, at_once):
        # How often each row is drawn in each resample, shape (resamples, rows).
        draws = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(at_once, resamples - start))
        means.append((draws @ totals) / (draws @ counts))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(
    outcomes: ArrayLike, clusters: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of a share whose rows come in clusters, such as a win rate over several rows of one prompt.

    It is `bootstrap_interval`'s, except where all outcomes are the same. Then so is every sample drawn from them,
    which tells nothing of prompts that were not seen: Wilson's interval for the number of clusters is given.

    Args:
        outcomes: 1 for a success, 0 for a failure, something between them for a tie, shape `(N,)`.
        clusters: The cluster of each row, shape `(N,)`: numbers or strings.
        level: Probability that the interval is to cover the true share, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Returns:
        `(low, high)`, within [0, 1].

    Raises:
        ValueError: If the shapes differ, an outcome is not in [0, 1], there are fewer than two clusters, or `level` is
            not in (0, 1).

    Example:
        >>> low, high = share_interval([1.0, 1.0, 1.0, 1.0], clusters=["a", "a", "b", "c"])
        >>> round(low, 4), high  # three wins of three: what the second row of a prompt adds is not known
        (0.4385, 1.0)
    """
    rows = _check_rows("outcomes", outcomes)
    if rows.min() < 0 or rows.max() > 1:
        raise ValueError(f"`outcomes` must lie in [0, 1], got {rows.min():g} to {rows.max():g}.")
    drawn = bootstrap_interval(rows, clusters, level, resamples, seed)
    count = len(np.unique(np.asarray(clusters)))
    return drawn if rows.min() < rows.max() else proportion_interval(float(rows[0]) * count, count, level)


def sign_test(outcomes: ArrayLike) -> float:
    """Probability of so uneven a split of wins and losses, or a more uneven one, if neither side is better.

    Exact and two-sided; ties are left out. On paired binary outcomes this is McNemar's exact test.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions (1947).

    Args:
        outcomes: 1 for a win, 0 for a loss, 0.5 for a tie, shape `(N,)`: what `win_outcomes` gives.

    Returns:
        The p-value; 1 if all are ties.

    Raises:
        ValueError: If there are no outcomes, or one of them is nan.

    Example:
        >>> sign_test([1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
        0.0625
    """
    rows = _check_rows("outcomes", outcomes)
    wins, losses = int((rows > 0.5).sum()), int((rows < 0.5).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def length_controlled_win_rate(outcomes: ArrayLike, length_differences: ArrayLike) -> float:
    """Win rate as it would be if both completions of each pair had the same length.

    A logistic regression `P(win) = sigmoid(theta + phi * tanh(difference / std(differences)))` is fitted to the
    outcomes; the result is `sigmoid(theta)`. It is the model of AlpacaEval 2 without its term for the difficulty of
    each instruction, which needs the outcomes of many models. A penalty of `(theta^2 + phi^2) / 200` keeps the fit
    finite where one side wins always.

    Source: https://huggingface.co/papers/2404.04475, section 3, equations 1 and 2.

    Args:
        outcomes: 1 for a win, 0 for a loss, 0.5 for a tie, or a judge's probability, shape `(N,)`.
        length_differences: Length of the policy's completion minus the reference's, shape `(N,)`.

    Returns:
        A number in (0, 1).

    Raises:
        ValueError: If the shapes differ, there are no rows, a number is nan, or an outcome is not in [0, 1].

    Example:
        >>> outcomes, differences = [1, 1, 1, 0, 1, 0, 0, 0], [9, 9, 9, 9, -9, -9, -9, -9]  # the longer one wins
        >>> round(length_controlled_win_rate(outcomes, differences), 6)
        0.5
    """
    wins, feature = _length_feature(outcomes, length_differences)
    return float(_at_equal_length(wins, feature, np.ones((1, len(wins))))[0])


def length_controlled_interval(
    outcomes: ArrayLike,
    length_differences: ArrayLike,
    clusters: ArrayLike,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of the length-controlled win rate, whose rows come in clusters.

    Whole clusters are drawn with replacement, the regression is fitted to each sample, and the interval is cut from
    the percentiles of its results. It is wider than that of the win rate: where one side is longer almost everywhere,
    little is known of pairs of equal length.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), section 7.2.

    Args:
        outcomes: As of `length_controlled_win_rate`, shape `(N,)`.
        length_differences: As there, shape `(N,)`.
        clusters: The cluster of each row, such as its prompt, shape `(N,)`: numbers or strings.
        level: Probability that the interval is to cover the true value, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Returns:
        `(low, high)`, within [0, 1].

    Raises:
        ValueError: If the shapes differ, a number is nan, an outcome is not in [0, 1], there are fewer than two
            clusters, or `level` is not in (0, 1).

    Example:
        >>> wins, longer = [1, 1, 0, 1, 0, 0, 1, 0] * 20, [9, 5, 9, -5, -9, -9, 5, -5] * 20
        >>> low, high = length_controlled_interval(wins, longer, clusters=range(160))
        >>> low < length_controlled_win_rate(wins, longer) < high
        True
    """
    wins, feature = _length_feature(outcomes, length_differences)
    labels = np.asarray(clusters)
    if labels.shape != wins.shape:
        raise ValueError(f"`clusters` has shape {labels.shape}, but there are {len(wins)} outcomes. Give one per row.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
    _, index = np.unique(labels, return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        raise ValueError("All rows are in one cluster, which says nothing about others. Give at least two clusters.")
    rng = np.random.default_rng(seed)
    at_once = max(1, _MOST_DRAWS // len(wins))
    rates = []
    for start in range(0, resamples, at_once):
        draws = rng.multinomial(count, np.full(count, 1 / count), size=min(at_once, resamples - start))
        rates.append(_at_equal_length(wins, feature, draws[:, index].astype(np.float64)))
    low, high = np.quantile(np.concatenate(rates), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _length_feature(outcomes: ArrayLike, differences: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Checked outcomes, and `tanh` of the differences in length in their standard deviations."""
    wins, lengths = _check_pair("outcomes", outcomes, "length_differences", differences)
    if (wins < 0).any() or (wins > 1).any():
        raise ValueError(f"`outcomes` must lie in [0, 1], got {wins.min():g} to {wins.max():g}.")
    return wins, np.tanh(lengths / (lengths.std() or 1.0))


def _at_equal_length(
    wins: NDArray[np.float64], feature: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Fit the regression to `R` weightings of the rows, `(R, N)`, by Newton's method: win rates at length 0."""
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(_MOST_STEPS):
        chance = expit(theta[:, None] + phi[:, None] * feature)
        wrong, curve = weights * (chance - wins), weights * chance * (1 - chance)
        slopes = wrong.sum(axis=1) + theta / 100, wrong @ feature + phi / 100
        both, square = curve @ feature, curve @ feature**2 + 0.01
        alone = curve.sum(axis=1) + 0.01
        determinant = alone * square - both**2
        steps = np.stack([square * slopes[0] - both * slopes[1], alone * slopes[1] - both * slopes[0]]) / determinant
        steps /= np.maximum(1.0, np.abs(steps).max(axis=0))  # where one side wins always, a step would go too far
        theta, phi = theta - steps[0], phi - steps[1]
        if np.abs(steps).max() < 1e-10:
            break
    rates: NDArray[np.float64] = expit(theta)
    return rates


def length_controlled_reward(
    policy_scores: ArrayLike,
    policy_lengths: ArrayLike,
    reference_scores: ArrayLike,
    reference_lengths: ArrayLike,
) -> float:
    """Mean score of the policy as it would be at the reference's mean length.

    The slope of the score over the length is fitted within each of the two sets, as in an analysis of covariance, and
    what the difference of the mean lengths is worth is subtracted. If this falls while the plain mean rises, the
    policy earns by length alone.

    Args:
        policy_scores: Scores of the policy's completions, shape `(N,)`.
        policy_lengths: Their lengths in tokens, shape `(N,)`.
        reference_scores: Scores of the reference's completions, shape `(M,)`.
        reference_lengths: Their lengths, shape `(M,)`.

    Returns:
        The adjusted mean, in units of the score.

    Raises:
        ValueError: If shapes differ, there are no rows, or a number is nan.

    Example:
        >>> length_controlled_reward([3.0, 5.0], [30, 50], [1.0, 3.0], [10, 30])  # one tenth per token, nothing else
        2.0
    """
    ours = _check_pair("policy_scores", policy_scores, "policy_lengths", policy_lengths)
    theirs = _check_pair("reference_scores", reference_scores, "reference_lengths", reference_lengths)
    spread = sum(float(lengths.var() * len(lengths)) for _, lengths in (ours, theirs))
    common = sum(float(((lengths - lengths.mean()) * scores).sum()) for scores, lengths in (ours, theirs))
    slope = common / spread if spread else 0.0
    return float(ours[0].mean() - slope * (ours[1].mean() - theirs[1].mean()))


def token_mean(sums: ArrayLike, lengths: ArrayLike) -> float:
    """Mean over all tokens of what was summed up per completion, such as the KL: a long one counts for more.

    Args:
        sums: Sum over the tokens of each completion, shape `(N,)`.
        lengths: Tokens of each completion, shape `(N,)`.

    Returns:
        The mean; 0 if there is no token.

    Raises:
        ValueError: If the shapes differ, there are no rows, or a number is nan.

    Example:
        >>> token_mean([2.0, 0.0], [10, 30])
        0.05
    """
    totals, counts = _check_pair("sums", sums, "lengths", lengths)
    return float(totals.sum() / max(counts.sum(), 1.0))


def proportion_interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a proportion, such as a reward model's accuracy on independent pairs.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927).

    Args:
        successes: Number of successes; a tie may count half.
        n: Number of trials, at least 1.
        level: Probability that the interval is to cover the true proportion, in (0, 1).

    Returns:
        `(low, high)`, within [0, 1].

    Raises:
        ValueError: If not `0 <= successes <= n`, `n` is 0, or `level` is not in (0, 1).

    Example:
        >>> low, high = proportion_interval(5, 10)
        >>> round(low, 4), round(high, 4)
        (0.2366, 0.7634)
    """
    if not (0 <= successes <= n and n > 0):
        raise ValueError(f"Expected 0 <= successes <= n with n > 0, got successes={successes} and n={n}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
    # Not scipy's, which knows no half successes.
    share, z = successes / n, NormalDist().inv_cdf((1 + level) / 2)
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    # The ends of a sample without successes, or with nothing else, would miss 0 and 1 by rounding
    low = (centre - half) / scale if successes else 0.0
    return low, (centre + half) / scale if successes < n else 1.0


def _check_rows(name: str, values: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or len(rows) == 0:
        raise ValueError(f"`{name}` has shape {rows.shape}. Give one number per row, shape (N,), with N > 0.")
    if np.isnan(rows).any():
        raise ValueError(f"`{name}` holds nan in {int(np.isnan(rows).sum())} of {len(rows)} rows. Leave them out.")
    return rows


def _check_pair(
    name: str, values: ArrayLike, other_name: str, others: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, other_rows = _check_rows(name, values), _check_rows(other_name, others)
    if rows.shape != other_rows.shape:
        raise ValueError(
            f"`{name}` has {len(rows)} entries and `{other_name}` has {len(other_rows)}. Give both one per completion."
        )
    return rows, other_rows
