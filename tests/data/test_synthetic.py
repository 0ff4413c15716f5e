"""The embedded world: its grammar, its gold score against sums made by hand, and its annotator's statistics."""

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.data.synthetic import Annotator, Completion, GoldScore, GoldWeights, write_gold
from rlhf_recipes.data.synthetic.grammar import (
    END,
    START,
    WORD_CLASSES,
    Style,
    allowed_bigrams,
    rating,
    split_prompts,
    topic_of,
    vocabulary,
    write_review,
)

PROMPT = "we tried the soup at the inn :"
GOLD = GoldScore.of_grammar(eos_token_id=1)
BASE = dict.fromkeys(("sentiment", "substance", "repetition", "off_topic", "malformed", "unfinished", "overlong"), 0.0)


@pytest.mark.parametrize(
    ("review", "finished", "expected"),
    [
        ("the sauce was lovely .", True, {"sentiment": 3 * math.tanh(1 / 3), "substance": 0.3}),
        ("the sauce was awful .", True, {"sentiment": -3 * math.tanh(1 / 3), "substance": 0.3}),
        ("the sauce was plain .", True, {"substance": 0.3}),
        ("we loved the spice and the crust felt great .", True, {"sentiment": 3 * math.tanh(2 / 3), "substance": 0.6}),
        ("the bed was plain .", True, {"off_topic": -0.4}),
        ("the sauce was plain .", False, {"substance": 0.3, "unfinished": -1.5}),
        ("the sauce was plain and the sauce was plain .", True, {"substance": 0.3, "repetition": -1.0}),
        (
            "the sauce was lovely lovely .",
            True,
            {"sentiment": 3 * math.tanh(1 / 3), "substance": 0.3, "repetition": -0.5, "malformed": -1.0},
        ),
        ("we", True, {"malformed": -1.0}),  # a pronoun does not end a review
        ("", True, {"malformed": -1.0}),
        ("xyzzy", True, {"malformed": -2.0}),
        (
            "lovely " * 30,
            False,
            {
                "sentiment": 3 * math.tanh(1 / 3),
                "repetition": -0.5 * 29,
                "malformed": -1.0 * 30,
                "unfinished": -1.5,
                "overlong": -1.0,
            },
        ),
    ],
)
def test_the_gold_score_equals_a_sum_made_by_hand(review, finished, expected):
    parts = GOLD.parts(PROMPT, review, finished)
    assert parts == pytest.approx(BASE | expected)
    assert GOLD([PROMPT], [review], [[5, 1] if finished else [5]]) == [pytest.approx(sum(parts.values()))]


@given(st.text(), st.text(), st.booleans())
def test_any_text_has_a_finite_score(prompt, completion, finished):
    assert math.isfinite(sum(GOLD.parts(prompt, completion, finished).values()))


def test_the_file_alone_defines_the_score(tmp_path):
    weights = GoldWeights(sentiment=1.0, malformed=-2.0)
    write_gold(tmp_path / "gold.json", eos_token_id=7, weights=weights)
    read, made = GoldScore.from_file(tmp_path / "gold.json"), GoldScore.of_grammar(7, weights)
    rng = random.Random(0)
    reviews = [write_review(PROMPT, Style(), rng) for _ in range(50)] + ["we we", "lovely"]
    ids = [[7]] * 26 + [[8]] * 26
    assert read([PROMPT] * 52, reviews, ids) == made([PROMPT] * 52, reviews, ids)
    assert read.__name__ == "gold_score"


def test_a_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no gold score at"):
        GoldScore.from_file(tmp_path / "gold.json")
    for text in ("not json", json.dumps({"weights": {}}), json.dumps([])):
        (tmp_path / "gold.json").write_text(text)
        with pytest.raises(ValueError, match="does not define a gold score"):
            GoldScore.from_file(tmp_path / "gold.json")


def test_the_grammar_writes_only_allowed_bigrams_and_known_words():
    class_of = {word: name for name, words in WORD_CLASSES.items() for word in words}
    rng, seen = random.Random(1), set()
    words = set(vocabulary())
    for _ in range(2000):
        review = write_review(PROMPT, Style(), rng).split()
        assert words.issuperset(review)
        seen |= set(pairwise([START, *(class_of[word] for word in review), END]))
    assert seen == allowed_bigrams(), "every allowed pair occurs, and no other"


def test_the_same_seed_writes_the_same_world():
    worlds = [[write_review(PROMPT, Style(), random.Random(seed)) for _ in range(3)] for seed in (1, 1, 2)]
    assert worlds[0] == worlds[1] != worlds[2]


def test_held_out_prompts_share_no_combination_with_training():
    train, test = split_prompts(0.25, random.Random(0))
    keys = [{tuple(prompt.split()[3::3]) for prompt in side} for side in (train, test)]
    assert not keys[0] & keys[1]
    assert len(set(train)) == len(train)
    assert len(test) >= 256
    assert topic_of("we tried the ferry at the pier :") == "ride"
    with pytest.raises(ValueError, match="held_out"):
        split_prompts(0.0, random.Random(0))
    with pytest.raises(ValueError, match="names no thing"):
        topic_of("what is the time ?")


