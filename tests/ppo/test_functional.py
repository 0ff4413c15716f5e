"""The maths of PPO against hand-computed numbers, float64 brute force and properties."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import pad
from torch.testing import assert_close

from rlhf_recipes.ppo.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    discounted_returns,
    entropy,
    explained_variance,
    gae,
    masked_mean,
    masked_moments,
    whiten,
)

SEEDS = st.integers(0, 2**32 - 1)
fuzz = settings(max_examples=25)

# The function under each name takes one to three tensors of shape (B, T) and their mask.
MASKED = {
    "masked_mean": (1, masked_mean),
    "masked_moments": (1, masked_moments),
    "whiten": (1, whiten),
    "whiten around the mean": (1, lambda values, mask: whiten(values, mask, center=False)),
    "gae": (2, lambda rewards, values, mask: gae(rewards, values, mask, 0.9, 0.8)),
    "discounted_returns": (1, lambda rewards, mask: discounted_returns(rewards, mask, 0.9)),
    "clipped_policy_loss": (3, lambda *tensors: clipped_policy_loss(*tensors, 0.2, 0.3)),
    "clipped_value_loss": (3, lambda *tensors: clipped_value_loss(*tensors, 0.5)),
    "clipped_value_loss without clip": (3, lambda *tensors: clipped_value_loss(*tensors, None)),
    "explained_variance": (2, explained_variance),
}
masked = pytest.mark.parametrize(("count", "function"), MASKED.values(), ids=MASKED)


def random_batch(seed: int, count: int):
    """Tensors of one random shape (B, T) in float64 and a right-padded mask; some rows may be all padding."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(2))
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    tensors = torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)
    return *tensors, (torch.arange(columns) < lengths).long()


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def results_and_gradients(function, tensors, mask):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    results = function(*tensors, mask)
    results = results if isinstance(results, tuple) else (results,)
    for result in results:
        if result.requires_grad:
            result.square().sum().backward(retain_graph=True)
    return [result.detach() for result in results], [tensor.grad for tensor in tensors if tensor.grad is not None]


class TestPadding:
    @masked
    @pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf, 1e300])
    @given(seed=SEEDS)
    @settings(max_examples=10)
    def test_its_content_never_counts(self, count, function, content, seed):
        *tensors, mask = random_batch(seed, count)
        dirty = [tensor.masked_fill(mask == 0, content) for tensor in tensors]
        clean = [tensor.masked_fill(mask == 0, 0.0) for tensor in tensors]
        expected = results_and_gradients(function, clean, mask)
        assert_close(results_and_gradients(function, dirty, mask), expected, rtol=0, atol=0)

    @masked
    @pytest.mark.parametrize("sides", [(0, 3), (2, 0)], ids=["right", "left"])
    @given(seed=SEEDS)
    @settings(max_examples=10)
    def test_its_amount_and_side_never_count(self, count, function, sides, seed):
        *tensors, mask = random_batch(seed, count)
        results, gradients = results_and_gradients(function, tensors, mask)
        expected = [pad(result, sides) if result.dim() else result for result in results]
        padded = [pad(tensor, sides, value=5.0) for tensor in tensors]
        got = results_and_gradients(function, padded, pad(mask, sides))
        assert_close(got, (expected, [pad(gradient, sides) for gradient in gradients]), rtol=1e-12, atol=1e-12)

    @masked
    @pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
    def test_any_type_of_mask_will_do(self, count, function, kind):
        *tensors, mask = random_batch(3, count)
        expected = results_and_gradients(function, tensors, mask)
        assert_close(results_and_gradients(function, tensors, mask.to(kind)), expected)

    @masked
    def test_nothing_else_gives_zeros(self, count, function):
        tensors = [torch.full((2, 3), math.nan)] * count
        results, _ = results_and_gradients(function, tensors, torch.zeros(2, 3))
        for result in results:
            assert_close(result, torch.zeros_like(result))

    @masked
    def test_shapes_that_would_broadcast_are_refused(self, count, function):
        for wrong in range(count):
            tensors = [torch.zeros(2, 1 if index == wrong else 3) for index in range(count)]
            with pytest.raises(ValueError, match=r"has shape \(2, 1\), but `mask` has shape \(2, 3\)"):
                function(*tensors, torch.ones(2, 3))


def test_masked_mean_weighs_every_token_alike():
    # Losses of 5 and 10 tokens: the mean over tokens is 33 / 15, not the mean 2.35 of the means of the rows.
    losses = torch.tensor([[1.0, 1, 1, 1, 10, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 10]])
    mask = torch.tensor([[1] * 5 + [0] * 5, [1] * 10])
    assert_close(masked_mean(losses, mask), torch.tensor(2.2))


