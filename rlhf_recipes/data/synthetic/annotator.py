"""A simulated annotator, who prefers completions with higher gold scores, with the noise of a real one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rlhf_recipes.data.synthetic.gold import GoldScore

Choice = Literal["first", "second", "tie"]


class Completion(NamedTuple):
    """A completion as an annotator sees it: its text, and whether it has ended."""

    text: str
    finished: bool = True


class Annotator:
    """Chooses between two completions, picks the best of several or ranks them, like a noisy human.

    With probability `lapse` the choice is a coin flip. Otherwise scores closer than `tie_margin` are a tie, and
    else `first` wins with the Bradley-Terry probability `sigmoid((gold_first - gold_second) / temperature)`.

    Source: R. A. Bradley and M. E. Terry, "Rank Analysis of Incomplete Block Designs", 1952, and for several
    R. D. Luce, "Individual Choice Behavior", 1959, with the constant error rate of
    https://huggingface.co/papers/1706.03741, section 2.2.3.

    Args:
        gold: The score that it perceives.
        temperature: Gold points; 0 always picks the better one.
        lapse: Share of choices made without looking, between 0 and 1.
        tie_margin: Gold points below which a difference is not noticed; 0 knows no ties.
        seed: Seed of its randomness.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> annotator = Annotator(GoldScore.of_grammar(eos_token_id=1), temperature=0.0)
        >>> prompt = "we tried the soup at the inn :"
        >>> annotator.choose(prompt, Completion("the sauce was awful ."), Completion("the sauce was great ."))
        'second'
    """

    def __init__(
        self,
        gold: GoldScore,
        temperature: float = 0.4,
        lapse: float = 0.03,
        tie_margin: float = 0.3,
        seed: int = 0,
    ) -> None:
        if temperature < 0 or tie_margin < 0 or not 0 <= lapse <= 1:
            raise ValueError(
                "`temperature` and `tie_margin` must not be negative and `lapse` must lie between 0 and 1, got "
                f"temperature={temperature}, tie_margin={tie_margin}, lapse={lapse}."
            )
        self.gold = gold
        self.temperature = temperature
        self.lapse = lapse
        self.tie_margin = tie_margin
        self._rng = random.Random(seed)

    def choose(self, prompt: str, first: Completion, second: Completion) -> Choice:
        """Choose the better completion; the choice depends only on the arguments and the state of its randomness."""
        if self._rng.random() < self.lapse:
            return "first" if self._rng.random() < 0.5 else "second"
        scores = self._scores(prompt, (first, second))
        difference = scores[0] - scores[1]
        if abs(difference) < self.tie_margin:
            return "tie"
        return "first" if self._rng.random() < self._probability(difference) else "second"

    def choose_best(self, prompt: str, completions: Sequence[Completion]) -> int:
        """Choose the best of several completions: each with a probability in proportion to `exp(gold / temperature)`.

        Args:
            prompt: What they go on from.
            completions: `K` completions; no two of them tie.

        Returns:
            Index of the chosen one, from 0.

        Raises:
            ValueError: If there are fewer than two.

        Example:
            >>> annotator = Annotator(GoldScore.of_grammar(eos_token_id=1), temperature=0.0)
            >>> reviews = [Completion(f"the sauce was {word} .") for word in ("awful", "great", "plain")]
            >>> annotator.choose_best("we tried the soup at the inn :", reviews)
            1
        """
        if len(completions) < 2:
            raise ValueError(f"A choice needs at least two completions, got {len(completions)}.")
        if self._rng.random() < self.lapse:
            return self._rng.randrange(len(completions))
        scores = [sum(self.gold.parts(prompt, *completion).values()) for completion in completions]
        best = max(scores)
        if self.temperature == 0.0:
            return self._rng.choice([index for index, score in enumerate(scores) if score == best])
        weights = [math.exp((score - best) / self.temperature) for score in scores]
        return self._rng.choices(range(len(scores)), weights)[0]

    def rank(self, prompt: str, completions: Sequence[Completion]) -> list[int]:
        """Rank completions: 1 is the best, and those whose difference from a better one is not noticed share its rank.

        Each completion is perceived at its gold score plus `temperature` times Gumbel noise of its own. Without ties
        and lapses any two of them then stand in the order that `choose` would give them, with its probability, and
        the whole is a Plackett-Luce ranking. A lapse is a random order.

        Source: J. I. Yellott, "The Relationship between Luce's Choice Axiom, Thurstone's Theory of Comparative
        Judgment, and the Double Exponential Distribution", 1977.

        Args:
            prompt: What they answer.
            completions: Two or more of them.

        Returns:
            For each completion its rank.

        Raises:
            ValueError: If there are fewer than two.

        Example:
            >>> annotator = Annotator(GoldScore.of_grammar(eos_token_id=1), temperature=0.0, lapse=0.0)
            >>> reviews = ["the sauce was awful .", "the sauce was great .", "the sauce was plain ."]
            >>> annotator.rank("we tried the soup at the inn :", [Completion(review) for review in reviews])
            [3, 1, 2]
        """
        if len(completions) < 2:
            raise ValueError(f"A ranking compares two or more completions, got {len(completions)}.")
        if self._rng.random() < self.lapse:
            return self._rng.sample(range(1, len(completions) + 1), k=len(completions))
        noise = [-math.log(self._rng.expovariate(1.0)) for _ in completions]  # Gumbel's
        perceived = [
            score + self.temperature * shift
            for score, shift in zip(self._scores(prompt, completions), noise, strict=True)
        ]
        ranks, rank, best = [0] * len(completions), 0, math.inf
        for index in sorted(range(len(completions)), key=lambda index: -perceived[index]):
            if best - perceived[index] >= self.tie_margin:
                rank, best = rank + 1, perceived[index]
            ranks[index] = rank
        return ranks

    def _scores(self, prompt: str, completions: Sequence[Completion]) -> list[float]:
        return [sum(self.gold.parts(prompt, text, finished).values()) for text, finished in completions]

    def _probability(self, difference: float) -> float:
        if self.temperature == 0.0:
            return 0.5 * (1.0 + (difference > 0) - (difference < 0))
        return 0.5 * (1.0 + math.tanh(difference / self.temperature / 2))  # the sigmoid, which cannot overflow
