"""Rewards that differ from token to token: sums that telescope, padding that never counts, other tokenizations."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.ppo.functional import discounted_returns, gae
from rlhf_recipes.shaping.dense import (
    RewardPlacement,
    align_rewards,
    place_attention,
    place_differences,
    place_scores,
    potential_shaping,
)
from rlhf_recipes.shaping.placement import place_terminal

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
PER_TOKEN = torch.tensor([[0.5, 2.0, 1.5, math.nan], [math.inf, 1.0, -math.inf, 4.0], [math.nan] * 4])
SCORES = torch.tensor([10.0, -4.0, math.nan])


@st.composite
def cases(draw):
    """Float64 scores `(B,)`, non-negative numbers per token `(B, T)`, and a mask with any holes."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    number = st.floats(-100, 100, allow_subnormal=False)
    scores = torch.tensor(draw(st.lists(number, min_size=rows, max_size=rows)), dtype=torch.float64)
    flat = draw(st.lists(number.map(abs), min_size=rows * columns, max_size=rows * columns))
    bits = draw(st.lists(st.integers(0, 1), min_size=rows * columns, max_size=rows * columns))
    per_token = torch.tensor(flat, dtype=torch.float64).reshape(rows, columns)
    return scores, per_token, torch.tensor(bits).reshape(rows, columns)


def counted(mask):
    """For each row, the positions that count."""
    return [[t for t, counts in enumerate(row) if counts] for row in mask.tolist()]


PLACEMENTS = {
    "differences": lambda scores, per_token, mask: place_differences(per_token, mask),
    "differences_to_prompt": lambda scores, per_token, mask: place_differences(per_token, mask, scores),
    "attention": lambda scores, per_token, mask: place_attention(scores, mask, per_token, weight=0.75),
    "potential": lambda scores, per_token, mask: potential_shaping(per_token, mask, gamma=0.9),
}
every_placement = pytest.mark.parametrize("place", PLACEMENTS.values(), ids=PLACEMENTS)


class TestEveryPlacement:
    @every_placement
    @given(cases(), st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.0, 1e6, -1e6, math.nan, math.inf]))
    @settings(max_examples=60)
    def test_padding_never_matters(self, place, case, left, right, junk):
        scores, per_token, mask = case
        expected = place(scores, per_token.masked_fill(mask == 0, 0.0), mask)
        pad, pad_mask = (torch.nn.functional.pad, (left, right))
        dirty = pad(per_token.masked_fill(mask == 0, junk), pad_mask, value=junk)
        got = place(scores.masked_fill(~mask.any(1), junk), dirty, pad(mask, pad_mask))
        assert_close(got[:, left : left + mask.size(1)], expected, rtol=1e-12, atol=1e-12)
        assert not got[pad(mask, pad_mask) == 0].any()

    @every_placement
    def test_any_type_of_mask_will_do(self, place):
        for kind in (torch.bool, torch.float32):
            assert_close(place(SCORES, PER_TOKEN.abs(), MASK.to(kind)), place(SCORES, PER_TOKEN.abs(), MASK))

    @every_placement
    def test_sends_no_gradient_back(self, place):
        scores, per_token = torch.ones(3, requires_grad=True), torch.rand(3, 4, requires_grad=True)
        assert not place(scores, per_token, MASK).requires_grad

    @every_placement
    def test_keeps_the_type(self, place):
        assert place(torch.ones(3).bfloat16(), torch.ones(3, 4).bfloat16(), MASK).dtype == torch.bfloat16

    @every_placement
    def test_no_columns_no_rewards(self, place):
        assert place(torch.ones(2), torch.ones(2, 0), torch.ones(2, 0)).shape == (2, 0)

    @every_placement
    @pytest.mark.parametrize("shape", [(3, 1), (4,), (3, 5)])
    def test_shapes_that_would_broadcast_are_refused(self, place, shape):
        with pytest.raises(
            ValueError, match=r"`mask` has shape \(3, 4\)\. Give every tensor one entry per token, shape \(B, T\)\.$"
        ):
            place(torch.ones(3), torch.ones(shape), MASK)


