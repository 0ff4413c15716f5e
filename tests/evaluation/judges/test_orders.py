"""Answers in both orders: labels, agreement and position bias, by hand."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlhf_recipes.evaluation.judges.orders import (
    REASONED,
    clamped,
    is_answer,
    judge_in_both_orders,
    judgement_of,
    label_of_both,
)
from rlhf_recipes.reward_modeling.losses import pairwise_loss

PAIRS = [("good", "bad"), ("bad", "good"), ("same", "same"), ("bad", "bad")]


PROMPTS = ["q"] * len(PAIRS)


ORDER = ["bad", "same", "good"]


def honest(prompt, first, second):
    difference = ORDER.index(first) - ORDER.index(second)
    return "first" if difference > 0 else "second" if difference < 0 else "tie"


class TestJudgeInBothOrders:
    def test_numbers(self):
        # Answers by (order, swapped): agree on the first, agree on the second, first twice, second twice, first twice,
        # two ties, and a tie against a choice, which is a disagreement.
        answers = {
            "1": ("first", "second"),
            "2": ("second", "first"),
            "3": ("first", "first"),
            "4": ("second", "second"),
            "5": ("first", "first"),
            "6": ("tie", "tie"),
            "7": ("tie", "second"),
        }
        judged = judge_in_both_orders(
            lambda prompt, first, second: answers[prompt][first == "b"], list(answers), [("a", "b")] * 7
        )
        assert judged.labels == [1.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5]
        assert judged.agreement == 3 / 7
        assert (judged.shown_first, judged.shown_second) == (2, 1)
        assert judged.position_bias == 1 / 7
        assert judged.position_bias_p_value == 1.0

    def test_labels_feed_the_pairwise_loss(self):
        # C27 at a lead of 1: .313262 where the judge agrees, 1.313262 where it says the opposite, .813262 for a tie.
        judged = judge_in_both_orders(honest, PROMPTS, PAIRS)
        loss = pairwise_loss(torch.ones(4), torch.zeros(4), label=torch.tensor(judged.labels))
        assert loss.item() == pytest.approx((0.313262 + 1.313262 + 2 * 0.813262) / 4, abs=1e-6)

    def test_honest_judge(self):
        judged = judge_in_both_orders(honest, PROMPTS, PAIRS)
        assert judged.labels == [1.0, 0.0, 0.5, 0.5]
        assert (judged.agreement, judged.position_bias, judged.position_bias_p_value) == (1.0, 0.0, 1.0)

    def test_judge_that_takes_the_first(self):
        # C56: it disagrees with itself everywhere, so that it says nothing, and its bias is plain to see.
        judged = judge_in_both_orders(lambda prompt, first, second: "first", ["q"] * 20, [("a", "b")] * 20)
        assert judged.labels == [0.5] * 20
        assert (judged.agreement, judged.position_bias) == (0.0, 1.0)
        assert judged.position_bias_p_value == pytest.approx(2 * 0.5**20)
        judged = judge_in_both_orders(lambda prompt, first, second: "second", ["q"] * 20, [("a", "b")] * 20)
        assert (judged.shown_first, judged.shown_second, judged.position_bias) == (0, 20, -1.0)

    def test_coin_flips_are_no_bias(self):
        rng = random.Random(0)
        judged = judge_in_both_orders(
            lambda prompt, first, second: rng.choice(["first", "second"]), ["q"] * 400, [("a", "b")] * 400
        )
        assert judged.agreement == pytest.approx(0.5, abs=0.1)
        assert abs(judged.position_bias) < 0.1
        both = judged.shown_first + judged.shown_second
        assert judged.position_bias_p_value == pytest.approx(binomtest(judged.shown_first, both).pvalue)
        assert judged.position_bias_p_value > 0.01

    def test_swapping_all_pairs_mirrors_labels(self):
        judged = judge_in_both_orders(honest, PROMPTS, PAIRS)
        swapped = judge_in_both_orders(honest, PROMPTS, [(second, first) for first, second in PAIRS])
        assert swapped.labels == [1 - label for label in judged.labels]

    @pytest.mark.parametrize(
        ("prompts", "pairs", "message"),
        [
            ([], [], "got 0 prompts"),
            (["q"], PAIRS[:2], "got 1 prompts and 2 pairs"),
            (["q", "q"], [PAIRS[0], ("bad", "bad", "bad")], "row 1 has"),
            (["q"], ["ab"], "row 0 has 'ab'"),
        ],
    )
    def test_bad_rows(self, prompts, pairs, message):
        with pytest.raises(ValueError, match=message):
            judge_in_both_orders(honest, prompts, pairs)

    def test_bad_answers(self):
        with pytest.raises(ValueError, match="got 'A' for row 0"):
            judge_in_both_orders(lambda prompt, first, second: "A", ["q"], [("a", "b")])

    def test_probabilities_are_averaged_over_both_orders(self):
        # (p + 1 - q) / 2 by hand; sides: first twice, agree on the second, an undecided one against a choice
        answers = {"1": (0.9, 0.7), "2": (0.2, 0.6), "3": (0.5, 0.1), "4": ("first", 0.4)}
        judged = judge_in_both_orders(
            lambda prompt, first, second: answers[prompt][first == "b"], list(answers), [("a", "b")] * 4
        )
        assert judged.labels == pytest.approx([0.6, 0.3, 0.7, 0.8])
        assert judged.agreement == 0.5
        assert (judged.shown_first, judged.shown_second, judged.position_bias) == (1, 0, 0.25)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_label_of_probabilities_is_one_and_swapping_turns_it(answer, swapped):
    label = label_of_both(answer, swapped)
    assert 0 <= label <= 1
    assert label_of_both(swapped, answer) == pytest.approx(1 - label)
    [summed] = judgement_of([(answer, swapped)]).labels
    assert summed == label


def test_what_is_an_answer():
    assert [is_answer(value) for value in ("tie", 0, 1.0, 0.5)] == [True] * 4
    assert [is_answer(value) for value in (1.01, -0.1, math.nan, True, None, "A", [0.5])] == [False] * 7


@given(st.one_of(st.none(), st.text(max_size=8), st.floats(), st.booleans(), st.integers(), st.lists(st.floats())))
def test_nothing_but_words_and_probabilities_are_answers(value):
    word = isinstance(value, str) and value in ("first", "second", "tie")
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    assert is_answer(value) == (word or number)


def test_clamp_by_hand():
    assert [clamped(label, REASONED) for label in (0.0, 0.45, 1.0)] == [0.4, 0.45, 0.6]
    assert [clamped(label, (0.0, 1.0)) for label in (0.0, 1.0)] == [0.0, 1.0]
    for bounds in ((0.6, 0.4), (0.6, 0.7), (-0.1, 0.6), (0.4, math.nan)):
        with pytest.raises(ValueError, match="both sides of 0.5"):
            clamped(0.5, bounds)
