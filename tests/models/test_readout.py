"""Gain and bias of a reward model, and which of its numbers make the score."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.models.readout import Readout, fit_normalization, read_scores


class TestFitNormalization:
    def test_numbers(self):
        """C38: mean 2 and standard deviation 4 give gain .25 and bias -.5; InstructGPT's variant has a bias only."""
        scores = torch.tensor([-2.0, 6.0, -2.0, 6.0])
        assert fit_normalization(scores) == (0.25, -0.5)
        assert fit_normalization(scores, mode="mean_only") == (1.0, -2.0)

    @given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=30).filter(lambda row: len(set(row)) > 1))
    def test_reference_samples_get_mean_0_and_std_1(self, row):
        scores = torch.tensor(row, dtype=torch.float64)
        normal = Readout("last", *fit_normalization(scores)).apply(scores)
        assert_close(normal.mean().item(), 0.0, atol=1e-9, rtol=0.0)
        assert_close(normal.std(correction=0).item(), 1.0, atol=1e-9, rtol=0.0)
        assert torch.equal(normal[:, None] > normal, scores[:, None] > scores), "pair accuracy stays"
        assert normal.argmax() == scores.argmax()
        centered = Readout("last", *fit_normalization(scores, "mean_only")).apply(scores)
        assert_close(centered.mean().item(), 0.0, atol=1e-9, rtol=0.0)
        assert_close(centered.std(), scores.std())

    @pytest.mark.parametrize("scores", [[3.0, 3.0, 3.0], [0.0, 0.0], [1.0], [0.1 + 0.2, 0.3]])
    def test_constant_scores_are_an_error(self, scores):
        scores = torch.tensor(scores, dtype=torch.float64)
        with pytest.raises(ValueError, match="a constant has no standard deviation"):
            fit_normalization(scores)
        assert fit_normalization(scores, "mean_only") == (1.0, pytest.approx(-scores.mean().item()))

    def test_small_differences_are_not_constant(self):
        gain, _ = fit_normalization(torch.tensor([1e-6, 2e-6]))
        assert_close(gain, 2e6)

    def test_bad_scores_are_named(self):
        with pytest.raises(ValueError, match="reference sample 1 is nan"):
            fit_normalization(torch.tensor([1.0, float("nan"), 2.0]))
        for empty in (torch.tensor([]), torch.zeros(2, 2)):
            with pytest.raises(ValueError, match=r"shape \(N,\)"):
                fit_normalization(empty)
        with pytest.raises(ValueError, match="`mode` must be"):
            fit_normalization(torch.tensor([1.0, 2.0]), mode="mean")


class TestReadScores:
    def test_numbers(self):
        token_scores = torch.tensor([[7.0, 1.0, 2.0, 6.0, 9.0], [4.0, 9.0, 9.0, 9.0, 9.0]])
        mask = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
        assert read_scores(token_scores, mask, "last").tolist() == [6.0, 4.0]
        assert read_scores(token_scores, mask, "sum").tolist() == [9.0, 4.0]
        assert read_scores(token_scores, mask, "mean").tolist() == [3.0, 4.0]

    @pytest.mark.parametrize("readout", ["last", "sum", "mean"])
    def test_padding_says_nothing_and_gets_no_gradient(self, readout):
        token_scores = torch.tensor([[float("nan"), 1.0, 2.0, float("inf")]], requires_grad=True)
        score = read_scores(token_scores, torch.tensor([[0, 1, 1, 0]]), readout)
        score.sum().backward()
        assert score.isfinite().all()
        assert token_scores.grad[0, 0] == token_scores.grad[0, 3] == 0.0

    def test_rows_without_tokens_and_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match="Row 1 has no token"):
            read_scores(torch.zeros(2, 2), torch.tensor([[1, 0], [0, 0]]), "sum")
        with pytest.raises(ValueError, match="two tensors"):
            read_scores(torch.zeros(2, 2), torch.ones(2, 3), "sum")


class TestReadout:
    def test_it_survives_saving(self, tmp_path):
        saved = Readout("mean", *fit_normalization(torch.tensor([-2.0, 6.0, 1 / 3])))
        saved.save(tmp_path / "model")
        assert Readout.load(tmp_path / "model") == saved, "to the last digit"

    def test_a_folder_without_the_file_is_raw(self, tmp_path):
        assert Readout.load(tmp_path) == Readout("last", 1.0, 0.0)
        scores = torch.tensor([1.5, -2.0])
        assert torch.equal(Readout().apply(scores), scores)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "Expecting property name"),
            ("[1]", "expected an object, found list"),
            ('{"gain": 1, "scale": 2}', r"unknown keys \['scale'\]"),
            ('{"gain": "1"}', "`gain` must be a finite number, got '1'"),
            ('{"bias": NaN}', "`bias` must be a finite number, got nan"),
            ('{"gain": true}', "`gain` must be a finite number"),
            ('{"gain": -1.0}', "`gain` must be above 0"),
            ('{"readout": "first"}', "`readout` must be one of"),
            ('{"readout": ["last"]}', "`readout` must be one of"),
            ('{"reward_prompt": 1}', "`reward_prompt` must be true or false, got 1"),
        ],
    )
    def test_malformed_files_are_named(self, text, message, tmp_path):
        (tmp_path / "reward_model.json").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            Readout.load(tmp_path)
        assert str(tmp_path / "reward_model.json") in str(caught.value)

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "reward_model.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="does not say how to read"):
            Readout.load(tmp_path)

    def test_the_file_is_plain_json(self, tmp_path):
        Readout("sum", 0.25, -0.5).save(tmp_path)
        text = (tmp_path / "reward_model.json").read_text()
        assert json.loads(text) == {"readout": "sum", "gain": 0.25, "bias": -0.5, "reward_prompt": False}
