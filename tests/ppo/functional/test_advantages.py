"""Advantages and returns against hand-computed numbers, equations in float64, torchrl and properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate,
    vec_generalized_advantage_estimate,
)

from rlhf_recipes.ppo.functional.advantages import (
    bandit_advantages,
    discounted_returns,
    estimate_advantages,
    first_token_mask,
    gae,
    length_adaptive_lambda,
)
from rlhf_recipes.shaping import place_every_token, place_terminal, place_uniform
from tests.ppo.functional.helpers import SEEDS, fuzz, random_batch, row

SHARES = st.floats(0, 1)


def equation_16(rewards, values, mask, gamma, lams):
    """GAE as the paper writes it, on the counted tokens of each row."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b, lam in enumerate(lams):
        kept = mask[b].nonzero().flatten().tolist()
        r, v = rewards[b, kept].tolist(), [*values[b, kept].tolist(), 0.0]
        deltas = [-v[t] + r[t] + gamma * v[t + 1] for t in range(len(r))]
        for t, place in enumerate(kept):
            advantages[b, place] = sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[t:]))
            returns[b, place] = advantages[b, place] + v[t]
    return advantages, returns


class TestGae:
    def test_numbers(self):
        rewards, values = row(0, 0, 0.8), row(0.1, 0.2, 0.3)
        expected = {0.95: row(0.64625, 0.575, 0.5), 1.0: row(0.7, 0.6, 0.5), 0.0: row(0.1, 0.1, 0.5)}
        for lam, advantages in expected.items():
            got = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=lam)
            assert_close(got, (advantages, advantages + values))

    def test_discount_numbers(self):
        advantages, _ = gae(row(0.8 / 3, 0.8 / 3, 0.8 / 3), row(0.1, 0.2, 0.3), torch.ones(1, 3), gamma=0.9, lam=0.0)
        assert_close(advantages, row(0.34667, 0.33667, -0.03333), rtol=0, atol=1e-5)

    @given(seed=SEEDS, gamma=SHARES, lam=SHARES)
    @fuzz
    def test_equals_equation_16(self, seed, gamma, lam):
        rewards, values, mask = random_batch(seed, 2, holes=0.2)
        expected = equation_16(rewards, values, mask, gamma, [lam] * len(mask))
        assert_close(gae(rewards, values, mask, gamma, lam), expected, rtol=1e-12, atol=1e-12)

    @given(seed=SEEDS, gamma=SHARES)
    @fuzz
    def test_every_sequence_may_have_its_own_lambda(self, seed, gamma):
        rewards, values, mask = random_batch(seed, 2, holes=0.2)
        lams = torch.rand(len(mask), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = equation_16(rewards, values, mask, gamma, lams.tolist())
        assert_close(gae(rewards, values, mask, gamma, lams), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("oracle", [generalized_advantage_estimate, vec_generalized_advantage_estimate])
    @given(seed=SEEDS, gamma=st.floats(0.5, 1), lam=st.floats(0.5, 1))
    @fuzz
    def test_equals_torchrl(self, oracle, seed, gamma, lam):
        # torchrl's vectorised form drops weights below 1e-7, which are none here. As tensors its weights are float64.
        weights = torch.tensor([gamma, lam], dtype=torch.float64)
        rewards, values, mask = random_batch(seed, 2)
        expected = torch.zeros_like(values), torch.zeros_like(values)
        for b, length in enumerate(mask.sum(1).tolist()):
            if length:
                value = values[b, :length, None]
                next_value = torch.cat([value[1:], torch.full((1, 1), 7.0)])  # after the end: not to be used
                done = torch.arange(length)[:, None] == length - 1
                results = oracle(*weights, value, next_value, rewards[b, :length, None], done)
                for part, result in zip(expected, results, strict=True):
                    part[b, :length] = result[:, 0]
        assert_close(gae(rewards, values, mask, gamma, lam), expected, rtol=1e-8, atol=1e-8)

    @given(seed=SEEDS, gamma=SHARES)
    @fuzz
    def test_lambda_0_is_the_td_error_and_lambda_1_the_monte_carlo_return(self, seed, gamma):
        rewards, values, mask = random_batch(seed, 2)
        after = torch.cat([(values * mask)[:, 1:], torch.zeros(len(mask), 1)], dim=1)
        td_errors = (rewards + gamma * after - values) * mask
        assert_close(gae(rewards, values, mask, gamma, 0.0)[0], td_errors, rtol=1e-12, atol=1e-12)
        _, returns = gae(rewards, values, mask, gamma, 1.0)
        assert_close(returns, discounted_returns(rewards, mask, gamma), rtol=1e-9, atol=1e-9)

    def test_a_lambda_for_each_sequence_is_as_precise_as_one_for_all(self):
        rewards, values = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
        lams = torch.full((3,), 0.95, dtype=torch.float64)
        expected = gae(rewards, values, torch.ones(3, 50), 1.0, 0.95)
        assert_close(gae(rewards, values, torch.ones(3, 50), 1.0, lams), expected, rtol=0, atol=0)

    def test_lambdas_that_would_broadcast_are_refused(self):
        for wrong in [(2, 1), (2, 3), (3,), (1,), ()]:
            with pytest.raises(ValueError, match="one `lam` per sequence") as error:
                gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), 1.0, torch.ones(wrong))
            assert str(error.value) == (
                f"`lam` has shape {wrong}, but `mask` has shape (2, 3). Give one `lam` per sequence, shape (B,)."
            )

    def test_a_perfect_critic_leaves_no_advantage(self):
        rewards = row(0.1, -0.4, 0.8)
        values = row(0.1 - 0.9 * 0.4 + 0.81 * 0.8, -0.4 + 0.9 * 0.8, 0.8)
        advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.7)
        assert_close(advantages, torch.zeros_like(values))
        assert_close(returns, values)

    def test_results_are_constants(self):
        rewards, values = (row(1, 2).requires_grad_() for _ in range(2))
        for lam in (1.0, torch.ones(1, dtype=torch.float64, requires_grad=True)):
            assert not any(result.requires_grad for result in gae(rewards, values, torch.ones(1, 2), 1.0, lam))


