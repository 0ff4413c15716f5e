"""Statistics of completions as texts: how varied they are, and what they repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from rlhf_recipes.extras import from_extra


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Share of the n-grams of all sequences that are different from each other.

    It falls as the sequences get longer or more, whatever they say: compare sets of one size and about one length.

    Source: https://huggingface.co/papers/1510.03055, section 5.2 (distinct-1 and distinct-2).

    Args:
        sequences: Token ids or words of each completion.
        n: Tokens in an n-gram, at least 1.

    Returns:
        A number in [0, 1]; 0 where no sequence has `n` tokens.

    Raises:
        ValueError: If `n` is less than 1.

    Example:
        >>> distinct_n(["good good film".split(), "good film".split()], n=2)
        0.6666666666666666
    """
    ngrams = [ngram for sequence in sequences for ngram in _ngrams(sequence, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def top_ngrams(
    sequences: Sequence[Sequence[Hashable]], n: int, most: int = 10
) -> list[tuple[tuple[Hashable, ...], float]]:
    """Find the n-grams that occur in the most sequences.

    A policy that games its reward often says the same phrase in all completions; repeating it within one counts once.

    Args:
        sequences: Token ids or words of each completion.
        n: Tokens in an n-gram, at least 1.
        most: How many to return.

    Returns:
        The n-grams and the share of the sequences that hold each, in (0, 1], the most frequent first.

    Raises:
        ValueError: If `n` is less than 1.

    Example:
        >>> top_ngrams(["a fine film".split(), "a fine day".split(), "no".split()], n=2, most=1)
        [(('a', 'fine'), 0.6666666666666666)]
    """
    counts = Counter(ngram for sequence in sequences for ngram in dict.fromkeys(_ngrams(sequence, n)))
    return [(ngram, count / len(sequences)) for ngram, count in counts.most_common(most)]


def repeated_share(sequence: Sequence[Hashable], n: int) -> float:
    """Share of the n-grams of one sequence that occurred in it before: 0 for none, towards 1 for a loop.

    Args:
        sequence: Token ids or words.
        n: Tokens in an n-gram, at least 1.

    Returns:
        A number in [0, 1); 0 where the sequence has less than `n` tokens.

    Raises:
        ValueError: If `n` is less than 1.

    Example:
        >>> repeated_share("ha ha ha ha".split(), n=1)
        0.75
    """
    ngrams = list(_ngrams(sequence, n))
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def self_bleu(sequences: Sequence[Sequence[Hashable]], rows: int = 100, seed: int = 0) -> float:
    """Mean BLEU-4 of each completion with the others as references: how much they resemble each other.

    Sentence BLEU as sacrebleu computes it, with the precisions of the orders that a completion has, and exponential
    smoothing. Its cost grows with the square of `rows`, so a large set is sampled.

    Source: https://huggingface.co/papers/1802.01886, section 3.

    Args:
        sequences: Token ids or words of each completion.
        rows: The most completions to compare.
        seed: Seed of their choice.

    Returns:
        A number in [0, 1]: 1 if all are the same.

    Raises:
        ValueError: If there are fewer than two completions.
        ModuleNotFoundError: Without the extra `report`, which brings sacrebleu.

    Example:
        >>> self_bleu(["a fine film".split(), "a fine film".split()])
        1.0
    """
    with from_extra("report", needed_by="Self-BLEU"):
        from sacrebleu.metrics import BLEU  # slow to import

    if len(sequences) < 2:
        raise ValueError(f"Self-BLEU compares completions with each other; got {len(sequences)}. Give at least two.")
    chosen = range(len(sequences))
    if len(sequences) > rows:
        chosen = np.random.default_rng(seed).choice(len(sequences), size=rows, replace=False).tolist()
    # Numbers in place of the tokens, which may hold blanks
    vocabulary: dict[Hashable, str] = {}
    texts = [
        " ".join(vocabulary.setdefault(token, str(len(vocabulary))) for token in sequences[index]) for index in chosen
    ]
    bleu = BLEU(effective_order=True, tokenize="none")
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return round(float(np.mean(scores)) / 100, 12)


def _ngrams(sequence: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return zip(*(sequence[start:] for start in range(n)), strict=False)