class TestPlaceDifferences:
    def test_numbers(self):
        # the second row counts tokens 1 and 3: 1.0, then 4.0 - 1.0
        expected = torch.tensor([[0.5, 1.5, -0.5, 0.0], [0.0, 1.0, 0.0, 3.0], [0.0] * 4])
        assert_close(place_differences(PER_TOKEN, MASK), expected)

    def test_prompt_numbers(self):
        expected = torch.tensor([[0.25, 1.5, -0.5, 0.0], [0.0, -1.0, 0.0, 3.0], [0.0] * 4])
        assert_close(place_differences(PER_TOKEN, MASK, torch.tensor([0.25, 2.0, math.nan])), expected)

    @given(cases())
    @settings(max_examples=100)
    def test_agrees_with_a_loop_and_telescopes(self, case):
        prompt_scores, prefix_scores, mask = case
        got = place_differences(prefix_scores, mask, prompt_scores)
        expected = torch.zeros_like(prefix_scores)
        for b, positions in enumerate(counted(mask)):
            before = prompt_scores[b]
            for t in positions:
                expected[b, t] = prefix_scores[b, t] - before
                before = prefix_scores[b, t]
            last = prefix_scores[b, positions[-1]] - prompt_scores[b] if positions else torch.tensor(0.0).double()
            assert_close(got[b].sum(), last)
        assert_close(got, expected)

    @pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
    def test_prompt_scores_of_another_type_do_not_change_that_of_the_rewards(self, other):
        got = place_differences(PER_TOKEN, MASK, torch.tensor([0.25, 2.0, math.nan], dtype=other))
        assert_close(got, place_differences(PER_TOKEN, MASK, torch.tensor([0.25, 2.0, math.nan])), rtol=0, atol=0)

    def test_prompt_scores_may_be_on_another_device(self):
        # the meta device stands for a GPU
        assert place_differences(PER_TOKEN.to("meta"), MASK.to("meta"), SCORES).device.type == "meta"

    def test_one_token_gets_its_score(self):
        assert_close(place_differences(torch.tensor([[2.0]]), torch.ones(1, 1)), torch.tensor([[2.0]]))

    @pytest.mark.parametrize("shape", [(3, 1), (2,), ()])
    def test_prompt_scores_that_would_broadcast_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"\(3, 4\)\. Give one score per prompt, shape \(B,\)\.$"):
            place_differences(torch.zeros(3, 4), MASK, torch.zeros(shape))


class TestPlaceAttention:
    def test_numbers(self):
        attention = torch.tensor([[0.1, 0.3, 0.1, math.nan], [9.0, 0.0, 9.0, 0.2], [math.nan] * 4])
        half = torch.tensor([[1.0, 3.0, 6.0, 0.0], [0.0, 0.0, 0.0, -4.0], [0.0] * 4])
        assert_close(place_attention(SCORES, MASK, attention, weight=0.5), half)
        full = torch.tensor([[2.0, 6.0, 2.0, 0.0], [0.0, 0.0, 0.0, -4.0], [0.0] * 4])
        assert_close(place_attention(SCORES, MASK, attention, weight=1.0), full)

    @given(cases(), st.floats(0, 1))
    @settings(max_examples=100)
    def test_agrees_with_a_loop_and_sums_to_the_score(self, case, weight):
        scores, attention, mask = case
        got = place_attention(scores, mask, attention, weight)
        expected = torch.zeros_like(attention)
        for b, positions in enumerate(counted(mask)):
            total = sum(attention[b, t].item() for t in positions)
            for t in positions:
                share = attention[b, t] / total if total else float(t == positions[-1])
                expected[b, t] = scores[b] * (weight * share + (1 - weight) * (t == positions[-1]))
            assert_close(got[b].sum(), scores[b] if positions else torch.tensor(0.0).double())
        assert_close(got, expected)

    @given(cases())
    @settings(max_examples=30)
    def test_without_weight_it_is_terminal(self, case):
        scores, attention, mask = case
        assert_close(place_attention(scores, mask, attention, weight=0.0), place_terminal(scores, mask))

    def test_no_attention_at_all_is_terminal(self):
        mask = torch.tensor([[1, 1, 0]])
        got = place_attention(torch.tensor([2.0]), mask, torch.zeros(1, 3), weight=1.0)
        assert_close(got, torch.tensor([[0.0, 2.0, 0.0]]))

    def test_tiny_attention_is_still_a_share(self):
        got = place_attention(torch.tensor([2.0]), torch.ones(1, 2), torch.tensor([[1e-40, 3e-40]]), weight=1.0)
        assert_close(got, torch.tensor([[0.5, 1.5]]), rtol=1e-3, atol=0)

    def test_half_precision_attention_still_sums_to_the_score(self):
        attention = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
        rewards = place_attention(torch.tensor([3.0]), torch.ones(1, 1000), attention, weight=1.0)
        assert_close(rewards.sum(), torch.tensor(3.0))

    @pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
    def test_a_weight_out_of_range_is_refused(self, weight):
        with pytest.raises(ValueError, match="give 0 to 1, got"):
            place_attention(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2), weight)

    def test_negative_attention_is_refused_where_it_counts(self):
        attention = torch.tensor([[1.0, -0.5]])
        with pytest.raises(ValueError, match=r"must not be negative, got -0\.5"):
            place_attention(torch.ones(1), torch.ones(1, 2), attention, weight=0.5)
        assert_close(
            place_attention(torch.ones(1), torch.tensor([[1, 0]]), attention, 0.5), torch.tensor([[1.0, 0.0]])
        )