class TestDiscountedReturns:
    def test_numbers(self):
        expected = {1.0: row(2.4, 1.6, 0.8), 0.9: row(2.168, 1.52, 0.8), 0.99: row(2.37608, 1.592, 0.8)}
        for gamma, returns in expected.items():
            assert_close(discounted_returns(row(0.8, 0.8, 0.8), torch.ones(1, 3), gamma), returns)

    def test_a_score_on_every_token_counts_as_often_as_there_are_tokens(self):
        # R_t = sum_{k=t}^{T} gamma^(k-t) r: what a policy earns that is paid the whole score at every token. It is T
        # times the return where the score is spread.
        score = torch.tensor([0.8], dtype=torch.float64)
        for length, gamma in [(1, 0.9), (3, 1.0), (7, 0.95)]:
            mask = torch.ones(1, length)
            returns = discounted_returns(place_every_token(score, mask), mask, gamma)
            formula = [[0.8 * sum(gamma**k for k in range(length - t)) for t in range(length)]]
            assert_close(returns, torch.tensor(formula, dtype=torch.float64))
            assert_close(returns, length * discounted_returns(place_uniform(score, mask), mask, gamma))

    @given(seed=SEEDS, gamma=st.floats(0, 1))
    @fuzz
    def test_equals_the_sum(self, seed, gamma):
        rewards, mask = random_batch(seed, 1)
        expected = torch.zeros_like(rewards)
        for b, length in enumerate(mask.sum(1).tolist()):
            for t in range(length):
                expected[b, t] = sum(gamma ** (k - t) * rewards[b, k].item() for k in range(t, length))
        assert_close(discounted_returns(rewards, mask, gamma), expected, rtol=1e-12, atol=1e-12)


