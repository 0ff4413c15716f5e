"""KL estimators against exact expectations, the exact KL, its memory, and the controllers of its weight."""

import gc
import json
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_recipes.shaping.kl import (
    AdaptiveKLController,
    FixedKLController,
    chunked_full_kl,
    full_kl,
    kl_estimate,
    looks_like_per_token,
    steered_kl,
)
from rlhf_recipes.shaping.placement import place_terminal

ESTIMATORS = ["k1", "k2", "k3"]


def mean_and_deviation(estimator: str, shift: float) -> tuple[float, float]:
    """Of the estimator of KL(N(0, 1) || N(shift, 1)) over samples of N(0, 1), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = torch.from_numpy(weights / math.sqrt(2 * math.pi))
    samples = torch.from_numpy(nodes)
    estimates = kl_estimate(-(samples**2) / 2, -((samples - shift) ** 2) / 2, estimator)
    mean = (weights * estimates).sum()
    return mean.item(), (weights * (estimates - mean) ** 2).sum().sqrt().item()


def test_numbers():
    # p_policy = 0.5 and p_reference = 0.25, so r = 0.5; then the other way round, so r = 2
    logps, ref_logps = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    ln2 = math.log(2)
    expected = {"k1": [ln2, -ln2], "k2": [ln2**2 / 2, ln2**2 / 2], "k3": [-0.5 + ln2, 1 - ln2]}
    for estimator, numbers in expected.items():
        assert_close(kl_estimate(logps, ref_logps, estimator), torch.tensor([numbers]))


@pytest.mark.parametrize(
    ("shift", "estimator", "bias", "deviation"),
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.0025, 1.42),
        (0.1, "k3", 0.0, 1.42),
        (1.0, "k1", 0.0, 2.0),
        (1.0, "k2", 0.25, 1.73),
        (1.0, "k3", 0.0, 1.70),
    ],
)
def test_bias_and_deviation_for_two_gaussians(shift, estimator, bias, deviation):
    kl = shift**2 / 2  # both numbers are relative to it
    mean, std = mean_and_deviation(estimator, shift)
    assert mean / kl - 1 == pytest.approx(bias, abs=1e-8)
    assert std / kl == pytest.approx(deviation, abs=0.006)


@given(st.integers(0, 2**32 - 1))
def test_k1_and_k3_average_to_the_kl_of_two_token_distributions(seed):
    policy, reference = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ["k1", "k3"]:
        assert_close((policy.exp() * kl_estimate(policy, reference, estimator)).sum(), exact)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 1.0, 10.0]))
def test_k2_and_k3_are_never_negative_and_k1_may_be(seed, scale):
    logps, ref_logps = -scale * torch.rand(2, 4, 50, generator=torch.Generator().manual_seed(seed))
    assert (kl_estimate(logps, ref_logps, "k2") >= 0).all()
    assert (kl_estimate(logps, ref_logps, "k3") >= 0).all()
    assert (kl_estimate(logps, ref_logps, "k1") < 0).any()


def test_k3_of_close_policies_is_not_lost_to_rounding():
    k3 = kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.0 + 2**-12]]), "k3")
    assert_close(k3, torch.tensor([[2.0**-25]]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_no_kl(estimator):
    logps = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert_close(kl_estimate(logps, logps, estimator), torch.zeros(3, 5), rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator):
    inputs = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda pair: kl_estimate(pair[0], pair[1], estimator), inputs)


def test_token_rewards_are_the_score_minus_the_penalty():
    kl = kl_estimate(torch.tensor([[-0.3315, -0.0426, 0.6351]]), torch.zeros(1, 3), "k1")
    rewards = place_terminal(torch.tensor([0.4]), torch.ones(1, 3)) - FixedKLController(0.15).value * kl
    assert_close(rewards, torch.tensor([[0.049725, 0.00639, 0.304735]]))
    assert_close(rewards.sum(), torch.tensor(0.36085))


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(torch.zeros(1, 2), torch.zeros(1, 2), "k4")


def test_shapes_that_would_broadcast_are_refused():
    hint = r"Give both one entry per token, shape \(B, T\)\.$"
    with pytest.raises(ValueError, match=r"\(2, 3\), but `ref_logps` has shape \(2, 1\)\. " + hint):
        kl_estimate(torch.zeros(2, 3), torch.zeros(2, 1), "k1")


def kl_by_hand(logits, ref_logits):
    """KL of one pair of distributions with Python floats, from the definition."""
    p, q = ([math.exp(logit - max(row)) for logit in row] for row in (logits, ref_logits))
    p, q = [each / math.fsum(p) for each in p], [each / math.fsum(q) for each in q]
    if any(a and not b for a, b in zip(p, q, strict=True)):
        return math.inf
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def random_logits(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestFullKL:
    def test_numbers(self):
        new, old = torch.tensor([[0.9, 0.1]]).log() + 7.0, torch.tensor([[0.5, 0.5]]).log()
        assert_close(full_kl(new, old), torch.tensor([0.36806]), rtol=0, atol=1e-5)
        assert_close(full_kl(old, new), torch.tensor([0.51083]), rtol=0, atol=1e-5)

    @given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 1.0, 20.0]), st.integers(0, 4))
    @settings(max_examples=60)
    def test_agrees_with_the_definition(self, seed, scale, excluded):
        logits, ref_logits = scale * random_logits(2, 6, seed=seed)
        logits[:excluded] = -math.inf
        ref_logits[: excluded // 2] = -math.inf
        expected = kl_by_hand(logits.tolist(), ref_logits.tolist())
        assert full_kl(logits, ref_logits).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)

    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=20)
    def test_is_what_k1_averages_to(self, seed):
        policy, reference = random_logits(2, 7, seed=seed).log_softmax(-1)
        estimates = kl_estimate(policy, reference, "k1")
        assert_close(full_kl(policy, reference), (policy.exp() * estimates).sum())

    def test_equal_distributions_have_none(self):
        logits = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(0))
        assert_close(full_kl(logits, logits), torch.zeros(3, 5), rtol=0, atol=0)

    def test_excluded_tokens(self):
        half, certain = torch.tensor([0.0, 0.0, -math.inf]), torch.tensor([0.0, -math.inf, -math.inf])
        assert_close(full_kl(half, half), torch.tensor(0.0), rtol=0, atol=0)
        assert_close(full_kl(certain, half), torch.tensor(math.log(2)))
        assert full_kl(half, certain).item() == math.inf

    def test_a_token_too_unlikely_for_a_float_is_no_nan(self):
        got = full_kl(torch.tensor([0.0, -1000.0]), torch.tensor([0.0, -math.inf]))
        assert_close(got, torch.tensor(0.0))

    def test_gradients_are_right_and_excluded_tokens_get_none(self):
        logits, ref_logits = (each.requires_grad_() for each in random_logits(2, 4, 6))
        assert torch.autograd.gradcheck(full_kl, (logits, ref_logits))
        bias = torch.zeros(6, dtype=torch.float64)
        bias[2] = -math.inf
        full_kl(logits + bias, ref_logits + bias).sum().backward()
        for each in (logits, ref_logits):
            assert each.grad.isfinite().all()
            assert not each.grad[:, 2].any()

    def test_half_precision_is_computed_in_float32(self):
        logits, ref_logits = random_logits(2, 3, 50).bfloat16()
        got = full_kl(logits, ref_logits)
        assert got.dtype == torch.float32
        assert_close(got, full_kl(logits.double(), ref_logits.double()).float())

    @pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3,), ()])
    def test_shapes_that_would_broadcast_are_refused(self, shape):
        hint = r"Give both one entry per token of the vocabulary, shape \(\.\.\., V\)\.$"
        with pytest.raises(ValueError, match=r"\(2, 3\), but `ref_logits` has shape .*\. " + hint):
            full_kl(torch.zeros(2, 3), torch.zeros(shape))


class LargestAlive(TorchDispatchMode):
    """Watch every operation, backward pass included, and note the most numbers that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.alive[id(tensor.untyped_storage())] = (
                    torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()),
                    tensor.untyped_storage().nbytes(),
                )
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


