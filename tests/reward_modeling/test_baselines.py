"""Baselines of held-out pairs, against hand cases, scipy, another solver, and by symmetry."""

import json
import random

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression

from rlhf_recipes.reward_modeling import baselines
from rlhf_recipes.reward_modeling.baselines import fit_tfidf, margin_accuracy, pair_baselines, winners_and_losers
from rlhf_recipes.statistics.metrics import proportion_interval

GOOD, BAD = "good warm great funny".split(), "bad dull cold boring".split()
NEUTRAL = "the film was and but this play of".split()


def make_pairs(count, seed=0, prompts=12):
    """Pairs of random sentences with one telling word each, whose lengths say nothing."""
    rng = random.Random(seed)

    def sentence(telling):
        words = [*rng.choices(NEUTRAL, k=rng.randint(3, 9)), rng.choice(telling)]
        rng.shuffle(words)
        return " ".join(words)

    prompt = [f"prompt {rng.randrange(prompts)}" for _ in range(count)]
    return {
        "prompt": prompt,
        "chosen": [sentence(GOOD) for _ in prompt],
        "rejected": [sentence(BAD) for _ in prompt],
    }


def swapped(rows):
    return {**rows, "chosen": rows["rejected"], "rejected": rows["chosen"]}


def accuracies(train, test):
    measured = pair_baselines(Dataset.from_dict(train), Dataset.from_dict(test))
    return {name: baseline["accuracy"] for name, baseline in measured.items()}


def test_lengths_by_hand():
    chosen = ["four", "six", "  four  ", "ab", "a", "long one"]  # characters: 4, 3, 4, 2, 1, 8
    rejected = ["six", "four", "five", "a", "abc", "short"]  # 3, 4, 4, 1, 3, 5
    test = {"prompt": ["p"] * 6, "chosen": chosen, "rejected": rejected}
    measured = pair_baselines(Dataset.from_dict(make_pairs(60)), Dataset.from_dict(test))
    assert measured["longer"]["accuracy"] == pytest.approx(3.5 / 6)
    assert measured["shorter"]["accuracy"] == pytest.approx(2.5 / 6)
    assert measured["tfidf"]["accuracy"] == 0.5, "no known word: nothing tells the two apart"
    assert {baseline["n"] for baseline in measured.values()} == {6}


def test_a_rule_that_never_decides_is_half_right():
    measured = margin_accuracy([0.0] * 10)
    assert measured["accuracy"] == 0.5
    assert_allclose(measured["accuracy_ci"], [0.2366, 0.7634], atol=5e-5)


@given(st.lists(st.sampled_from([-2.0, 0.5]), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_wilsons(margins, level):
    measured = margin_accuracy(margins, level)
    right = sum(margin > 0 for margin in margins)
    assert measured["accuracy"] == right / len(margins)
    assert_allclose(measured["accuracy_ci"], proportion_interval(right, len(margins), level), atol=1e-12)


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 1000))
def test_swapped_sides(seed):
    train, test = make_pairs(40, seed), make_pairs(17, seed + 1)
    plain = accuracies(train, test)
    turned = accuracies(train, swapped(test))
    assert_allclose([turned[name] for name in plain], [1 - plain[name] for name in plain])
    both = accuracies(swapped(train), swapped(test))
    assert both["tfidf"] == pytest.approx(plain["tfidf"])
    assert both["longer"] == turned["longer"]


def test_words_are_learned_and_hold_for_other_pairs():
    measured = accuracies(make_pairs(200), make_pairs(100, seed=1))
    assert measured["tfidf"] == 1.0
    assert 0.3 < measured["longer"] < 0.7


def test_labels_without_a_rule_stay_at_chance():
    rng = random.Random(3)
    rows = make_pairs(300)
    for index in range(300):
        if rng.random() < 0.5:
            rows["chosen"][index], rows["rejected"][index] = rows["rejected"][index], rows["chosen"][index]
    scorer = fit_tfidf(Dataset.from_dict(rows))
    assert scorer.strength == pytest.approx(0.1), "the strongest penalty"
    assert 0.3 < accuracies(rows, make_pairs(200, seed=5))["tfidf"] < 0.7


def test_scores_are_those_of_both_orders_fitted_with_half_the_weight():
    """Every pair given in both orders, without an intercept: the same optimum, found by another solver."""
    rows = make_pairs(50)
    rows["chosen"][:10], rows["rejected"][:10] = rows["rejected"][:10], rows["chosen"][:10]
    scorer = fit_tfidf(Dataset.from_dict(rows))
    chosen, rejected = (scorer.vectorizer.transform(rows[side]).toarray() for side in ("chosen", "rejected"))
    difference = chosen - rejected
    oracle = LogisticRegression(C=scorer.strength / 2, fit_intercept=False, solver="lbfgs", tol=1e-10, max_iter=5000)
    oracle.fit(np.vstack([difference, -difference]), [1] * 50 + [0] * 50)
    margins = scorer(rows["chosen"]) - scorer(rows["rejected"])
    assert_allclose(margins, difference @ oracle.coef_[0], rtol=1e-2, atol=1e-3)


