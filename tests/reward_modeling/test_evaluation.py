"""Scores of token sequences, and the summary of held-out pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch.testing import assert_close
from transformers import set_seed

from rlhf_recipes.models import load_sequence_classifier
from rlhf_recipes.reward_modeling import pairwise_evaluation, score_sequences


@pytest.fixture(scope="module")
def reward_model(tiny_model_path, tiny_tokenizer):
    set_seed(3)
    return load_sequence_classifier(tiny_model_path)


@pytest.fixture(scope="module")
def sequences(tiny_tokenizer):
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 1, 12, 3, 5)
    return [torch.randint(1, len(tiny_tokenizer), (n,), generator=generator).tolist() for n in lengths]


class TestScoreSequences:
    def test_each_is_the_head_on_the_hidden_state_of_its_own_last_token(self, reward_model, sequences):
        reward_model.eval()
        with torch.no_grad():
            hidden = [reward_model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
        expected = torch.stack(hidden) @ reward_model.score.weight[0]
        assert_close(score_sequences(reward_model, sequences), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_batches_change_nothing(self, reward_model, sequences, batch_size):
        expected = score_sequences(reward_model, sequences, batch_size=3)
        assert_close(score_sequences(reward_model, sequences, batch_size), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_is_evaluated_and_left_as_it_was(self, reward_model, sequences, training):
        modes = []
        handle = reward_model.register_forward_hook(lambda module, *_: modes.append(module.training))
        scores = score_sequences(reward_model.train(training), sequences)
        handle.remove()
        assert modes == [False]
        assert reward_model.training is training
        assert not scores.requires_grad

    @pytest.mark.parametrize("empty", [[], [[5], []]])
    def test_nothing_to_score_is_refused(self, reward_model, empty):
        with pytest.raises(ValueError, match="at least one token"):
            score_sequences(reward_model, empty)


class TestPairwiseEvaluation:
    def test_by_hand(self):
        chosen, rejected = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, -2.0, 0.5])
        result = pairwise_evaluation(chosen, rejected)
        low, high = result.pop("accuracy_ci")
        # margins 1, 0, 2, -1.5: two of four are right, the tie is not.
        assert result.pop("log_loss") == pytest.approx((0.313262 + 0.693147 + 0.126928 + 1.701413) / 4, abs=1e-6)
        means = {"accuracy": 0.5, "margin": 0.375, "chosen_score": 0.5, "rejected_score": 0.125}
        assert result == {**means, "n": 4, "ties": 0}
        # Wilson: centre 1/2 by symmetry, half width z sqrt(p (1 - p) / n + z^2 / 4 n^2) / (1 + z^2 / n)
        z = norm.ppf(0.975)
        half = z * (0.25 / 4 + z**2 / 64) ** 0.5 / (1 + z**2 / 4)
        assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)

    def test_ties_and_soft_labels(self):
        """C27: untied pairs for the accuracy, all of them for the log loss."""
        chosen, rejected = torch.tensor([1.0, 1.0, 0.0, 5.0]), torch.tensor([0.0, 0.0, 1.0, 5.0])
        result = pairwise_evaluation(chosen, rejected, labels=torch.tensor([1.0, 0.5, 0.2, 0.5]))
        # The winner of the third pair is the one called rejected.
        expected = {"accuracy": 1.0, "margin": 1.0, "chosen_score": 1.0, "rejected_score": 0.0, "n": 4, "ties": 2}
        assert {name: result[name] for name in expected} == expected
        soft = 0.2 * 1.313262 + 0.8 * 0.313262
        assert result["log_loss"] == pytest.approx((0.313262 + 0.813262 + soft + 0.693147) / 4, abs=1e-6)

    def test_pairs_of_one_row_are_not_independent(self):
        chosen, rejected = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]).repeat(5), torch.zeros(30)
        alone = pairwise_evaluation(chosen, rejected)["accuracy_ci"]
        rows = [index // 3 for index in range(30)]
        low, high = pairwise_evaluation(chosen, rejected, clusters=rows)["accuracy_ci"]
        assert low < alone[0] < alone[1] < high
        assert pairwise_evaluation(chosen, rejected, clusters=list(range(30)))["accuracy_ci"] == alone
        assert pairwise_evaluation(chosen, rejected, clusters=[0] * 30)["accuracy_ci"] == alone

    def test_all_right_has_the_interval_of_as_many_rows(self):
        """Ten rows of three pairs: `10 / (10 + z^2)` to 1."""
        rows = [index // 3 for index in range(30)]
        low, high = pairwise_evaluation(torch.ones(30), torch.zeros(30), clusters=rows)["accuracy_ci"]
        assert (low, high) == pytest.approx((10 / (10 + 1.959964**2), 1.0), abs=1e-6)

    def test_nothing_but_ties_is_refused(self):
        with pytest.raises(ValueError, match="All 2 held-out pairs are ties"):
            pairwise_evaluation(torch.ones(2), torch.zeros(2), labels=torch.full((2,), 0.5))

    @given(st.lists(st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 2), min_size=1, max_size=50), st.floats(-9, 9))
    def test_swapping_and_shifting(self, pairs, shift):
        chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
        result, swapped = pairwise_evaluation(chosen, rejected), pairwise_evaluation(rejected, chosen)
        shifted = pairwise_evaluation(chosen + shift, rejected + shift)
        ties = (chosen == rejected).double().mean().item()
        assert result["accuracy"] + swapped["accuracy"] + ties == pytest.approx(1.0)
        assert result["margin"] == pytest.approx(-swapped["margin"])
        assert result["margin"] == pytest.approx(result["chosen_score"] - result["rejected_score"], abs=1e-9)
        assert shifted["margin"] == pytest.approx(result["margin"], abs=1e-9)
        assert shifted["chosen_score"] == pytest.approx(result["chosen_score"] + shift, abs=1e-9)
        low, high = result["accuracy_ci"]
        assert low <= result["accuracy"] <= high

    def test_a_higher_level_gives_a_wider_interval(self):
        scores = torch.arange(10.0) - 3.0, torch.zeros(10)
        narrow, wide = (pairwise_evaluation(*scores, level=level)["accuracy_ci"] for level in (0.8, 0.99))
        assert wide[0] < narrow[0] < narrow[1] < wide[1]

    @pytest.mark.parametrize("shapes", [((3,), (2,)), ((0,), (0,)), ((2, 1), (2, 1))])
    def test_wrong_shapes_are_refused(self, shapes):
        with pytest.raises(ValueError, match="one score per chosen and per rejected"):
            pairwise_evaluation(*(torch.zeros(shape) for shape in shapes))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_diverged_model_is_named(self, bad):
        with pytest.raises(ValueError, match="1 of 2 pairs .* not finite"):
            pairwise_evaluation(torch.tensor([1.0, bad]), torch.zeros(2))