class TestChunkedFullKL:
    def test_numbers(self):
        new, old = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        got = chunked_full_kl(new, old, torch.nn.Identity(), temperature=1.0, chunk_size=1)
        assert_close(got, torch.tensor([0.36806, 0.51083]), rtol=0, atol=1e-5)
        swapped = chunked_full_kl(new, old, torch.nn.Identity(), temperature=1.0, chunk_size=1, swap=True)
        assert_close(swapped, torch.tensor([0.51083, 0.36806]), rtol=0, atol=1e-5)

    @given(st.integers(0, 9), st.integers(1, 12), st.booleans(), st.sampled_from([0.5, 1.0, 2.0]))
    @settings(max_examples=60)
    def test_equals_the_whole_in_value_and_gradient(self, positions, chunk_size, swap, temperature):
        weight, upstream = random_logits(20, 4, seed=1), random_logits(positions, seed=2)
        policy, reference = random_logits(2, positions, 4, seed=3)
        chunked, whole = policy.clone().requires_grad_(), policy.clone().requires_grad_()
        reference.requires_grad_()
        got = chunked_full_kl(chunked, reference, lambda h: h @ weight.T, temperature, chunk_size, swap)
        pair = whole @ weight.T / temperature, reference.detach() @ weight.T / temperature
        expected = full_kl(*(reversed(pair) if swap else pair))
        assert_close(got, expected)
        (gradient,) = torch.autograd.grad(expected, whole, upstream)
        got_gradient, none = torch.autograd.grad(got, (chunked, reference), upstream, allow_unused=True)
        assert_close(got_gradient, gradient)
        assert none is None

    def test_logits_of_all_positions_never_exist(self):
        size, hidden_size, vocabulary, chunk = 4, 2, 1000, 8  # float32

        def memory(chunks, backward):
            hidden = torch.randn(chunks * chunk, hidden_size, requires_grad=True)
            weight = torch.randn(vocabulary, hidden_size)
            gc.collect()
            with LargestAlive() as watch:
                kl = chunked_full_kl(hidden, hidden.detach() + 1, lambda h: h @ weight.T, 0.7, chunk)
                forward = sum(entry[1] for entry in watch.alive.values() if not entry[0].expired())
                if backward:
                    kl.sum().backward()
            return watch.largest, watch.most, forward

        largest, most, _ = memory(chunks=2, backward=True)
        assert largest == size * chunk * vocabulary
        largest_of_many, most_of_many, after_forward = memory(chunks=16, backward=True)
        assert largest_of_many == largest
        assert most_of_many < most + size * chunk * vocabulary / 2  # hidden states and results grow, logits do not
        assert after_forward < size * chunk * vocabulary  # no chunk is kept for the backward pass

    def test_nothing_is_kept_without_gradient(self):
        hidden = random_logits(5, 4).requires_grad_()
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor)
        with torch.no_grad(), hooks:
            got = chunked_full_kl(hidden, hidden, torch.nn.Linear(4, 9).double(), 1.0, 2)
        assert not kept
        assert not got.requires_grad
        assert_close(got, torch.zeros(5).double(), rtol=0, atol=0)

    @pytest.mark.parametrize("swap", [False, True])
    def test_the_reference_may_have_an_output_layer_of_its_own(self, swap):
        policy, reference = random_logits(2, 3, 6).unbind()
        own = torch.nn.Linear(6, 6).double()
        got = chunked_full_kl(policy.requires_grad_(), reference, torch.nn.Identity(), 1.0, 2, swap, ref_head=own)
        pair = (policy, own(reference))
        assert_close(got, full_kl(*(reversed(pair) if swap else pair)))
        got.sum().backward()
        assert own.weight.grad is None

    def test_temperature_divides_both(self):
        policy, reference = random_logits(2, 3, 6).unbind()
        got = chunked_full_kl(policy, reference, torch.nn.Identity(), temperature=0.5, chunk_size=2)
        assert_close(got, full_kl(policy * 2, reference * 2))

    def test_bad_arguments_are_refused(self):
        hint = r"Give both one row per position that counts, shape \(N, H\)\.$"
        with pytest.raises(ValueError, match=r"\(2, 3\), but `ref_hidden` has shape \(1, 3\)\. " + hint):
            chunked_full_kl(torch.zeros(2, 3), torch.zeros(1, 3), torch.nn.Identity(), 1.0, 1)
        with pytest.raises(ValueError, match=r"shape \(N, H\)"):
            chunked_full_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.nn.Identity(), 1.0, 1)
        for temperature, chunk_size in [(0.0, 1), (math.nan, 1), (1.0, 0)]:
            with pytest.raises(ValueError, match=r"`temperature` above 0 and `chunk_size` from 1, got"):
                chunked_full_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.nn.Identity(), temperature, chunk_size)