@pytest.mark.parametrize(
    ("review", "stars"),
    [
        ("the sauce was plain .", "three stars"),
        ("the sauce was lovely .", "four stars"),
        ("we loved the lovely great sauce .", "five stars"),
        ("the sauce was awful .", "two stars"),
        ("we hated the awful nasty sauce .", "one stars"),
    ],
)
def test_ratings_count_praise_less_blame(review, stars):
    assert rating(review) == stars


def choices(first, second, n=4000, **settings):
    annotator = Annotator(GOLD, **settings)
    found = [annotator.choose(PROMPT, Completion(first), Completion(second)) for _ in range(n)]
    return {choice: found.count(choice) / n for choice in ("first", "second", "tie")}


def test_the_annotator_chooses_with_bradley_terry_probabilities_and_lapses():
    good, bad = "the sauce was lovely .", "the sauce was plain ."
    difference = 3 * math.tanh(1 / 3)
    for lapse in (0.0, 0.2):
        expected = lapse / 2 + (1 - lapse) / (1 + math.exp(-difference / 0.7))
        found = choices(good, bad, temperature=0.7, lapse=lapse)
        assert found["first"] == pytest.approx(expected, abs=0.025)
        assert found["tie"] == 0.0
        assert choices(bad, good, temperature=0.7, lapse=lapse)["second"] == pytest.approx(expected, abs=0.025)


def test_differences_that_are_not_noticed_are_ties():
    assert choices("the sauce was plain .", "the spice was plain .", n=50, lapse=0.0)["tie"] == 1.0
    assert choices("the sauce was plain .", "the spice was plain .", n=50, lapse=0.0, tie_margin=0.0)["tie"] == 0.0
    assert choices("the sauce was lovely .", "the sauce was plain .", n=50, lapse=0.0, temperature=0.0)["first"] == 1.0


REVIEWS = [Completion(f"the sauce was {word} .") for word in ("plain", "lovely", "awful")]


def rankings(n=4000, **settings):
    annotator = Annotator(GOLD, **{"tie_margin": 0.0, **settings})
    return [annotator.rank(PROMPT, REVIEWS) for _ in range(n)]


def test_any_two_of_a_ranking_stand_in_bradley_terry_order():
    step = 3 * math.tanh(1 / 3)
    differences = {(1, 0): step, (0, 2): step, (1, 2): 2 * step}  # lovely, plain, awful
    for lapse in (0.0, 0.2):
        found = rankings(temperature=1.5, lapse=lapse)
        assert all(sorted(ranks) == [1, 2, 3] for ranks in found)
        for (better, worse), difference in differences.items():
            expected = lapse / 2 + (1 - lapse) / (1 + math.exp(-difference / 1.5))
            share = sum(ranks[better] < ranks[worse] for ranks in found) / len(found)
            assert share == pytest.approx(expected, abs=0.025)


def test_a_ranking_without_noise_is_the_order_and_what_is_alike_shares_a_rank():
    calm = {"temperature": 0.0, "lapse": 0.0}
    assert rankings(n=3, **calm) == [[2, 1, 3]] * 3
    alike = 3 * math.tanh(1 / 3) + 0.1
    assert rankings(n=1, **calm, tie_margin=alike) == [[1, 1, 2]], "a rank holds what is near to its best one"
    assert rankings(n=1, **calm, tie_margin=10.0) == [[1, 1, 1]]
    assert len({tuple(ranks) for ranks in rankings(n=200, temperature=0.0, lapse=1.0)}) == 6
    with pytest.raises(ValueError, match="compares two or more completions, got 1"):
        Annotator(GOLD).rank(PROMPT, REVIEWS[:1])


def test_the_annotator_refuses_impossible_noise():
    for settings in ({"temperature": -1.0}, {"lapse": 1.5}, {"tie_margin": -0.1}):
        with pytest.raises(ValueError, match="must not be negative"):
            Annotator(GOLD, **settings)


def test_the_best_of_several_is_chosen_by_luces_rule_and_lapses():
    moods = ["was plain", "was lovely", "was really gorgeous", "was awful"]
    reviews = [f"the sauce {mood} ." for mood in moods]
    scores = [sum(GOLD.parts(PROMPT, review).values()) for review in reviews]
    weights = [math.exp(score / 0.9) for score in scores]
    annotator = Annotator(GOLD, temperature=0.9, lapse=0.2)
    found = [annotator.choose_best(PROMPT, [Completion(review) for review in reviews]) for _ in range(4000)]
    for index, weight in enumerate(weights):
        expected = 0.2 / 4 + 0.8 * weight / sum(weights)
        assert found.count(index) / 4000 == pytest.approx(expected, abs=0.025)
    sure = Annotator(GOLD, temperature=0.0, lapse=0.0)
    twice = [Completion(reviews[index]) for index in (0, 2, 2)]
    assert {sure.choose_best(PROMPT, twice) for _ in range(50)} == {1, 2}
    with pytest.raises(ValueError, match="at least two completions, got 1"):
        sure.choose_best(PROMPT, [Completion("the sauce was plain .")])


def test_a_prompt_without_a_thing_has_the_topic_of_most_of_its_aspects():
    prompt = "the sauce was plain . the spice was plain . the bed was awful ."
    assert GOLD.parts(prompt, "the crust was plain .")["off_topic"] == 0.0
    assert GOLD.parts(prompt, "the bed was plain .")["off_topic"] < 0.0
    assert GOLD.parts("we tried the tent . the sauce was plain .", "the bed was plain .")["off_topic"] == 0.0
