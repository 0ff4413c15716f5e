"""RewardBench's scores, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.tools.certificate.functional.benchmark import (
    SECTIONS,
    best_of_k_credit,
    section_scores,
    ties_score,
)


class TestSectionScores:
    def test_numbers(self):
        codes = {f"hep-{language}": 0.0 for language in ("cpp", "go", "java", "js", "python", "rust")}
        assert section_scores({"math-prm": 1.0, **codes}) == {"Reasoning": 0.5}
        scores = section_scores({"mt-bench-hard": 1.0, "llmbar-natural": 0.0, "unknown": 1.0})
        assert scores == {"Chat Hard": pytest.approx(37 / 137)}
        everything = {subset: float(section == "Chat") for section, own in SECTIONS.items() for subset in own}
        assert section_scores(everything)["Average"] == 0.25

    def test_the_benchmark_has_its_23_subsets(self):
        counts = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
        assert counts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 * 2}
        assert sum(map(len, SECTIONS.values())) == 23

    @given(st.floats(0, 1))
    def test_equal_accuracies_give_equal_scores(self, accuracy):
        scores = section_scores({subset: accuracy for weights in SECTIONS.values() for subset in weights})
        assert len(scores) == 5
        assert all(score == pytest.approx(accuracy) for score in scores.values())


class TestBestOfKCredit:
    def test_numbers(self):
        assert best_of_k_credit([3.0, 1.0, 2.0, 2.0]) == 1.0
        assert best_of_k_credit([1.0, 3.0, 2.0, 2.0]) == 0.0
        assert best_of_k_credit([2.0, 2.0, 1.0, 2.0]) == pytest.approx(1 / 3)
        assert best_of_k_credit([0.0] * 4) == 0.25


class TestTiesScore:
    def test_numbers(self):
        rows = [
            ("ref:0", [4.0, 1.0], 1),  # gap 3
            ("tied:0", [3.0, 2.0, 0.0], 2),  # gap 2, spread 1
            ("ref:1", [1.0, 0.5], 1),  # gap 0.5
            ("tied:1", [5.0, 4.0, 2.0, 1.0], 2),  # gap 2, spread 1
            ("ref:2", [0.0, 1.0], 1),  # wrong, and without a tied row
        ]
        result = ties_score(rows)
        assert result["ref_accuracy"] == pytest.approx(2 / 3)
        assert result["tied_accuracy"] == 1.0
        assert (result["gap_above_spread"], result["both_gaps_above_spread"]) == (1.0, 0.5)
        margin = (math.tanh(2 / 1 - 1) + math.tanh(0.5 / 1 - 1)) / 2
        assert result["margin"] == pytest.approx(margin)
        assert result["score"] == pytest.approx(0.3 * 2 / 3 + 0.3 + 0.2 + 0.2 * 0.5 + 0.01 * margin)

    def test_a_constant_model_gets_nothing(self):
        assert ties_score([("ref:0", [1.0, 1.0], 1), ("tied:0", [1.0, 1.0, 1.0], 2)])["score"] == 0.0

    @pytest.mark.parametrize("row", [("7", [1.0, 0.0], 1), ("tied:", [1.0, 0.0], 1), ("ref:1", [1.0], 1)])
    def test_bad_rows_are_named(self, row):
        with pytest.raises(ValueError, match="Ties row 1 has the id"):
            ties_score([("ref:0", [1.0, 0.0], 1), row])