class TestFixedKLController:
    def test_keeps_its_value(self):
        controller = FixedKLController(0.05)
        controller.update(kl=100.0, n=512)
        assert controller.value == 0.05
        with pytest.raises(FrozenInstanceError):
            controller.value = 1.0

    def test_no_penalty_is_allowed(self):
        assert FixedKLController(0.0).value == 0.0

    def test_an_adaptive_one_goes_on_from_its_checkpoint(self):
        assert FixedKLController(0.05).state_dict() == {"value": 0.05}
        adaptive = AdaptiveKLController(init=0.15, target=6.0, horizon=10_000)
        adaptive.load_state_dict(FixedKLController(0.05).state_dict())
        assert adaptive.value == 0.05

    def test_the_configuration_wins_over_the_checkpoint(self):
        controller = FixedKLController(0.05)
        controller.load_state_dict(json.loads(json.dumps(FixedKLController(0.1).state_dict())))
        assert controller.value == 0.05

    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
    def test_a_negative_weight_is_refused(self, value):
        with pytest.raises(ValueError, match="must be 0 or above, got"):
            FixedKLController(value)


def test_steered_kl_by_hand():
    """Each completion weighs the same in the unit of a token, however long it is; padding counts in neither."""
    kl = torch.tensor([[0.3, -0.1, 0.1], [0.5, -0.24, math.nan], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    assert_close(steered_kl(kl, mask), torch.tensor([0.3, 0.26, 0.0]))
    assert_close(steered_kl(kl, mask, "token"), torch.tensor([0.1, 0.13, 0.0]))


def test_a_target_in_the_other_unit_is_seen():
    """Verl's 0.1 nats per token, taken for completions of 36 tokens; not where it is only missed, or met."""
    assert looks_like_per_token(0.1, per_completion=3.6, per_token=0.1)
    assert looks_like_per_token(0.1, per_completion=2.0, per_token=0.06)
    assert not looks_like_per_token(0.1, per_completion=0.1, per_token=0.1)  # completions of one token
    assert not looks_like_per_token(0.1, per_completion=1.5, per_token=0.04)
    assert not looks_like_per_token(0.1, per_completion=9.0, per_token=0.25)
    assert not looks_like_per_token(6.0, per_completion=40.0, per_token=1.0)


class TestAdaptiveKLController:
    def test_numbers(self):
        for kl, value in [(12.0, 0.151536), (3.0, 0.148464), (6.6, 0.150768), (6.0, 0.15)]:
            controller = AdaptiveKLController(init=0.15, target=6.0, horizon=10_000)
            assert controller.value == 0.15
            controller.update(kl, n=512)
            assert controller.value == pytest.approx(value, rel=0, abs=1e-9)

    @given(st.lists(st.floats(-5, 100), max_size=20), st.integers(1, 600))
    @settings(max_examples=50)
    def test_follows_the_paper_step_by_step(self, kls, n):
        controller = AdaptiveKLController(init=0.15, target=6.0, horizon=10_000)
        value = 0.15
        for kl in kls:
            controller.update(kl, n)
            value *= 1.0 + float(np.clip(kl / 6.0 - 1.0, -0.2, 0.2)) * n / 10_000
            assert controller.value == pytest.approx(value, rel=1e-12)

    def test_holds_the_target_when_more_weight_means_less_kl(self):
        controller = AdaptiveKLController(init=0.01, target=6.0, horizon=2_000)
        for _ in range(500):
            controller.update(kl=0.9 / controller.value, n=512)
        assert 0.9 / controller.value == pytest.approx(6.0, rel=1e-3)

    def test_resumes(self):
        first, second = (AdaptiveKLController(init=0.15, target=6.0, horizon=10_000) for _ in range(2))
        first.update(kl=12.0, n=512)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for controller in (first, second):
            controller.update(kl=7.0, n=512)
        assert first.value == second.value
        assert first.value != 0.15

    @pytest.mark.parametrize("field", ["init", "target", "horizon"])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_arguments_out_of_range_are_refused(self, field, value):
        with pytest.raises(ValueError, match=f"`{field}` must be above 0 and finite, got"):
            AdaptiveKLController(**{"init": 0.15, "target": 6.0, "horizon": 10_000, field: value})

    def test_a_kl_that_is_no_number_is_refused(self):
        controller = AdaptiveKLController(init=0.15, target=6.0, horizon=10_000)
        with pytest.raises(ValueError, match=r"^The KL of the rollout is nan, so there is no telling which way"):
            controller.update(math.nan, n=512)
        controller.update(math.inf, n=512)
        assert controller.value == pytest.approx(0.151536, abs=1e-9)

    def test_a_horizon_that_could_turn_the_sign_is_refused(self):
        controller = AdaptiveKLController(init=0.15, target=6.0, horizon=100)
        controller.update(0.0, n=499)
        assert 0 < controller.value < 0.001
        with pytest.raises(ValueError, match=r"has 500: .* horizon above 100"):
            controller.update(0.0, n=500)