def test_a_mask_of_low_precision_counts_exactly():
    values, mask = torch.ones(1, 1001), torch.ones(1, 1001, dtype=torch.bfloat16)
    assert masked_mean(values, mask) == 1
    assert masked_moments(values, mask)[2] == 1001


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
    def test_parts_with_summed_moments_equal_the_whole(self, seed):
        values, mask = random_batch(seed, 1)
        parts = [masked_moments(values[index::2], mask[index::2]) for index in range(2)]
        moments = torch.stack([torch.stack(part) for part in parts]).sum(0)
        whole = whiten(values, mask)
        for index in range(2):
            part = whiten(values[index::2], mask[index::2], moments=moments)
            assert_close(part, whole[index::2], rtol=1e-9, atol=1e-9)

    def test_a_large_mean_does_not_drown_a_small_variance(self):
        values = torch.tensor([[4096.0, 4096.0 + 2**-11]])  # exact in float32; their mean and squares are not
        expected = 2**-12 / math.sqrt(2**-24 + 1e-8)
        assert_close(whiten(values, torch.ones(1, 2)), torch.tensor([[-expected, expected]]))

    def test_constants_become_zero(self):
        for shape in [(3, 50), (1, 1)]:
            assert_close(whiten(torch.full(shape, 0.1), torch.ones(shape)), torch.zeros(shape))

    def test_a_part_of_a_batch_is_checked_too(self):
        with pytest.raises(ValueError, match="`values` has shape"):
            whiten(torch.zeros(2, 1), torch.ones(2, 3), moments=torch.ones(3))


def test_masked_moments_are_sums():
    moments = masked_moments(torch.tensor([[1.0, -3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [1, 0]]))
    assert_close(moments, tuple(torch.tensor([3.0, 35.0, 3.0], dtype=torch.float64)))


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

    @given(seed=SEEDS, gamma=st.floats(0, 1), lam=st.floats(0, 1))
    @fuzz
    def test_equals_equation_16(self, seed, gamma, lam):
        rewards, values, mask = random_batch(seed, 2)
        mask[torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = 0  # holes too
        advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
        for b in range(len(mask)):
            counted = mask[b].nonzero().flatten().tolist()
            r, v = rewards[b, counted].tolist(), [*values[b, counted].tolist(), 0.0]
            deltas = [-v[t] + r[t] + gamma * v[t + 1] for t in range(len(r))]
            for t, place in enumerate(counted):
                advantages[b, place] = sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[t:]))
                returns[b, place] = advantages[b, place] + v[t]
        assert_close(gae(rewards, values, mask, gamma, lam), (advantages, returns), rtol=1e-12, atol=1e-12)

    def test_a_perfect_critic_leaves_no_advantage(self):
        rewards = row(0.1, -0.4, 0.8)
        values = row(0.1 - 0.9 * 0.4 + 0.81 * 0.8, -0.4 + 0.9 * 0.8, 0.8)
        advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.7)
        assert_close(advantages, torch.zeros_like(values))
        assert_close(returns, values)

    def test_results_are_constants(self):
        rewards, values = (row(1, 2).requires_grad_() for _ in range(2))
        assert not any(result.requires_grad for result in gae(rewards, values, torch.ones(1, 2), 1.0, 1.0))


class TestDiscountedReturns:
    def test_numbers(self):
        expected = {1.0: row(2.4, 1.6, 0.8), 0.9: row(2.168, 1.52, 0.8), 0.99: row(2.37608, 1.592, 0.8)}
        for gamma, returns in expected.items():
            assert_close(discounted_returns(row(0.8, 0.8, 0.8), torch.ones(1, 3), gamma), returns)

    @given(seed=SEEDS, gamma=st.floats(0, 1))
    @fuzz
    def test_equals_the_sum(self, seed, gamma):
        rewards, mask = random_batch(seed, 1)
        expected = torch.zeros_like(rewards)
        for b, length in enumerate(mask.sum(1).tolist()):
            for t in range(length):
                expected[b, t] = sum(gamma ** (k - t) * rewards[b, k].item() for k in range(t, length))
        assert_close(discounted_returns(rewards, mask, gamma), expected, rtol=1e-12, atol=1e-12)


