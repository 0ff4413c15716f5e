"""The language of the embedded world: prompts about visits, and a grammar that writes short reviews of them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple


class Topic(NamedTuple):
    """Things that can be reviewed, and the aspects that a review of them should talk about."""

    things: tuple[str, ...]
    aspects: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOPICS = {
    "meal": Topic(_words("soup curry pizza salad"), _words("sauce spice crust portion filling texture")),
    "drink": Topic(_words("coffee tea cocoa cider"), _words("aroma foam sweetness cup blend aftertaste")),
    "lodging": Topic(_words("room suite cabin tent"), _words("bed view pillow shower carpet window")),
    "show": Topic(_words("play concert film musical"), _words("plot cast music stage ending costume")),
    "lesson": Topic(_words("lecture workshop tutorial seminar"), _words("teacher pace exercise handout topic slide")),
    "ride": Topic(_words("ferry tram taxi train"), _words("driver seat ticket speed route engine")),
}
PLACES = _words(
    "harbour station market museum castle beach park library airport bridge garden village island lake farm hotel "
    "school tower temple arena mall port valley plaza forest mill abbey inn lodge club fair pier"
)
VISITORS = _words("we they i")

POSITIVE, NEUTRAL, NEGATIVE = "positive", "neutral", "negative"
ADJECTIVES = {
    POSITIVE: _words("lovely superb charming excellent wonderful brilliant splendid great perfect gorgeous"),
    NEUTRAL: _words("plain usual ordinary typical average"),
    NEGATIVE: _words("awful dreadful horrible terrible poor nasty weak broken shabby clumsy"),
}
VERBS = {
    POSITIVE: _words("loved enjoyed admired praised adored"),
    NEUTRAL: _words("noticed expected remembered"),
    NEGATIVE: _words("hated disliked regretted resented endured"),
}
JOINERS = _words(", and but while")
STARS = _words("one two three four five")

# Word classes. `START` and `END` stand for the edges of a review: the colon before it and the end token after it.
START, END, STOP, JOINER = "start", "end", "stop", "joiner"
WORD_CLASSES = {
    "article": ("the",),
    "pronoun": VISITORS,
    "copula": _words("was seemed felt looked"),
    "adverb": _words("really quite very rather"),
    "aspect": tuple(aspect for topic in TOPICS.values() for aspect in topic.aspects),
    "adjective": tuple(word for words in ADJECTIVES.values() for word in words),
    "verb": tuple(word for words in VERBS.values() for word in words),
    JOINER: JOINERS,
    STOP: (".",),
}
CLAUSES = (
    ("article", "aspect", "copula", "adjective"),
    ("article", "aspect", "copula", "adverb", "adjective"),
    ("article", "adjective", "aspect", "copula", "adjective"),
    ("pronoun", "verb", "article", "aspect"),
    ("pronoun", "verb", "article", "adjective", "aspect"),
)
CLAUSE_COUNTS = {1: 0.10, 2: 0.35, 3: 0.35, 4: 0.20}


@dataclass(frozen=True)
class Style:
    """Mixture of the reviews of a corpus, and how clean they are; every number is a probability.

    Attributes:
        positive: Share of reviews in a good mood.
        negative: Share of reviews in a bad mood; the rest mixes praise and blame freely.
        consistency: Chance that a clause follows the mood of its review.
        off_topic: Chance that a clause talks about an aspect of some other topic.
        repetition: Chance that a clause says again what an earlier one said.
    """

    positive: float = 0.35
    negative: float = 0.35
    consistency: float = 0.95
    off_topic: float = 0.12
    repetition: float = 0.06


def vocabulary() -> list[str]:
    """Return every word of the language, each once, in a fixed order.

    Example:
        >>> words = vocabulary()
        >>> len(words) == len(set(words)), "harbour" in words
        (True, True)
    """
    things = [thing for topic in TOPICS.values() for thing in topic.things]
    words = [*_words("tried at : stars"), *STARS, *things, *PLACES]
    return list(dict.fromkeys(words + [word for words in WORD_CLASSES.values() for word in words]))


def allowed_bigrams() -> set[tuple[str, str]]:
    """Return every pair of neighbouring word classes that the grammar can write, the edges of a review included.

    Example:
        >>> ("article", "aspect") in allowed_bigrams(), ("adjective", "adjective") in allowed_bigrams()
        (True, False)
    """
    pairs = {pair for clause in CLAUSES for pair in pairwise(clause)}
    for clause in CLAUSES:
        pairs |= {(START, clause[0]), (JOINER, clause[0]), (clause[-1], JOINER), (clause[-1], STOP)}
    return pairs | {(STOP, END)}


def split_prompts(held_out: float, rng: random.Random) -> tuple[list[str], list[str]]:
    """Make every prompt and hold some out, so that no held-out combination of place and thing is trained on.

    Args:
        held_out: Share of the combinations that is held out, between 0 and 1.
        rng: Source of randomness.

    Returns:
        `(train, test)` prompts, in random order.

    Raises:
        ValueError: If `held_out` leaves one side empty.

    Example:
        >>> train, test = split_prompts(0.25, random.Random(0))
        >>> len(train), len(test), test[0]
        (1728, 576, 'they tried the play at the library :')
    """
    combinations = list(product(PLACES, (thing for topic in TOPICS.values() for thing in topic.things)))
    rng.shuffle(combinations)
    count = round(held_out * len(combinations))
    if not 0 < count < len(combinations):
        raise ValueError(f"`held_out` must leave prompts on both sides, got {held_out} of {len(combinations)}.")
    return _prompts(combinations[count:], rng), _prompts(combinations[:count], rng)


def write_review(prompt: str, style: Style, rng: random.Random) -> str:
    """Write a review that answers a prompt, without the end token.

    Args:
        prompt: One of this world's prompts.
        style: Mixture of moods and flaws.
        rng: Source of randomness.

    Returns:
        Words separated by spaces; it ends with a full stop.

    Raises:
        ValueError: If the prompt names no thing of this world.

    Example:
        >>> write_review("we tried the ferry at the pier :", Style(), random.Random(3))
        'the speed felt perfect while they enjoyed the seat while the seat felt perfect .'
    """
    return _Writer(topic_of(prompt), style, rng).write()


def topic_of(prompt: str) -> str:
    """Name the topic of the thing that a prompt asks about (`ValueError` if there is none)."""
    words = set(prompt.split())
    for name, topic in TOPICS.items():
        if words.intersection(topic.things):
            return name
    raise ValueError(f"The prompt {prompt!r} names no thing of this world; one of its words must be a thing.")


def rating(review: str) -> str:
    """Sum a review up in one to five stars, by the number of its words of praise less those of blame.

    Example:
        >>> rating("the view was lovely , we loved the bed but the carpet looked shabby .")
        'four stars'
    """
    words = set(review.split())
    praise, blame = (len(words.intersection(ADJECTIVES[side] + VERBS[side])) for side in (POSITIVE, NEGATIVE))
    steps = math.copysign(math.ceil(min(abs(praise - blame), 4) / 2), praise - blame)
    return f"{STARS[2 + int(steps)]} stars"


def _prompts(combinations: list[tuple[str, str]], rng: random.Random) -> list[str]:
    prompts = [f"{who} tried the {thing} at the {place} :" for who in VISITORS for place, thing in combinations]
    rng.shuffle(prompts)
    return prompts


class _Writer:
    """Writes one review: remembers what was said, so that it repeats itself only on purpose."""

    def __init__(self, topic: str, style: Style, rng: random.Random) -> None:
        self._topic, self._style, self._rng = topic, style, rng
        self._mood = rng.choices(
            (POSITIVE, NEGATIVE, None), (style.positive, style.negative, 1 - style.positive - style.negative)
        )[0]
        self._said: list[str] = []

    def write(self) -> str:
        words: list[str] = []
        previous = None
        for _ in range(self._rng.choices(list(CLAUSE_COUNTS), list(CLAUSE_COUNTS.values()))[0]):
            side = self._side()
            if words:
                turn = {previous, side} == {POSITIVE, NEGATIVE}
                words.append("but" if turn else self._rng.choice([joiner for joiner in JOINERS if joiner != "but"]))
            words += self._clause(side)
            previous = side
        return " ".join([*words, "."])

    def _side(self) -> str:
        if self._mood is not None and self._rng.random() < self._style.consistency:
            return self._mood
        return self._rng.choice((POSITIVE, NEUTRAL, NEGATIVE))

    def _clause(self, side: str) -> list[str]:
        topic = self._topic
        if self._rng.random() < self._style.off_topic:
            topic = self._rng.choice([other for other in TOPICS if other != topic])
        choices = {"aspect": TOPICS[topic].aspects, "adjective": ADJECTIVES[side], "verb": VERBS[side]}
        again = self._rng.random() < self._style.repetition
        return [
            self._pick(choices[name], again) if name in choices else self._rng.choice(WORD_CLASSES[name])
            for name in self._rng.choice(CLAUSES)
        ]

    def _pick(self, words: tuple[str, ...], again: bool) -> str:
        options = [word for word in words if (word in self._said) == again]
        word = self._rng.choice(options or words)
        self._said.append(word)
        return word
