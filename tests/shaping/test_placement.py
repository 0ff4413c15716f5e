"""Placements: whose token gets the score, and that returns of the same placement follow from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.ppo.functional import discounted_returns, gae
from rlhf_recipes.shaping.placement import place_terminal, place_uniform

PLACEMENTS = [place_terminal, place_uniform]
every_placement = pytest.mark.parametrize("place", PLACEMENTS)
SCORES, MASK = torch.tensor([0.8, -2.0, 5.0]), torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])


@st.composite
def scores_and_masks(draw):
    columns = draw(st.integers(1, 6))
    rows = st.tuples(st.floats(-100, 100), st.lists(st.integers(0, 1), min_size=columns, max_size=columns))
    scores, masks = zip(*draw(st.lists(rows, min_size=1, max_size=5)), strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(masks)


def test_terminal_pays_the_last_counted_token():
    assert_close(place_terminal(SCORES, MASK), torch.tensor([[0, 0, 0.8], [0, -2.0, 0], [0, 0, 0]]))


def test_uniform_pays_counted_tokens_alike():
    third = 0.8 / 3
    assert_close(place_uniform(SCORES, MASK), torch.tensor([[third, third, third], [-1.0, -1.0, 0], [0, 0, 0]]))


@every_placement
@given(scores_and_masks())
@settings(max_examples=50)
def test_rewards_sum_to_the_score_and_padding_gets_none(place, case):
    scores, mask = case
    rewards = place(scores, mask)
    assert_close(rewards.sum(1), scores * mask.any(1))
    assert not rewards[mask == 0].any()


@given(scores_and_masks())
@settings(max_examples=50)
def test_terminal_agrees_with_a_search_from_the_end(case):
    scores, mask = case
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask.tolist()):
        if 1 in row:
            expected[b, len(row) - 1 - row[::-1].index(1)] = scores[b]
    assert_close(place_terminal(scores, mask), expected, rtol=0, atol=0)


@every_placement
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_any_type_of_mask_will_do(place, kind):
    assert_close(place(SCORES, MASK.to(kind)), place(SCORES, MASK))


@every_placement
def test_a_score_without_tokens_never_counts(place):
    scores = torch.tensor([0.8, -2.0, math.nan])
    assert_close(place(scores, MASK), place(SCORES, MASK))


@every_placement
def test_keeps_the_type_of_the_scores(place):
    assert place(SCORES.bfloat16(), MASK).dtype == torch.bfloat16


@every_placement
@pytest.mark.parametrize("shape", [(3, 1), (2,), ()])
def test_scores_that_would_broadcast_are_refused(place, shape):
    with pytest.raises(ValueError, match="one score per completion"):
        place(torch.zeros(shape), MASK)


def test_returns_follow_from_the_placement():
    score, mask = torch.tensor([0.8], dtype=torch.float64), torch.ones(1, 3)
    expected = {
        place_terminal: {1.0: [0.8, 0.8, 0.8], 0.9: [0.648, 0.72, 0.8]},
        place_uniform: {1.0: [0.8, 0.53333, 0.26667], 0.9: [0.72267, 0.50667, 0.26667]},
    }
    for place, by_gamma in expected.items():
        for gamma, returns in by_gamma.items():
            got = discounted_returns(place(score, mask), mask, gamma)
            assert_close(got, torch.tensor([returns], dtype=torch.float64), rtol=0, atol=1e-5)


@every_placement
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_critic_of_the_same_placement_leaves_no_advantage(place, gamma):
    rewards = place(SCORES, MASK)
    advantages, _ = gae(rewards, discounted_returns(rewards, MASK, gamma), MASK, gamma, lam=0.0)
    assert_close(advantages, torch.zeros(3, 3))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_critic_of_another_placement_spoils_every_advantage(gamma):
    # A critic that expects the whole score at every token, against rewards that spread it: a good completion would
    # get a negative advantage everywhere. This is why returns must come from the token rewards.
    score, mask = torch.tensor([0.8]), torch.ones(1, 3)
    values = discounted_returns(score.expand(1, 3), mask, gamma)
    advantages, _ = gae(place_uniform(score, mask), values, mask, gamma, lam=0.0)
    assert_close(advantages, torch.full((1, 3), -0.53333), rtol=0, atol=1e-5)


@every_placement
def test_advantages_send_no_gradient_back_to_the_scores(place):
    scores = SCORES.clone().requires_grad_()
    advantages, returns = gae(place(scores, MASK), torch.zeros(3, 3), MASK, 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