class TestPotentialShaping:
    def test_numbers(self):
        # 0.9 * 2 - 0.5, 0.9 * 1.5 - 2, -1.5; and over the hole: 0.9 * 4 - 1, -4
        expected = torch.tensor([[1.3, -0.65, -1.5, 0.0], [0.0, 2.6, 0.0, -4.0], [0.0] * 4])
        assert_close(potential_shaping(PER_TOKEN, MASK, gamma=0.9), expected)

    @given(cases(), st.floats(0, 1))
    @settings(max_examples=100)
    def test_discounted_sum_is_minus_the_first_potential(self, case, gamma):
        _, potentials, mask = case
        shaping = potential_shaping(potentials, mask, gamma)
        for b, positions in enumerate(counted(mask)):
            total = sum(gamma**k * shaping[b, t].item() for k, t in enumerate(positions))
            assert total == pytest.approx(-potentials[b, positions[0]].item() if positions else 0.0, abs=1e-9)

    @given(cases(), st.floats(0, 1), st.integers(0, 2**32 - 1))
    @settings(max_examples=100)
    def test_every_return_changes_by_minus_the_potential(self, case, gamma, seed):
        # What the policy does next cannot change that number, so no policy gains on another: it stays the best.
        _, potentials, mask = case
        rewards = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rewards = rewards.masked_fill(mask == 0, 0.0)
        shaped = discounted_returns(rewards + potential_shaping(potentials, mask, gamma), mask, gamma)
        plain = discounted_returns(rewards, mask, gamma)
        assert_close(shaped - plain, -potentials.masked_fill(mask == 0, 0.0), rtol=0, atol=1e-9)

    @given(cases(), st.floats(0, 1), st.floats(0, 1))
    @settings(max_examples=50)
    def test_a_critic_that_knows_the_potential_leaves_the_advantages_alone(self, case, gamma, lam):
        _, potentials, mask = case
        generator = torch.Generator().manual_seed(0)
        rewards, values = torch.randn(2, *mask.shape, dtype=torch.float64, generator=generator)
        plain, _ = gae(rewards, values, mask, gamma, lam)
        shaping = potential_shaping(potentials, mask, gamma)
        shaped, _ = gae(rewards + shaping, values - potentials, mask, gamma, lam)
        assert_close(shaped, plain, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("gamma", [-0.1, 1.01, math.nan])
    def test_a_gamma_out_of_range_is_refused(self, gamma):
        with pytest.raises(ValueError, match="`gamma` must be the discount of the returns, from 0 to 1, got"):
            potential_shaping(torch.zeros(1, 2), torch.ones(1, 2), gamma)


@st.composite
def tokenizations(draw, length):
    """Cut a text of `length` characters into tokens, with empty ones in between; some characters may be left out."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    spans = [(start, end) for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    return [span for span in spans if span[0] == span[1] or draw(st.integers(0, 4))]


@st.composite
def two_tokenizations(draw):
    length = draw(st.integers(1, 10))
    source, target = draw(tokenizations(length)), draw(tokenizations(length))
    rewards = draw(st.lists(st.integers(-8, 8).map(float), min_size=len(source), max_size=len(source)))
    return rewards, source, target or [(0, length)]


class TestAlignRewards:
    def test_numbers(self):
        # ab|cdef|g and the end token, onto abc|de|fg: b is in the first, f in the third, g in the third
        source, target = [(0, 2), (2, 6), (6, 7), (7, 7)], [(0, 3), (3, 5), (5, 7)]
        assert align_rewards([1.0, 2.0, 4.0, 0.5], source, target) == [1.0, 0.0, 6.5]

    def test_the_same_tokens_keep_their_rewards(self):
        spans = [(0, 2), (2, 3), (3, 7)]
        assert align_rewards([1.0, -2.0, 3.0], spans, spans) == [1.0, -2.0, 3.0]

    @pytest.mark.parametrize("end", [(0, 0), (5, 5)])
    def test_an_end_token_meets_the_end_token(self, end):
        assert align_rewards([1.0, 9.0], [(0, 5), end], [(0, 2), (2, 5), end]) == [0.0, 1.0, 9.0]

    def test_a_first_token_without_text_goes_to_the_first_token(self):
        assert align_rewards([3.0, 1.0], [(0, 0), (0, 5)], [(0, 2), (2, 5)]) == [3.0, 1.0]

    @pytest.mark.parametrize(
        ("bytes_of_a_character", "expected"),
        [
            ([(1, 1), (1, 1), (1, 2)], [0.0, 0.0, 0.0, 7.0, 0.0]),
            ([(1, 2), (2, 2), (2, 2)], [0.0, 7.0, 0.0, 0.0, 0.0]),
            ([(1, 2), (1, 2), (1, 2)], [0.0, 0.0, 0.0, 7.0, 0.0]),
        ],
    )
    def test_a_character_of_several_bytes_is_complete_where_its_span_is(self, bytes_of_a_character, expected):
        assert align_rewards([7.0], [(1, 2)], [(0, 1), *bytes_of_a_character, (2, 3)]) == expected

    def test_a_first_character_of_several_bytes_is_complete_at_the_last_of_them(self):
        assert align_rewards([7.0], [(0, 1)], [(0, 1), (0, 1), (0, 1), (1, 2)]) == [0.0, 0.0, 7.0, 0.0]

    def test_a_character_that_no_token_holds_goes_to_the_one_before(self):
        # a space that the policy's tokenizer left out, in the middle and at the start
        assert align_rewards([5.0], [(2, 3)], [(0, 2), (3, 5)]) == [5.0, 0.0]
        assert align_rewards([5.0], [(0, 1)], [(1, 2), (2, 5)]) == [5.0, 0.0]

    @given(two_tokenizations())
    @settings(max_examples=300)
    def test_agrees_with_a_search_and_keeps_the_sum(self, case):
        rewards, source, target = case
        expected = [0.0] * len(target)
        for reward, (start, end) in zip(rewards, source, strict=True):
            place = end - 1 if end > start else start
            holders = [i for i, (first, last) in enumerate(target) if start < end and first <= place < last]
            started = [i for i, (first, _) in enumerate(target) if first <= place]
            expected[holders[-1] if holders else started[-1] if started else 0] += reward
        got = align_rewards(rewards, source, target)
        assert got == expected
        assert sum(got) == sum(rewards)

    def test_many_small_rewards_keep_their_sum(self):
        spans = [(i, i + 1) for i in range(1000)]
        assert align_rewards([0.1] * 1000, spans, [(0, 1000)]) == [pytest.approx(100.0, rel=1e-15)]

    def test_long_texts_are_quick(self):
        spans = [(i, i + 1) for i in range(100_000)]
        assert align_rewards([1.0] * 100_000, spans, spans) == [1.0] * 100_000

    def test_nothing_in_nothing_out(self):
        assert align_rewards([], [], []) == []
        assert align_rewards([], [], [(0, 1)]) == [0.0]

    def test_what_cannot_be_aligned_is_refused(self):
        with pytest.raises(ValueError, match="`rewards` has 1 entries, but `offsets` has 2"):
            align_rewards([1.0], [(0, 1), (1, 2)], [(0, 2)])
        with pytest.raises(ValueError, match="^`target_offsets` is empty: there is no token of the policy"):
            align_rewards([1.0], [(0, 1)], [])
        with pytest.raises(ValueError, match="`target_offsets` must be spans .* order of the text"):
            align_rewards([1.0], [(0, 1)], [(1, 2), (0, 1)])
        with pytest.raises(ValueError, match=r"`offsets` must be spans .* but \(2, 1\)"):
            align_rewards([1.0], [(2, 1)], [(0, 2)])


def test_each_placement_by_its_name():
    scores, mask = torch.tensor([3.0]), torch.tensor([[1, 1, 1, 0]])
    attention = torch.tensor([[0.2, 0.2, 0.6, 0.0]])
    expected = {
        "terminal": [0.0, 0.0, 3.0, 0.0],
        "redistributed": [0.0, 0.0, 3.0, 0.0],
        "uniform": [1.0, 1.0, 1.0, 0.0],
        "every_token": [3.0, 3.0, 3.0, 0.0],
        "discounted": [3 / 7, 6 / 7, 12 / 7, 0.0],
        "attention": [0.3, 0.3, 2.4, 0.0],
    }
    assert set(expected) == set(get_args(RewardPlacement))
    for name, rewards in expected.items():
        placed = place_scores(scores, mask, name, gamma=0.5, attention=attention, attention_weight=0.5)
        assert_close(placed, torch.tensor([rewards]))
    with pytest.raises(ValueError, match="placed by 'middle'"):
        place_scores(scores, mask, "middle")
    with pytest.raises(ValueError, match="by 'attention' without attention"):
        place_scores(scores, mask, "attention")