class TestLengthAdaptiveLambda:
    def test_numbers(self):
        lengths = torch.tensor([1000, 100, 40, 20, 19, 1, 0])
        mask = torch.arange(1000) < lengths[:, None]
        expected = torch.tensor([0.98, 0.8, 0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        assert_close(length_adaptive_lambda(mask, alpha=0.05), expected)
        assert_close(length_adaptive_lambda(mask.flip(1), alpha=0.05), expected)

    @given(length=st.integers(1, 300), alpha=st.floats(0.01, 1))
    @fuzz
    def test_weights_sum_up_to_that_share_of_the_length(self, length, alpha):
        (lam,) = length_adaptive_lambda(torch.ones(1, length), alpha).tolist()
        assert 0 <= lam < 1
        if alpha * length > 1:
            weights = [lam**step for step in range(100 * length)]
            assert_close(math.fsum(weights), alpha * length, rtol=1e-6, atol=0)

    def test_a_mask_of_low_precision_counts_exactly(self):
        mask = torch.ones(1, 1001, dtype=torch.bfloat16)
        assert_close(length_adaptive_lambda(mask, 1.0).item(), 1 - 1 / 1001, rtol=0, atol=1e-12)

    def test_gae_takes_it(self):
        rewards, values, mask = torch.zeros(2, 40), torch.zeros(2, 40), torch.ones(2, 40)
        rewards[:, -1], mask[1, :20] = 1.0, 0
        advantages, _ = gae(rewards, values, mask, 1.0, length_adaptive_lambda(mask, 0.05))
        assert_close(advantages[0, -3:], torch.tensor([0.25, 0.5, 1.0]))
        assert_close(advantages[1, -3:], torch.tensor([0.0, 0.0, 1.0]))


class TestBanditAdvantages:
    def test_numbers(self):
        scores, values = (
            torch.tensor([0.8, -2.0, 3.0]),
            torch.tensor([[0.3, 9.0, 9.0], [9.0, 0.5, 9.0], [9.0, 9.0, 9.0]]),
        )
        mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
        advantages, returns = bandit_advantages(scores, values, mask)
        assert_close(advantages, torch.tensor([[0.5, 0.5, 0.0], [0.0, -2.5, -2.5], [0.0, 0.0, 0.0]]))
        assert_close(returns, torch.tensor([[0.8, 0.8, 0.0], [0.0, -2.0, -2.0], [0.0, 0.0, 0.0]]))

    @given(seed=SEEDS)
    @fuzz
    def test_equals_gae_from_the_first_token_to_the_end(self, seed):
        # With nothing cut or discounted, GAE at the first token is the score minus the value there.
        values, noise, mask = random_batch(seed, 2, holes=0.2)
        scores = noise[:, 0]
        advantages, returns = bandit_advantages(scores, values, mask)
        expected, _ = gae(place_terminal(scores, mask), values, mask, 1.0, 1.0)
        first = first_token_mask(mask).bool()
        assert_close(advantages[first], expected[first], rtol=1e-9, atol=1e-9)
        assert_close(returns, torch.where(mask.bool(), scores[:, None], 0.0), rtol=0, atol=0)
        for b, kept in enumerate(mask.bool()):
            assert advantages[b][kept].unique().numel() <= 1

    def test_the_score_of_a_sequence_without_tokens_never_counts(self):
        results = bandit_advantages(torch.tensor([math.nan]), torch.ones(1, 2), torch.zeros(1, 2))
        assert_close(results, (torch.zeros(1, 2), torch.zeros(1, 2)))

    def test_results_are_constants(self):
        scores, values = torch.ones(1, requires_grad=True), torch.ones(1, 2, requires_grad=True)
        assert not any(result.requires_grad for result in bandit_advantages(scores, values, torch.ones(1, 2)))

    @pytest.mark.parametrize("wrong", [(2, 1), (3,), (), (2, 3)])
    def test_scores_that_would_broadcast_are_refused(self, wrong):
        with pytest.raises(ValueError, match="Give one `scores` per sequence"):
            bandit_advantages(torch.ones(wrong), torch.ones(2, 3), torch.ones(2, 3))


class TestFirstTokenMask:
    def test_numbers(self):
        mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 0, 1]])
        expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]])
        for kind in (torch.long, torch.bool, torch.float32, torch.bfloat16):
            assert_close(first_token_mask(mask.to(kind)), expected.to(kind))

    def test_a_mask_of_low_precision_counts_exactly(self):
        mask = torch.ones(1, 1001, dtype=torch.bfloat16)
        assert first_token_mask(mask).sum() == 1


def test_estimators_by_name():
    rewards, values = torch.tensor([[0.0, 2.0, 9.0]]), torch.tensor([[0.5, 1.0, 9.0]])
    mask = torch.tensor([[1, 1, 0]])
    advantages, returns, learned = estimate_advantages("bandit", rewards * mask, values, mask)
    assert (advantages.tolist(), returns.tolist()) == ([[1.5, 1.5, 0.0]], [[2.0, 2.0, 0.0]])
    assert learned.tolist() == [[1, 0, 0]]
    advantages, returns, learned = estimate_advantages("gae", rewards, values, mask, gamma=0.5, lam=0.0)
    assert (advantages.tolist(), returns.tolist()) == ([[0.0, 1.0, 0.0]], [[0.5, 2.0, 0.0]])
    assert torch.equal(learned, mask)
    same, other, _ = estimate_advantages("gae", rewards, values, mask, gamma=0.5, lam=0.0, critic_lam=1.0)
    assert torch.equal(same, advantages)
    assert other.tolist() == [[1.0, 2.0, 0.0]], "the critic's targets are Monte-Carlo returns"
