"""Means, moments and shares against hand-computed numbers, float64 brute force and properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.ppo.functional.statistics import (
    aggregate,
    explained_variance,
    masked_mean,
    masked_moments,
    whiten,
)
from tests.ppo.functional.helpers import SEEDS, fuzz, random_batch

# Losses of 5 and of 10 tokens.
LOSSES = torch.tensor([[1.0, 1, 1, 1, 10, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 10]])
MASK = torch.tensor([[1] * 5 + [0] * 5, [1] * 10])


def test_masked_mean_weighs_every_token_alike():
    # The mean over tokens is 33 / 15, not the mean 2.35 of the means of the rows.
    assert_close(masked_mean(LOSSES, MASK), torch.tensor(2.2))


def test_a_mask_of_low_precision_counts_exactly():
    values, mask = torch.ones(1, 1001), torch.ones(1, 1001, dtype=torch.bfloat16)
    assert masked_mean(values, mask) == 1
    assert masked_moments(values, mask)[2] == 1001
    assert aggregate(values, mask, "sequence") == 1


class TestAggregate:
    def test_numbers(self):
        expected = {"token": 2.2, "sequence": 2.35, "fixed": 1.65}  # the last from 1.4 and 1.9
        for how, mean in expected.items():
            assert_close(aggregate(LOSSES, MASK, how, length=10), torch.tensor(mean))
        for b, term in enumerate([1.4, 1.9]):
            assert_close(aggregate(LOSSES[b : b + 1], MASK[b : b + 1], "fixed", length=10), torch.tensor(term))
        assert_close(aggregate(LOSSES, MASK), torch.tensor(2.2))

    def test_sequences_without_tokens(self):
        losses = torch.cat([LOSSES, torch.full((2, 10), math.nan)])
        mask = torch.cat([MASK, torch.zeros(2, 10)])
        for how, mean in {"token": 2.2, "sequence": 2.35, "fixed": 1.65 / 2}.items():
            assert_close(aggregate(losses, mask, how, length=10), torch.tensor(mean))

    @given(seed=SEEDS, length=st.integers(1, 20))
    @fuzz
    def test_equals_loops(self, seed, length):
        losses, mask = random_batch(seed, 1, holes=0.3)
        rows = [
            [loss for loss, one in zip(*pair, strict=True) if one] for pair in zip(losses.tolist(), mask, strict=True)
        ]
        tokens = [loss for kept in rows for loss in kept]
        means = [sum(kept) / len(kept) for kept in rows if kept]
        expected = {
            "token": sum(tokens) / len(tokens) if tokens else 0.0,
            "sequence": sum(means) / len(means) if means else 0.0,
            "fixed": sum(sum(kept) / length for kept in rows) / len(rows),
        }
        for how, mean in expected.items():
            got = aggregate(losses, mask, how, length)
            assert_close(got.item(), mean, rtol=1e-12, atol=1e-12)

    def test_options_that_do_not_exist_are_refused(self):
        with pytest.raises(ValueError, match="`how` must be 'token', 'sequence' or 'fixed', got 'mean'"):
            aggregate(LOSSES, MASK, "mean")
        for length in (None, 0, -1):
            with pytest.raises(ValueError, match=f"'fixed' divides by `length`, which must be positive, got {length}"):
                aggregate(LOSSES, MASK, "fixed", length)


class TestWhiten:
    rows = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)

    def test_numbers(self):
        around_mean = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
        expected = torch.tensor(around_mean, dtype=torch.float64)
        ones = torch.ones(3, 3)
        assert_close(whiten(self.rows, ones, center=False), expected, rtol=0, atol=5e-5)
        assert_close(whiten(self.rows, ones), expected - 1.6, rtol=0, atol=5e-5)

    @given(seed=SEEDS)
    @fuzz
    def test_has_mean_0_and_population_variance_1(self, seed):
        values, mask = random_batch(seed, 1)
        counted = whiten(10 + 3 * values, mask)[mask.bool()]
        if counted.numel() > 1:
            assert_close(counted.mean(), counted.new_zeros(()), rtol=0, atol=1e-9)
            assert_close(counted.var(unbiased=False), counted.new_ones(()), rtol=0, atol=1e-6)

    @given(seed=SEEDS)
    @fuzz
    def test_keeps_the_mean_where_asked(self, seed):
        values, mask = random_batch(seed, 1)
        if mask.any():
            kept = mask.bool()
            assert_close(whiten(values, mask, center=False)[kept].mean(), values[kept].mean(), rtol=1e-9, atol=1e-9)

    def test_a_large_mean_does_not_drown_a_small_variance(self):
        values = torch.tensor([[4096.0, 4096.0 + 2**-11]])  # exact in float32; their mean and squares are not
        expected = 2**-12 / math.sqrt(2**-24 + 1e-8)
        assert_close(whiten(values, torch.ones(1, 2)), torch.tensor([[-expected, expected]]))

    def test_unbiased_numbers(self):
        """Of 1, 2, 3, 4 the sample's variance is 5/3; what is masked is not counted among the n."""
        values, mask = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
        scale = math.sqrt(3 / 5)
        expected = torch.tensor([[-1.5, -0.5, 0.0], [0.5, 1.5, 0.0]]) * scale
        assert_close(whiten(values, mask, unbiased=True), expected, rtol=0, atol=1e-6)
        around_mean = (expected + 2.5).masked_fill(mask == 0, 0.0)
        assert_close(whiten(values, mask, center=False, unbiased=True), around_mean, rtol=0, atol=1e-6)

    @given(seed=SEEDS)
    @fuzz
    def test_unbiased_has_the_sample_variance_1_in_parts_too(self, seed):
        values, mask = random_batch(seed, 1)
        values = 10 + 3 * values
        moments = [sum(each) for each in zip(*(masked_moments(values[i::2], mask[i::2]) for i in (0, 1)), strict=True)]
        whole = whiten(values, mask, unbiased=True)
        assert_close(whiten(values[::2], mask[::2], moments=tuple(moments), unbiased=True), whole[::2])
        counted = whole[mask.bool()]
        if counted.numel() > 1:
            assert_close(counted.var(), counted.new_ones(()), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("unbiased", [False, True])
    def test_constants_become_zero(self, unbiased):
        for shape in [(3, 50), (1, 1)]:
            found = whiten(torch.full(shape, 0.1), torch.ones(shape), unbiased=unbiased)
            assert_close(found, torch.zeros(shape))
        assert_close(whiten(torch.ones(1, 3), torch.zeros(1, 3), unbiased=unbiased), torch.zeros(1, 3))

    def test_rounding_never_makes_a_negative_variance(self):
        values, ones = torch.full((1, 1000), 3e7 / 7), torch.ones(1, 1000)  # E[x^2] - E[x]^2 is -0.004
        assert whiten(values, ones).isfinite().all()

    def test_a_part_of_a_batch_is_checked_too(self):
        with pytest.raises(ValueError, match="`values` has shape"):
            whiten(torch.zeros(2, 1), torch.ones(2, 3), moments=torch.ones(3))


def test_masked_moments_are_sums():
    moments = masked_moments(torch.tensor([[1.0, -3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [1, 0]]))
    assert_close(moments, tuple(torch.tensor([3.0, 35.0, 3.0], dtype=torch.float64)))


class TestExplainedVariance:
    @given(seed=SEEDS, offset=st.floats(-5, 5))
    @fuzz
    def test_equals_the_ratio_of_variances(self, seed, offset):
        values, returns, mask = random_batch(seed, 2)
        got, counted = explained_variance(values + offset, returns, mask), mask.bool()
        if mask.sum() > 1:
            errors = (returns - values)[counted]
            expected = 1 - errors.var(unbiased=False) / returns[counted].var(unbiased=False)
            assert_close(got, expected, rtol=1e-6, atol=1e-6)

    def test_scale(self):
        returns, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3)
        critics = [returns, returns + 3, torch.ones(1, 3), -returns]
        assert_close(
            torch.stack([explained_variance(critic, returns, mask) for critic in critics]),
            torch.tensor([1.0, 1.0, 0.0, -3.0]),
        )

    def test_returns_around_0(self):
        returns = torch.tensor([[-1.0, 0.0, 1.0]])
        assert_close(explained_variance(returns / 2, returns, torch.ones(1, 3)), torch.tensor(0.75))

    def test_constant_returns_have_nothing_to_explain(self):
        values = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
        for constant in (0.1, 1000.1, 0.0):
            returns = torch.full((2, 500), constant)  # the sum of their squares is rounded
            assert explained_variance(values, returns, torch.ones(2, 500)) == 0

    def test_an_error_names_the_tensor(self):
        with pytest.raises(ValueError, match="`returns` has shape"):
            explained_variance(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3))