class TestClippedPolicyLoss:
    def test_numbers(self):
        ratios = row(0.5, 0.79, 1.21, 1.5, 0.5, 0.79, 1.21, 1.5)
        advantages = row(1, 1, 1, 1, -1, -1, -1, -1)
        objectives = row(0.5, 0.79, 1.2, 1.2, -0.8, -0.8, -1.21, -1.5)
        slopes = row(1, 1, 0, 0, 0, 0, -1, -1)  # of the objective by the ratio
        old_logps = torch.full_like(ratios, -3.0)
        logps = (old_logps + ratios.log()).requires_grad_()
        loss, clipped = clipped_policy_loss(logps, old_logps, advantages, torch.ones(1, 8), 0.2, 0.2)
        loss.backward()
        assert_close(loss, -objectives.mean())
        assert_close(logps.grad, -slopes * ratios / 8)
        assert_close(clipped.item(), 0.5)

    @given(seed=SEEDS, clip_low=st.floats(0, 0.9), clip_high=st.floats(0, 2))
    @fuzz
    def test_equals_the_form_with_g(self, seed, clip_low, clip_high):
        # min(ratio * A, g(A)) with g(A) = (1 + clip_high) A for A >= 0 and (1 - clip_low) A for A < 0
        logps, old_logps, advantages, mask = random_batch(seed, 3)
        plain = (logps.exp() / old_logps.exp() * advantages)[mask.bool()]
        bounds = ((1 + clip_high) * advantages.clamp(min=0) + (1 - clip_low) * advantages.clamp(max=0))[mask.bool()]
        loss, clipped = clipped_policy_loss(logps, old_logps, advantages, mask, clip_low, clip_high)
        if mask.any():
            assert_close(loss, -torch.minimum(plain, bounds).mean(), rtol=1e-9, atol=1e-9)
            assert_close(clipped, (plain > bounds).float().mean())

    @given(seed=SEEDS)
    @fuzz
    def test_at_ratio_1_it_is_the_policy_gradient(self, seed):
        logps, advantages, mask = random_batch(seed, 2)
        count = mask.sum().clamp(min=1)
        losses, (gradient,) = results_and_gradients(
            lambda logps, mask: clipped_policy_loss(logps, logps, advantages, mask, 0.2, 0.2), [logps], mask
        )
        expected = -(advantages * mask).sum() / count
        assert_close(losses[0], expected)
        assert losses[1] == 0
        assert_close(gradient, 2 * expected * -advantages * mask / count)  # of the squared loss

    @given(seed=SEEDS)
    @settings(max_examples=5)
    def test_gradcheck(self, seed):
        logps, old_logps, advantages, mask = random_batch(seed, 3)
        loss = partial(clipped_policy_loss, clip_low=0.2, clip_high=0.2)
        assert gradcheck(lambda logps: loss(logps, old_logps, advantages, mask)[0], logps.requires_grad_())

    def test_a_step_down_the_loss_raises_a_good_token(self):
        logits = torch.zeros(1, 2, 5, dtype=torch.float64, requires_grad=True)
        before = logits.log_softmax(-1)[..., 0]
        loss, _ = clipped_policy_loss(before, before.detach(), row(1, -1), torch.ones(1, 2), 0.2, 0.2)
        loss.backward()
        good, bad = ((logits - 0.1 * logits.grad).log_softmax(-1)[..., 0] - before)[0].tolist()
        assert good > 0 > bad

    def test_only_the_new_policy_gets_gradients(self):
        logps, old_logps, advantages = (row(0.1, 0.2).requires_grad_() for _ in range(3))
        clipped_policy_loss(logps, old_logps, advantages, torch.ones(1, 2), 0.2, 0.2)[0].backward()
        assert logps.grad is not None
        assert old_logps.grad is None
        assert advantages.grad is None