def test_order_of_the_rows_does_not_matter():
    rows = Dataset.from_dict(make_pairs(60))
    shuffled = fit_tfidf(rows.shuffle(seed=1))
    assert shuffled.strength == fit_tfidf(rows).strength
    assert_allclose(shuffled(rows["chosen"]), fit_tfidf(rows)(rows["chosen"]), atol=1e-3)


@pytest.mark.parametrize("prompts", [1, 12])
def test_no_prompt_or_text_is_on_both_sides_of_a_fold(prompts, monkeypatch):
    """What the folds are made of is read off the rows that the fits and the held-out margins use."""
    rows = make_pairs(80, prompts=prompts)
    rows["chosen"][40:] = rows["chosen"][:40]  # every chosen text is in two pairs
    seen = []
    monkeypatch.setattr(baselines, "_choose_strength", lambda differences, folds: seen.extend(folds) or 1.0)
    fit_tfidf(Dataset.from_dict(rows))
    folds = np.array(seen)
    sides = ("prompt", "prompt") if prompts > 1 else ("chosen", "rejected")
    keys = list(zip(*(rows[side] for side in sides), strict=True))
    for fold in range(5):
        inside = folds == fold
        held_out = {key for key, sides in zip(keys, inside, strict=True) if sides.all() for key in key}
        fitted = {key for key, sides in zip(keys, inside, strict=True) if not sides.any() for key in key}
        assert held_out
        assert fitted
        assert not held_out & fitted


def test_one_pair_is_enough():
    scorer = fit_tfidf(Dataset.from_dict({"prompt": ["a"], "chosen": ["so good !"], "rejected": ["so bad"]}))
    good, bad, mark, so = scorer(["good", "bad", "!", "so"])
    assert good > 0 > bad
    assert mark > 0
    assert abs(so) < good
    assert scorer.strength == 1.0


def test_chats_are_read_like_texts():
    def chats(rows):
        def chat(role, text):
            return [{"role": role, "content": text}]

        return {
            "prompt": [chat("user", text) for text in rows["prompt"]],
            "chosen": [chat("assistant", text) for text in rows["chosen"]],
            "rejected": [chat("assistant", text) for text in rows["rejected"]],
        }

    train, test = make_pairs(60), make_pairs(30, seed=1)
    assert accuracies(chats(train), chats(test)) == accuracies(train, test)


def test_contents_in_parts_and_without_text():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image", "text": None}]}]
    pairs = Dataset.from_list([{"prompt": "p", "chosen": parts, "rejected": []}])
    assert winners_and_losers(pairs) == (["a\n"], [""])
    silent = Dataset.from_list([{"prompt": "p", "chosen": [{"role": "assistant", "content": None}], "rejected": []}])
    assert winners_and_losers(silent) == ([""], [""])


def test_ties_are_left_out_and_labels_below_one_half_turn_a_pair_round():
    train, test = make_pairs(60), make_pairs(30, seed=1)
    tie = {"prompt": "tie", "chosen": "good good good film", "rejected": "bad"}

    def labelled(rows):
        turned = [
            {"prompt": prompt, "chosen": a, "rejected": b, "label": 1.0}
            if index % 2
            else {"prompt": prompt, "chosen": b, "rejected": a, "label": 0.1}
            for index, (prompt, a, b) in enumerate(zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True))
        ]
        return Dataset.from_list([*turned, *[{**tie, "label": 0.5}] * 7])

    plain = pair_baselines(Dataset.from_dict(train), Dataset.from_dict(test))
    assert pair_baselines(labelled(train), labelled(test)) == plain
    assert plain["tfidf"]["n"] == 30
    missing = Dataset.from_list([{**tie, "label": None}, {**tie, "label": 0.0}])
    assert winners_and_losers(missing) == (["good good good film", "bad"], ["bad", "good good good film"])


def test_the_result_can_be_written_as_json():
    measured = pair_baselines(Dataset.from_dict(make_pairs(60)), Dataset.from_dict(make_pairs(9)), level=0.9)
    assert json.loads(json.dumps(measured)) == measured
    assert set(measured["tfidf"]) == {"accuracy", "accuracy_ci", "n", "C", "features"}


class TestBadInput:
    def test_other_columns(self):
        rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
        with pytest.raises(ValueError, match="`rejected`; missing: chosen, rejected. Give rows as `to_preferences`"):
            pair_baselines(rows, rows)

    def test_no_word(self):
        rows = Dataset.from_dict({"prompt": ["a"], "chosen": [" "], "rejected": [""]})
        with pytest.raises(ValueError, match="no word in the completions of the 1 training pairs"):
            fit_tfidf(rows)

    def test_no_pair_to_measure(self):
        with pytest.raises(ValueError, match="no pair"):
            margin_accuracy([])
