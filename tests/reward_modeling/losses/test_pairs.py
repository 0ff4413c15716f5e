"""Losses of pairs against hand-computed numbers, float64 loops, finite differences and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from rlhf_recipes.models.readout import read_scores
from rlhf_recipes.reward_modeling.losses.pairs import log_preference, pairwise_loss, scaled_pairwise_loss

fuzz = settings(max_examples=25)
SCORES = st.floats(-20, 20)
SHARES = st.floats(0, 1)
PAIRS = st.lists(st.tuples(SCORES, SCORES, SHARES, st.floats(0, 3)), min_size=1, max_size=8)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def columns(rows):
    return torch.tensor(rows, dtype=torch.float64).T


def probability(difference, noise):
    return (1 - noise) / (1 + math.exp(-difference)) + noise / 2


class TestLogPreference:
    def test_numbers(self):
        """C27 and C30."""
        one = column(1.0)
        assert_close(log_preference(one).exp(), column(0.731059), rtol=0, atol=1e-6)
        assert_close(log_preference(one, noise=0.1).exp(), column(0.707953), rtol=0, atol=1e-6)
        far = column(1e4, -1e4)
        assert_close(-log_preference(far, noise=0.1), column(0.051293, 2.995732), rtol=0, atol=1e-6)

    @given(SCORES, st.floats(0, 0.99))
    @fuzz
    def test_equals_the_formula(self, difference, noise):
        expected = math.log(probability(difference, noise))
        assert_close(log_preference(column(difference), noise), column(expected), rtol=1e-9, atol=1e-12)

    @given(SCORES, st.floats(0, 0.99))
    @fuzz
    def test_both_sides_add_up_to_1(self, difference, noise):
        both = log_preference(column(difference, -difference), noise).exp().sum()
        assert_close(both, column(1.0)[0], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("noise", [0.0, 0.1])
    def test_extreme_scores_have_finite_gradients(self, noise):
        difference = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], requires_grad=True)
        log_preference(difference, noise).sum().backward()
        assert difference.grad.isfinite().all()

    @pytest.mark.parametrize("noise", [-0.1, 1.0, math.nan])
    def test_noise_out_of_range_is_refused(self, noise):
        with pytest.raises(ValueError, match="`noise` .* must lie in \\[0, 1\\)"):
            log_preference(column(1.0), noise)


class TestPairwiseLoss:
    def test_numbers(self):
        """C27: sums of 2 and 1; hard labels, ties, and equal sums."""
        chosen, rejected = column(2.0), column(1.0)
        for label, loss in ((1.0, 0.313262), (0.0, 1.313262), (0.5, 0.813262), (0.7, 0.613262)):
            assert_close(pairwise_loss(chosen, rejected, label).item(), loss, rtol=0, atol=1e-6)
            assert_close(pairwise_loss(chosen, chosen, label).item(), 0.693147, rtol=0, atol=1e-6)
        assert_close(pairwise_loss(column(2.0, 0.0), column(1.0, 0.0)).item(), 0.503205, rtol=0, atol=1e-6)

    def test_noise_numbers(self):
        """C30."""
        assert_close(pairwise_loss(column(1.0), column(0.0), noise=0.1).item(), 0.345378, rtol=0, atol=1e-6)
        assert_close(pairwise_loss(column(0.0), column(1e4), noise=0.1).item(), 2.995732, rtol=0, atol=1e-6)

    def test_margin_numbers(self):
        """C32, and the same of whichever side wins."""
        chosen, rejected = column(1.0), column(0.0)
        expected = {0.0: 0.31326, 1 / 3: 0.41437, 2 / 3: 0.54031, 1.0: 0.69315, 3.0: 2.12693}
        for margin, loss in expected.items():
            assert_close(pairwise_loss(chosen, rejected, margin=margin).item(), loss, rtol=0, atol=5e-6)
            assert_close(pairwise_loss(rejected, chosen, 0.0, margin).item(), loss, rtol=0, atol=5e-6)

    @given(PAIRS, st.floats(0, 0.5))
    @fuzz
    def test_equals_loops(self, rows, noise):
        chosen, rejected, label, margin = columns(rows)
        expected = [
            -y * math.log(probability(c - r - m, noise)) - (1 - y) * math.log(probability(r - c - m, noise))
            for c, r, y, m in rows
        ]
        got = pairwise_loss(chosen, rejected, label, margin, noise).item()
        assert got == pytest.approx(sum(expected) / len(rows), rel=1e-9, abs=1e-12)

    @given(PAIRS, st.floats(0, 0.5))
    @fuzz
    def test_naming_the_sides_the_other_way_round_changes_nothing(self, rows, noise):
        chosen, rejected, label, margin = columns(rows)
        loss = pairwise_loss(chosen, rejected, label, margin, noise)
        assert_close(pairwise_loss(rejected, chosen, 1 - label, margin, noise), loss, rtol=1e-12, atol=1e-12)

    @given(PAIRS, st.floats(-5, 5))
    @fuzz
    def test_a_constant_on_both_sides_changes_nothing(self, rows, shift):
        """C29."""
        chosen, rejected, label, margin = columns(rows)
        loss = pairwise_loss(chosen, rejected, label, margin)
        assert_close(pairwise_loss(chosen + shift, rejected + shift, label, margin), loss, rtol=1e-9, atol=1e-9)

    def test_a_constant_per_token_counts_for_the_longer_segment(self):
        """C29: sums of segments of different lengths."""
        rewards = torch.tensor([[0.5, 1.0, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
        for lengths, changed in (((3, 3), False), ((3, 1), True)):
            mask = torch.arange(3) < torch.tensor(lengths)[:, None]
            before, after = (read_scores(rewards + shift, mask, "sum").split(1) for shift in (0.0, 0.5))
            assert_close(pairwise_loss(*before).item(), 0.313262, rtol=0, atol=1e-6)
            assert (pairwise_loss(*after) != pairwise_loss(*before)).item() is changed

    @given(SCORES, SCORES)
    @fuzz
    def test_hard_and_soft_labels_agree(self, left, right):
        """C28: a soft label mixes the two hard ones."""
        sides = column(left), column(right)
        hard, other = (pairwise_loss(*sides, label=label).item() for label in (1.0, 0.0))
        assert hard == pytest.approx(pairwise_loss(*sides).item(), abs=1e-12)
        assert pairwise_loss(*sides, label=0.3).item() == pytest.approx(0.3 * hard + 0.7 * other, rel=1e-9)

    @pytest.mark.parametrize("margin", [0.0, 0.5])
    def test_a_tie_is_fitted_best_by_equal_scores(self, margin):
        """C28."""
        scores = torch.tensor([[3.0], [-1.0]], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([scores], lr=1.0)
        for _ in range(500):
            optimizer.zero_grad()
            pairwise_loss(*scores, label=0.5, margin=margin).backward()
            optimizer.step()
        assert_close(scores[0].item(), scores[1].item(), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("noise", [0.0, 0.1])
    def test_gradcheck(self, noise):
        chosen, rejected = column(0.3, -2.0, 1.0).requires_grad_(), column(0.1, 2.0, 1.0).requires_grad_()
        label, margin = column(1.0, 0.2, 0.5), column(0.5, 0.0, 0.1)
        assert gradcheck(lambda *sides: pairwise_loss(*sides, label, margin, noise), (chosen, rejected))

    def test_the_gradient_is_the_error_of_the_probability(self):
        chosen = column(2.0, 1.0).requires_grad_()
        pairwise_loss(chosen, column(1.0, 1.0), label=column(1.0, 0.5)).backward()
        assert_close(chosen.grad, column(0.731059 - 1.0, 0.0) / 2, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "given", [{"rejected": torch.zeros(2, 1)}, {"label": torch.zeros(3)}, {"margin": torch.zeros(1)}]
    )
    def test_shapes_that_would_be_broadcast_are_refused(self, given):
        sides = {"chosen": torch.zeros(2), "rejected": torch.zeros(2)}
        with pytest.raises(ValueError, match="one number each, got the shapes"):
            pairwise_loss(**(sides | given))

    @pytest.mark.parametrize("label", [1.5, -0.1, math.nan])
    def test_labels_that_are_no_probability_are_refused(self, label):
        with pytest.raises(ValueError, match="must lie in \\[0, 1\\], got"):
            pairwise_loss(column(1.0, 2.0), column(0.0, 0.0), label=column(0.5, label))


class TestScaledPairwiseLoss:
    def test_numbers(self):
        chosen, rejected, strength = column(2.0, 1.0), column(1.0, 1.0), column(3.0, 1.0)
        expected = (3 * 0.313262 + 0.693147) / 2
        assert_close(scaled_pairwise_loss(chosen, rejected, strength).item(), expected, rtol=0, atol=1e-6)
        ties = (3 * 0.813262 + 0.693147) / 2
        assert_close(scaled_pairwise_loss(chosen, rejected, strength, 0.5).item(), ties, rtol=0, atol=1e-6)

    @given(PAIRS)
    @fuzz
    def test_equals_repeating_the_pairs(self, rows):
        """A strength of 2 is as good as having the pair twice."""
        chosen, rejected, label, _ = columns(rows)
        strength = torch.arange(len(rows)) % 3
        again = [tensor.repeat_interleave(strength) for tensor in (chosen, rejected, label)]
        expected = pairwise_loss(*again) * strength.sum() / len(rows) if strength.any() else torch.zeros(())
        got = scaled_pairwise_loss(chosen, rejected, strength, label)
        assert got.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)

    def test_bad_strengths_are_refused(self):
        with pytest.raises(ValueError, match="must not be negative, got -1.0"):
            scaled_pairwise_loss(column(1.0), column(0.0), column(-1.0))
        with pytest.raises(ValueError, match="one strength per pair"):
            scaled_pairwise_loss(column(1.0, 2.0), column(0.0, 0.0), column(1.0))
