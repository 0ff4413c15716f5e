"""KL estimators against exact expectations, and the KL penalty in the reward."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.shaping.kl import FixedKLController, kl_estimate
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
    with pytest.raises(ValueError, match=r"\(2, 3\), but `ref_logps` has shape \(2, 1\)"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(2, 1), "k1")


def test_a_fixed_controller_keeps_its_value():
    controller = FixedKLController(0.05)
    controller.update(kl=100.0, n=512)
    assert controller.value == 0.05
