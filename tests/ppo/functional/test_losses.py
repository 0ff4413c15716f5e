"""Losses against hand-computed numbers, equations in float64, finite differences and properties."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import pad
from torch.testing import assert_close

from rlhf_recipes.ppo.functional.advantages import bandit_advantages, first_token_mask, gae
from rlhf_recipes.ppo.functional.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    importance_ratio,
    importance_weights,
    total_loss,
)
from rlhf_recipes.shaping import full_kl
from tests.ppo.functional.helpers import SEEDS, fuzz, random_batch, results_and_gradients, row

LEVELS = ["token", "sequence", "sequence_product"]


class TestImportanceRatio:
    def test_numbers(self):
        log_ratios, mask = row(0.1, 0.1, 0.05, 5.0), torch.tensor([[1, 1, 1, 0]])
        old_logps = torch.full_like(log_ratios, -3.0)
        expected = {
            "token": row(1.10517, 1.10517, 1.05127, 0.0),
            "sequence": row(1.08690, 1.08690, 1.08690, 0.0),
            "sequence_product": row(1.28403, 1.28403, 1.28403, 0.0),
        }
        for level, ratios in expected.items():
            got = importance_ratio(old_logps + log_ratios, old_logps, mask, level)
            assert_close(got, ratios, rtol=0, atol=5e-6)

    @given(seed=SEEDS)
    @fuzz
    def test_equals_loops(self, seed):
        logps, old_logps, mask = random_batch(seed, 2, holes=0.3)
        got = {level: importance_ratio(logps, old_logps, mask, level).tolist() for level in LEVELS}
        for b, kept in enumerate(mask.tolist()):
            places = [t for t, one in enumerate(kept) if one]
            ratios = [math.exp(logps[b, t]) / math.exp(old_logps[b, t]) for t in places]
            for t in range(len(kept)):
                expected = dict.fromkeys(LEVELS, 0.0)
                if t in places:
                    product = math.prod(ratios)
                    expected = {
                        "token": ratios[places.index(t)],
                        "sequence": product ** (1 / len(places)),
                        "sequence_product": product,
                    }
                for level, ratio in expected.items():
                    assert_close(got[level][b][t], ratio, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("level", LEVELS)
    def test_is_exactly_1_before_the_first_update(self, level):
        logps = -5 * torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
        mask = torch.arange(50) < torch.tensor([[50], [31], [1], [0]])
        assert torch.equal(importance_ratio(logps, logps.clone(), mask, level), mask.float())

    @pytest.mark.parametrize("level", LEVELS)
    def test_gradcheck(self, level):
        logps, old_logps, mask = random_batch(3, 2, holes=0.2)
        assert gradcheck(lambda logps: importance_ratio(logps, old_logps, mask, level), logps.requires_grad_())

    def test_only_the_new_policy_gets_gradients(self):
        logps, old_logps = (row(0.1, 0.2).requires_grad_() for _ in range(2))
        importance_ratio(logps, old_logps, torch.ones(1, 2)).sum().backward()
        assert logps.grad is not None
        assert old_logps.grad is None

    def test_a_mask_of_low_precision_counts_exactly(self):
        logps, mask = torch.full((1, 1001), 0.5), torch.ones(1, 1001, dtype=torch.bfloat16)
        ratio = importance_ratio(logps, torch.zeros(1, 1001), mask, "sequence")[0, 0]
        assert_close(ratio.item(), math.exp(0.5), rtol=1e-5, atol=0)

    def test_levels_that_do_not_exist_are_refused(self):
        message = "`level` must be 'token', 'sequence' or 'sequence_product', got 'word'"
        with pytest.raises(ValueError, match=message):
            importance_ratio(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), "word")


class TestImportanceWeights:
    def test_numbers(self):
        log_ratios, mask = row(0.1, -2.0, 1.5, torch.nan), torch.tensor([[1, 1, 1, 0]])
        sampled = torch.full_like(log_ratios, -3.0)
        product = 0.67032  # exp(0.1 - 2.0 + 1.5)
        expected = {  # bounds, then what becomes of 1.10517, 0.13534 and 4.48169
            ("token_truncate", None, 3.0): row(1.10517, 0.13534, 3.0, 0.0),
            ("token_truncate", 0.5, None): row(1.10517, 0.5, 4.48169, 0.0),
            ("token_mask", 0.5, 3.0): row(1.10517, 0.0, 0.0, 0.0),
            ("token_mask", None, None): row(1.10517, 0.13534, 4.48169, 0.0),
            ("sequence_truncate", None, 3.0): row(product, product, product, 0.0),
            ("sequence_truncate", None, 0.5): row(0.5, 0.5, 0.5, 0.0),
            ("sequence_mask", 0.7, 3.0): row(0.0, 0.0, 0.0, 0.0),
            ("sequence_mask", 0.6, 3.0): row(product, product, product, 0.0),
        }
        for (mode, low, high), weights in expected.items():
            got = importance_weights(sampled + log_ratios, sampled, mask, mode, low, high)
            assert_close(got, weights, rtol=0, atol=5e-6)
        assert not importance_weights(sampled.requires_grad_(), sampled, mask).requires_grad
        with pytest.raises(ValueError, match="'truncate' or 'mask', got 'word'"):
            importance_weights(sampled, sampled, mask, "word")


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

    def test_the_edges_keep_their_gradient(self):
        old_logps = row(0.0, 0.0)
        logps = row(0.5, 1.5).log().requires_grad_()  # edges of the range that are exact in binary
        loss, clipped = clipped_policy_loss(logps, old_logps, row(-1, 1), torch.ones(1, 2), 0.5, 0.5)
        loss.backward()
        assert clipped == 0
        assert (logps.grad != 0).all()

    def test_a_ratio_at_the_dual_clip_is_not_cut_off(self):
        logps, old_logps = row(2.0).log(), row(0.0)
        loss, clipped = clipped_policy_loss(logps, old_logps, row(-1), torch.ones(1, 1), 0.2, 0.2, dual_clip=2.0)
        assert loss == 2
        assert clipped == 0

    def test_dual_clip_numbers(self):
        ratios = row(0.5, 1.1, 2.9, 3.1, 10, 0.5, 1.1, 2.9, 3.1, 10)
        advantages = row(*[-2.0] * 5, *[2.0] * 5)
        objectives = row(-1.6, -2.2, -5.8, -6.0, -6.0, 1.0, 2.2, 2.4, 2.4, 2.4)
        slopes = row(0, -2, -2, 0, 0, 2, 2, 0, 0, 0)
        logps = ratios.log().requires_grad_()
        mask, old_logps = torch.ones(1, 10), torch.zeros(1, 10)
        loss, clipped = clipped_policy_loss(logps, old_logps, advantages, mask, 0.2, 0.2, dual_clip=3.0)
        loss.backward()
        assert_close(loss, -objectives.mean())
        assert_close(logps.grad, -slopes * ratios / 10)
        assert_close(clipped.item(), 0.6)
        without, clipped = clipped_policy_loss(logps, old_logps, advantages, mask, 0.2, 0.2)
        assert_close(without, -(objectives.sum() - 0.2 - 14.0) / 10)
        assert_close(clipped.item(), 0.4)

    @given(seed=SEEDS, bound=st.floats(1.01, 5))
    @fuzz
    def test_dual_clip_equals_equation_5(self, seed, bound):
        logps, old_logps, advantages, mask = random_batch(seed, 3)
        terms, cut = [], 0
        for b, t in mask.nonzero().tolist():
            ratio, advantage = math.exp(logps[b, t] - old_logps[b, t]), advantages[b, t].item()
            term = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
            if advantage < 0:
                term = max(term, bound * advantage)
            terms.append(term)
            cut += term != ratio * advantage and not math.isclose(term, ratio * advantage)
        loss, clipped = clipped_policy_loss(logps, old_logps, advantages, mask, 0.2, 0.3, dual_clip=bound)
        assert_close(loss.item(), -sum(terms) / max(len(terms), 1), rtol=1e-9, atol=1e-9)
        assert_close(clipped.item(), cut / max(len(terms), 1))

    @pytest.mark.parametrize("bound", [1, 1.0, 0.5, -3.0])
    def test_a_dual_clip_that_would_cut_off_everything_is_refused(self, bound):
        tensors = [torch.zeros(1, 2)] * 3
        with pytest.raises(ValueError, match=f"`dual_clip` must be above 1, .* got {bound}"):
            clipped_policy_loss(*tensors, torch.ones(1, 2), 0.2, 0.2, dual_clip=bound)

    def test_a_completion_as_one_action(self):
        # Log-ratios .1, .1, .05 and A = R(x, y) - V(x) = .5: the product 1.28403 is clipped at 1.2, the geometric mean
        # 1.08690 is not.
        logps, old_logps, mask = row(0.1, 0.1, 0.05), row(0, 0, 0), torch.ones(1, 3)
        advantages, _ = bandit_advantages(torch.tensor([0.8]).double(), row(0.3, 9, 9), mask)
        expected = {"sequence_product": (0.6, 1.0), "sequence": (0.54345, 0.0), "token": (0.54360, 0.0)}
        for level, (objective, fraction) in expected.items():
            for how in ("token", "sequence"):
                loss, clipped = clipped_policy_loss(
                    logps, old_logps, advantages, mask, 0.2, 0.2, level=level, aggregation=how
                )
                assert_close(loss.item(), -objective, rtol=0, atol=5e-6)
                assert clipped == fraction

    @given(seed=SEEDS)
    @fuzz
    def test_sequence_ratios_equal_gspo(self, seed):
        # https://huggingface.co/papers/2507.18071, equation 5: mean over sequences of min(s A, clip(s) A)
        logps, old_logps, noise, mask = random_batch(seed, 3)
        scores = noise[:, 0]
        objectives = []
        for b, length in enumerate(mask.sum(1).tolist()):
            if length:
                ratio = math.exp((logps[b, :length] - old_logps[b, :length]).sum().item() / length)
                objectives.append(min(ratio * scores[b].item(), min(max(ratio, 0.8), 1.3) * scores[b].item()))
        loss, _ = clipped_policy_loss(
            *(logps, old_logps, scores[:, None].expand(mask.shape), mask, 0.2, 0.3),
            level="sequence",
            aggregation="sequence",
        )
        assert_close(loss.item(), -sum(objectives) / max(len(objectives), 1), rtol=1e-9, atol=1e-9)

    def test_aggregation(self):
        old_logps, mask = torch.zeros(2, 2), torch.tensor([[1, 1], [1, 0]])
        advantages = torch.tensor([[1.0, 2.0], [4.0, 9.0]])
        for how, loss in {"token": -7 / 3, "sequence": -2.75, "fixed": -0.7}.items():
            got, _ = clipped_policy_loss(old_logps, old_logps, advantages, mask, 0.2, 0.2, aggregation=how, length=5)
            assert_close(got.item(), loss)


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

    def test_aggregation(self):
        values, mask = torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        zeros = torch.zeros(2, 2)
        for how, loss in {"token": 14 / 6, "sequence": 5.75 / 2, "fixed": 0.35}.items():
            got, _ = clipped_value_loss(values, zeros, zeros, mask, None, aggregation=how, length=10)
            assert_close(got.item(), loss)

    def test_of_a_bandit_teaches_the_value_of_the_prompt_only(self):
        values, mask = row(0.3, 5.0, 7.0).requires_grad_(), torch.ones(1, 3)
        _, returns = bandit_advantages(torch.tensor([0.8]).double(), values, mask)
        loss, _ = clipped_value_loss(values, values, returns, first_token_mask(mask), None)
        loss.backward()
        assert_close(loss.item(), 0.125)
        assert_close(values.grad, row(-0.5, 0.0, 0.0))


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


class TestTotalLoss:
    def test_numbers(self):
        terms = [torch.tensor(term) for term in (-0.5, 2.0, 0.1, 3.0)]  # -L_CLIP, L_VF, L_KL, L_entropy
        loss = total_loss(*terms, vf_coef=0.5, kl_coef=0.7, entropy_coef=0.01)
        assert_close(loss, torch.tensor(-(0.5 - 0.5 * 2.0 - 0.7 * 0.1 + 0.01 * 3.0)))

    @given(terms=st.tuples(*[st.floats(-10, 10)] * 4), weights=st.tuples(*[st.floats(0, 10)] * 3))
    @fuzz
    def test_is_the_objective_negated(self, terms, weights):
        objective, value_loss, kl, bonus = terms
        c1, beta, c2 = weights
        tensors = [torch.tensor(term, dtype=torch.float64) for term in (-objective, value_loss, kl, bonus)]
        loss = total_loss(*tensors, vf_coef=c1, kl_coef=beta, entropy_coef=c2)
        assert_close(loss.item(), -(objective - c1 * value_loss - beta * kl + c2 * bonus), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("term", ["policy", "value", "kl", "entropy"])
    def test_a_step_down_moves_every_term_where_it_should(self, term):
        # One policy over 4 tokens and one value; the gradient from differences of the loss, not from autograd.
        generator = torch.Generator().manual_seed(0)
        anchor, start = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        token, mask, target = 2, torch.ones(1, 1), row(1.5)
        advantage = row(1.0 if term == "policy" else 0.0)
        weights = {"vf_coef": "value", "kl_coef": "kl", "entropy_coef": "entropy"}
        weights = {name: 0.5 * (what == term) for name, what in weights.items()}

        def measure(parameters):
            logits, value = parameters[:4], parameters[None, 4:]
            logps, old_logps = (numbers.log_softmax(-1)[token].reshape(1, 1) for numbers in (logits, start))
            return {
                "policy": clipped_policy_loss(logps, old_logps, advantage, mask, 0.2, 0.2)[0],
                "value": clipped_value_loss(value, row(0.3), target, mask, None)[0],
                "kl": full_kl(logits, anchor),
                "entropy": entropy(logits),
                "probability": logps[0, 0].exp(),
            }

        def loss(parameters):
            measured = measure(parameters)
            return total_loss(*(measured[name] for name in ("policy", "value", "kl", "entropy")), **weights)

        parameters = torch.cat([start, torch.tensor([0.3])]).requires_grad_()
        steps = 1e-5 * torch.eye(5, dtype=torch.float64)
        slope = torch.stack([(loss(parameters + step) - loss(parameters - step)) / 2e-5 for step in steps]).detach()
        loss(parameters).backward()
        assert_close(parameters.grad, slope, rtol=1e-6, atol=1e-8)
        before, after = measure(parameters), measure(parameters - 0.05 * slope)
        rises = {"policy": "probability", "entropy": "entropy"}.get(term)
        if rises:
            assert after[rises] > before[rises] + 1e-4
        else:
            assert after[term] < before[term] - 1e-4
        assert loss(parameters - 0.05 * slope) < loss(parameters)


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
    nothing = torch.zeros(())
    total = total_loss(policy_loss, value_loss, nothing, nothing, vf_coef=0.1, kl_coef=0.1, entropy_coef=0.1)
    losses = torch.stack([policy_loss, value_loss, total])
    assert_close(losses, torch.tensor([0.4202, 0.6554, 0.4858]), rtol=0, atol=2e-4)
