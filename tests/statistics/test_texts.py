"""Variety and repetition of texts against counting by hand, sacrebleu on words, and bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from rlhf_recipes.statistics.texts import distinct_n, repeated_share, self_bleu, top_ngrams

sets = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=6)


class TestDistinct:
    def test_numbers(self):
        sequences = ["a b a b".split(), "a b".split(), "c".split()]
        assert distinct_n(sequences, 1) == 3 / 7
        assert distinct_n(sequences, 2) == 2 / 4  # ab ba ab ab
        assert distinct_n(sequences, 4) == 1.0
        assert distinct_n(sequences, 5) == distinct_n([[]], 1) == 0.0

    @given(sets, st.integers(1, 3))
    def test_saying_it_twice_halves_it(self, sequences, n):
        assert distinct_n(sequences + sequences, n) == pytest.approx(distinct_n(sequences, n) / 2)

    @pytest.mark.parametrize("function", [distinct_n, top_ngrams])
    def test_n_is_at_least_one(self, function):
        with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
            function([[1, 2]], 0)


class TestTopNgrams:
    def test_numbers(self):
        sequences = [[1, 2, 1, 2], [1, 2, 3], [2, 3], []]
        assert top_ngrams(sequences, 2) == [((1, 2), 0.5), ((2, 3), 0.5), ((2, 1), 0.25)]
        assert top_ngrams(sequences, 1, most=1) == [((2,), 0.75)]

    @given(sets, st.integers(1, 3))
    def test_equals_looking_for_each(self, sequences, n):
        def holds(sequence, ngram):
            return any(tuple(sequence[i : i + n]) == ngram for i in range(len(sequence)))

        found = top_ngrams(sequences, n, most=1000)
        assert all(share == sum(holds(s, ngram) for s in sequences) / len(sequences) for ngram, share in found)
        assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)
        assert {ngram for ngram, _ in found} == {tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)}


class TestRepeatedShare:
    def test_numbers(self):
        assert repeated_share([1, 2, 3], 1) == 0.0
        assert repeated_share([1, 2, 1, 2, 1], 2) == 0.5
        assert repeated_share([1], 2) == 0.0

    @given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 3))
    def test_is_what_distinct_n_leaves(self, sequence, n):
        if len(sequence) >= n:
            assert repeated_share(sequence, n) == pytest.approx(1 - distinct_n([sequence], n))


class TestSelfBleu:
    def test_equals_sacrebleu_on_words(self):
        texts = ["the film was a joy from start to end", "the film was dull from start to end", "no film was so long"]
        bleu = BLEU(effective_order=True, tokenize="none")
        expected = [bleu.sentence_score(texts[i], texts[:i] + texts[i + 1 :]).score / 100 for i in range(3)]
        assert self_bleu([text.split() for text in texts]) == pytest.approx(sum(expected) / 3, abs=1e-9)

    def test_the_same_and_the_entirely_different(self):
        assert self_bleu([[1, 2, 3, 4, 5]] * 3) == 1.0
        assert self_bleu([[1, 2, 3, 4], [5, 6, 7, 8]]) < 1e-6

    def test_tokens_with_blanks_are_one_token(self):
        assert self_bleu([["a b", "c"], ["a", "b c"]]) < 1e-6

    def test_a_large_set_is_sampled_by_seed(self):
        sequences = [[i % 7, (i * i) % 5, i % 3, i % 2, i] for i in range(60)]
        assert self_bleu(sequences, rows=10, seed=1) == self_bleu(sequences, rows=10, seed=1)
        assert len({self_bleu(sequences, rows=10, seed=seed) for seed in range(5)}) > 1

    def test_one_completion_is_refused(self):
        with pytest.raises(ValueError, match="got 1. Give at least two"):
            self_bleu([[1, 2]])
