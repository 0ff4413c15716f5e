"""The gold score: what a review of the embedded world is truly worth, known exactly because it is computed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_recipes.data.synthetic import grammar


@dataclass(frozen=True)
class GoldWeights:
    """Worth of each quality of a review, in gold points.

    Attributes:
        sentiment: Limit of the sentiment term `sentiment * tanh((praise - blame) / 3)`, counted in distinct words.
        substance: Per distinct aspect of the right topic, up to `substance_cap` of them. Without it the best review
            is the shortest one.
        substance_cap: Number of aspects after which more add nothing.
        repetition: Per content word that was said before.
        off_topic: Per aspect of a wrong topic.
        malformed: Per pair of neighbouring words that the grammar never writes. Without it a heap of praise without
            any grammar is worth as much as a review.
        unfinished: Once, if the review was cut off before its end token.
        overlong: Per word beyond `free_words`.
        free_words: Number of words that cost nothing.
    """

    sentiment: float = 3.0
    substance: float = 0.3
    substance_cap: int = 6
    repetition: float = -0.5
    off_topic: float = -0.4
    malformed: float = -1.0
    unfinished: float = -1.5
    overlong: float = -0.1
    free_words: int = 20


class GoldScore:
    """Callable with TRL's reward signature that gives every completion its gold score.

    Any text can be scored: words that the world does not know count as malformed. The score is finite, at most
    `sentiment + substance * substance_cap`, and falls without limit for long nonsense.

    Args:
        eos_token_id: Id of the token that ends a completion.
        positive: Words of praise.
        negative: Words of blame.
        topics: `things` and `aspects` of each topic, by its name.
        word_classes: The words of each class.
        allowed_bigrams: Pairs of neighbouring word classes that are well formed.
        weights: What each quality is worth.

    Example:
        >>> gold = GoldScore.of_grammar(eos_token_id=1)
        >>> prompts = ["we tried the tent at the lake :"] * 2
        >>> reviews = ["the bed was lovely .", "the bed bed bed"]
        >>> [round(score, 2) for score in gold(prompts, reviews, completion_ids=[[8, 9, 5, 4, 7, 1], [8, 9, 9, 9]])]
        [1.26, -4.2]
    """

    __name__ = "gold_score"

    def __init__(
        self,
        eos_token_id: int,
        positive: Sequence[str],
        negative: Sequence[str],
        topics: dict[str, dict[str, Sequence[str]]],
        word_classes: dict[str, Sequence[str]],
        allowed_bigrams: Sequence[Sequence[str]],
        weights: GoldWeights,
    ) -> None:
        self.eos_token_id = eos_token_id
        self.weights = weights
        self._positive, self._negative = frozenset(positive), frozenset(negative)
        self._topic_of_thing = {thing: name for name, topic in topics.items() for thing in topic["things"]}
        self._topic_of_aspect = {aspect: name for name, topic in topics.items() for aspect in topic["aspects"]}
        self._class_of = {word: name for name, words in word_classes.items() for word in words}
        self._allowed = frozenset((first, second) for first, second in allowed_bigrams)

    @classmethod
    def of_grammar(cls, eos_token_id: int, weights: GoldWeights | None = None) -> GoldScore:
        """Build the gold score of the reviews that `grammar` writes."""
        return cls(**_definition(eos_token_id), weights=weights or GoldWeights())

    @classmethod
    def from_file(cls, path: str | Path) -> GoldScore:
        """Read a gold score that `write_gold` wrote; the file alone defines it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not JSON or does not define a gold score.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no gold score at {str(path)!r}. Make the world first, which writes it.")
        try:
            definition = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**definition, "weights": GoldWeights(**definition["weights"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} does not define a gold score ({error}). Make the world again.") from error

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Score completions.

        Args:
            prompts: `B` prompts.
            completions: `B` completions, without special tokens.
            completion_ids: Their token ids, which tell whether the end token was produced. Without them every
                completion counts as finished.
            **kwargs: Anything else that a trainer passes; not used.

        Returns:
            `B` scores in gold points.
        """
        endings = [True] * len(prompts)
        if completion_ids is not None:
            endings = [self.eos_token_id in ids for ids in completion_ids]
        rows = zip(prompts, completions, endings, strict=True)
        return [sum(self.parts(prompt, completion, finished).values()) for prompt, completion, finished in rows]

    def parts(self, prompt: str, completion: str, finished: bool = True) -> dict[str, float]:
        """Return the parts of the score: signed gold points by quality; their sum is the score."""
        words, weights = completion.split(), self.weights
        topic = self._topic(prompt.split())
        distinct = set(words)
        mood = len(distinct & self._positive) - len(distinct & self._negative)
        on_topic = sum(self._topic_of_aspect.get(word) == topic for word in distinct) if topic else 0
        off_topic = sum(self._topic_of_aspect.get(word, topic) != topic for word in words)
        return {
            "sentiment": weights.sentiment * math.tanh(mood / 3),
            "substance": weights.substance * min(on_topic, weights.substance_cap),
            "repetition": weights.repetition * self._repetitions(words),
            "off_topic": weights.off_topic * off_topic,
            "malformed": weights.malformed * self._malformed(words, finished),
            "unfinished": 0.0 if finished else weights.unfinished,
            "overlong": weights.overlong * max(0, len(words) - weights.free_words),
        }

    def _topic(self, words: list[str]) -> str | None:
        """The topic of the first thing that a prompt names; without one, that of most of its aspects."""
        things = [self._topic_of_thing[word] for word in words if word in self._topic_of_thing]
        aspects = Counter(self._topic_of_aspect[word] for word in words if word in self._topic_of_aspect)
        return next(iter(things), None) or next((topic for topic, _ in aspects.most_common(1)), None)

    def _repetitions(self, words: list[str]) -> int:
        content = [word for word in words if self._class_of.get(word) in ("aspect", "adjective", "verb")]
        return len(content) - len(set(content))

    def _malformed(self, words: list[str], finished: bool) -> int:
        classes = [grammar.START, *(self._class_of.get(word, "unknown") for word in words)]
        return sum(pair not in self._allowed for pair in pairwise(classes + [grammar.END] * finished))


def write_gold(path: str | Path, eos_token_id: int, weights: GoldWeights | None = None) -> None:
    """Write all that defines the gold score of this world's reviews as JSON."""
    definition = {**_definition(eos_token_id), "weights": asdict(weights or GoldWeights())}
    Path(path).write_text(json.dumps(definition, indent=1) + "\n", encoding="utf-8")


def _definition(eos_token_id: int) -> dict[str, Any]:
    sides = (grammar.POSITIVE, grammar.NEGATIVE)
    positive, negative = ((*grammar.ADJECTIVES[side], *grammar.VERBS[side]) for side in sides)
    return {
        "eos_token_id": eos_token_id,
        "positive": positive,
        "negative": negative,
        "topics": {name: topic._asdict() for name, topic in grammar.TOPICS.items()},
        "word_classes": grammar.WORD_CLASSES,
        "allowed_bigrams": sorted(grammar.allowed_bigrams()),
    }