class TestClippedValueLoss:
    def test_numbers(self):
        old_values, mask = row(0.3, 0.3, 0.3, 0.3), torch.ones(1, 4)
        # Held at 0.5, further from its target; the same, but nearer; within the range; held at 0.1, further.
        values, returns = row(0.8, 0.8, 0.4, -0.1).requires_grad_(), row(1.0, 0.0, 1.0, -0.5)
        loss, clipped = clipped_value_loss(values, old_values, returns, mask, clip=0.2)
        loss.backward()
        assert_close(loss, row(0.125, 0.32, 0.18, 0.18).mean())
        assert_close(values.grad, row(0.0, 0.8, -0.6, 0.0) / 4)
        assert_close(clipped.item(), 0.5)

    def test_without_clip_it_is_half_the_squared_error(self):
        values = row(0.8, -2.0).requires_grad_()
        loss, clipped = clipped_value_loss(values, row(0.3, 0.3), row(1.0, 1.0), torch.ones(1, 2), clip=None)
        loss.backward()
        assert_close(loss, row(0.02, 4.5).mean())
        assert_close(values.grad, row(-0.2, -3.0) / 2)
        assert clipped == 0

    def test_rounding_never_counts_as_clipped(self):
        generator = torch.Generator().manual_seed(0)
        old_values, returns, moves = torch.randn(3, 100, 100, generator=generator)
        values, mask = old_values + 0.1 * moves.tanh(), torch.ones(100, 100)
        assert clipped_value_loss(values, old_values, returns, mask, clip=0.2)[1] == 0
        assert clipped_value_loss(values, old_values, returns, mask, clip=None)[1] == 0

    @given(seed=SEEDS)
    @settings(max_examples=5)
    def test_gradcheck(self, seed):
        values, old_values, returns, mask = random_batch(seed, 3)
        loss = partial(clipped_value_loss, clip=0.2)
        assert gradcheck(lambda values: loss(values, old_values, returns, mask)[0], values.requires_grad_())

    def test_only_the_values_get_gradients(self):
        values, old_values, returns = (row(0.1, 0.9).requires_grad_() for _ in range(3))
        clipped_value_loss(values, old_values + 1, returns * 2, torch.ones(1, 2), 0.2)[0].backward()
        assert values.grad is not None
        assert old_values.grad is None
        assert returns.grad is None


def test_losses_of_a_published_rollout():
    # Token rewards and values printed in a public notebook (wlll123456/study_rlhf, for_ppo.ipynb, to 4 decimals), and
    # the advantages and losses that its formulas give for them with gamma = lambda = 0.9 and both clips at 0.2.
    rewards = [
        [-0.0148, -0.0134, -0.0258, 0.0089, -0.8090],
        [-0.0178, 0.0170, -0.0316, -0.0339, -0.9884],
        [-0.0019, -0.0238, 0.0211, -0.0333, -0.8852],
    ]
    values = [
        [-0.2046, -0.6074, -0.7700, -1.2505, 0.1553],
        [-0.0967, -0.9718, 0.2660, -0.1777, 0.4735],
        [-0.3134, -0.5433, -0.2487, -0.2369, 1.0747],
    ]
    expected = [
        [-0.3587, -0.0023, 0.1194, 0.6181, -0.9643],
        [-0.4275, 0.4546, -0.9550, -0.6142, -1.4619],
        [-0.1223, 0.0681, -0.2809, -0.4167, -1.9599],
    ]
    # Five prompt tokens before the completion, as in the notebook; they do not count.
    rewards, values, expected = (pad(torch.tensor(numbers), (5, 0)) for numbers in (rewards, values, expected))
    mask = pad(torch.ones(3, 5), (5, 0))
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.9)
    assert_close(advantages, expected, rtol=0, atol=2e-4)
    policy_loss, _ = clipped_policy_loss(torch.zeros(3, 10), torch.zeros(3, 10), advantages, mask, 0.2, 0.2)
    value_loss, _ = clipped_value_loss(values + 0.5, values, returns, mask, clip=0.2)
    losses = torch.stack([policy_loss, value_loss, policy_loss + 0.1 * value_loss])
    assert_close(losses, torch.tensor([0.4202, 0.6554, 0.4858]), rtol=0, atol=2e-4)


class TestEntropy:
    def test_numbers(self):
        assert_close(entropy(torch.zeros(50257)), torch.tensor(10.8249), rtol=0, atol=1e-4)
        assert_close(entropy(row(0.25, 0.75).log()), -(row(0.25, 0.75) * row(0.25, 0.75).log()).sum(-1))
        assert_close(entropy(torch.tensor([1000.0, 0.0, 0.0])), torch.tensor(0.0))

    @given(seed=SEEDS)
    @fuzz
    def test_equals_the_form_with_logsumexp(self, seed):
        logits = 5 * random_batch(seed, 3)[0]
        expected = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
        assert_close(entropy(logits + 100), expected, rtol=1e-9, atol=1e-9)

    def test_excluded_tokens_are_as_if_absent(self):
        logits = row(1.0, 2.0, -math.inf).requires_grad_()
        short = row(1.0, 2.0).requires_grad_()
        got, expected = entropy(logits), entropy(short)
        (got + expected).sum().backward()
        assert_close(got, expected)
        assert_close(logits.grad, pad(short.grad, (0, 1)))

    def test_gradcheck(self):
        assert gradcheck(entropy, torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_())


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

    def test_constant_returns_have_nothing_to_explain(self):
        values = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
        returns = torch.full((2, 500), 0.1)  # the sum of their squares is rounded
        assert explained_variance(values, returns, torch.ones(2, 500)) == 0
