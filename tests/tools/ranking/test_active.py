import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.tools.ranking.active import label_schedule, preference_variance, select_queries


class TestPreferenceVariance:
    def test_numbers(self):
        # Probabilities of three members: .731, .5, .5 -> mean .577, variance .01188; then all the same; then 1, 0, 0.
        first = torch.tensor([[1.0, 2.0, 50.0], [0.0, 2.0, -50.0], [3.0, 2.0, -50.0]])
        second = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
        p = [1 / (1 + math.exp(-1)), 0.5, 0.5]
        by_hand = sum((value - sum(p) / 3) ** 2 for value in p) / 3
        expected = torch.tensor([by_hand, 0.0, 2 / 9])
        torch.testing.assert_close(preference_variance(first, second), expected, rtol=0, atol=1e-6)

    def test_only_differences_count(self):
        first, second, shift = torch.randn(3, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        plain = preference_variance(first, second)
        torch.testing.assert_close(preference_variance(first + shift, second + shift), plain)
        torch.testing.assert_close(preference_variance(second, first), plain)

    def test_refusals(self):
        with pytest.raises(ValueError, match="at least two members"):
            preference_variance(torch.zeros(1, 4), torch.zeros(1, 4))
        with pytest.raises(ValueError, match="got shapes \\(2, 4\\) and \\(2, 3\\)"):
            preference_variance(torch.zeros(2, 4), torch.zeros(2, 3))
        with pytest.raises(ValueError, match="pair 1 by member 0 are not finite"):
            preference_variance(torch.tensor([[0.0, math.nan], [0.0, 0.0]]), torch.zeros(2, 2))


class TestSelectQueries:
    def test_numbers(self):
        first = torch.tensor([[0.0, 5.0, 1.0, 9.0], [0.0, -5.0, 2.0, 9.0], [0.0, 5.0, 3.0, 9.0]])
        assert select_queries(first, torch.zeros(3, 4), budget=2).tolist() == [1, 2]

    def test_takes_the_highest_of_ten_times_the_budget(self):
        # C57
        first, second = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))
        chosen = select_queries(first, second, budget=20)
        variance = preference_variance(first, second)
        assert len(set(chosen.tolist())) == 20
        assert variance[chosen].tolist() == sorted(variance.tolist(), reverse=True)[:20]

    def test_members_that_are_alike_choose_at_random(self):
        # C57: the variance is 0 everywhere, and the picks are arbitrary: not the first ones, others for another seed.
        first = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).expand(3, -1)
        second = torch.zeros_like(first)
        assert not preference_variance(first, second).any()
        picks = [select_queries(first, second, budget=100, seed=seed) for seed in (0, 0, 1)]
        assert picks[0].equal(picks[1])
        assert len(set(picks[0].tolist()) & set(picks[2].tolist())) < 40
        assert 400 < picks[0].float().mean() < 600

    @settings(max_examples=25)
    @given(seed=st.integers(0, 1000))
    def test_permuting_candidates_permutes_picks(self, seed):
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randn(2, 3, 30, generator=generator, dtype=torch.float64)
        order = torch.randperm(30, generator=generator)
        picks = select_queries(first[:, order], second[:, order], budget=5)
        assert order[picks].equal(select_queries(first, second, budget=5))

    def test_disagreement_finds_what_members_do_not_know(self):
        # Three linear members fitted on the first feature only: they differ in what they say about the second.
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(500, 2, generator=generator, dtype=torch.float64)
        features[:450, 1] = 0.0
        weights = torch.tensor([[1.0, -2.0], [1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
        picks = select_queries(weights @ features.T, torch.zeros(3, 500, dtype=torch.float64), budget=40)
        assert (picks >= 450).all()

    @pytest.mark.parametrize("budget", [0, 5])
    def test_bad_budgets(self, budget):
        with pytest.raises(ValueError, match=f"from 1 to the number of candidates, 4, got {budget}"):
            select_queries(torch.zeros(2, 4), torch.zeros(2, 4), budget=budget)


class TestLabelSchedule:
    def test_numbers(self):
        # Rates 1, 1/2, 1/3, 1/4 are 12, 6, 4 and 3 of 25 parts; of 10 labels that is 4.8, 2.4, 1.6, 1.2
        assert label_schedule(100, [0, 50, 100, 150], halved_after=50) == [48, 24, 16, 12]
        assert label_schedule(10, [0, 50, 100, 150], halved_after=50) == [5, 2, 2, 1]
        assert label_schedule(7, [0], halved_after=1e6) == [7]

    @settings(max_examples=50)
    @given(budget=st.integers(1, 500), rounds=st.integers(1, 12), steps=st.integers(0, 99), half=st.floats(0.5, 1e4))
    def test_spends_the_budget_and_never_rises(self, budget, rounds, steps, half):
        labels = label_schedule(budget, [steps * number for number in range(rounds)], half)
        assert sum(labels) == budget
        assert labels == sorted(labels, reverse=True)
        assert min(labels) >= 0

    @pytest.mark.parametrize(
        ("budget", "steps", "half"), [(0, [0], 1.0), (5, [], 1.0), (5, [2, 1], 1.0), (5, [-1], 1.0), (5, [0], 0.0)]
    )
    def test_refusals(self, budget, steps, half):
        with pytest.raises(ValueError, match="Expected"):
            label_schedule(budget, steps, half)
