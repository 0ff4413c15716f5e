"""A judge's grade of one completion as a reward: the expected value under the probabilities of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_recipes.evaluation.judges.asking import ask_each
from rlhf_recipes.evaluation.judges.language import LanguageModel
from rlhf_recipes.evaluation.judges.questions import GRADE_QUESTION, fill
from rlhf_recipes.messages import as_text


class GradeReward:
    """Pay the grade that a language model expects to give: `sum_g g p(g) / sum_g p(g)` over the whole grades.

    A completion that gets no grade (the model fails, or has something else to say) has no reward of this function,
    `None`. PPO then pays what other functions say of it, and stops where none says anything.

    Source: https://huggingface.co/papers/2309.00267, direct RLAIF (not checked against the paper's text).

    Args:
        model: The model: a `LocalModel` or an `EndpointModel`.
        criterion: What the grade is to measure.
        low: Lowest grade, a whole number.
        high: Highest grade. Take 0 to 9 for ten grades at an endpoint: many models write 10 as two tokens, which only
            a `LocalModel` can tell from a 1.
        name: Name of the reward in the logs.
        least_mass: Where all grades together are less probable than this, there is no grade.
        workers: Completions at the same time, for an endpoint.
        give_up_after: After this many failures in a row the rest of the completions is not asked about.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> class Strict:
        ...     def weigh(self, messages, options):
        ...         return {"1": 0.5, "2": 0.0, "3": 0.25}
        >>> GradeReward(Strict(), "Is it polite?", high=3)(prompts=["Hi"], completions=["No."])
        [1.6666666666666667]
    """

    def __init__(
        self,
        model: LanguageModel,
        criterion: str,
        *,
        low: int = 1,
        high: int = 5,
        name: str = "grade",
        least_mass: float = 0.5,
        workers: int = 1,
        give_up_after: int = 5,
    ) -> None:
        if not 0 <= low < high or not 0 <= least_mass <= 1 or workers < 1 or give_up_after < 1:
            raise ValueError(
                "`low` must be at least 0 and below `high`, `least_mass` from 0 to 1, `workers` and `give_up_after` "
                f"at least 1, got {low}, {high}, {least_mass:g}, {workers} and {give_up_after}."
            )
        self.__name__ = name
        self._model, self._criterion, self._grades = model, criterion, range(low, high + 1)
        self._least_mass, self._workers, self._give_up_after = least_mass, workers, give_up_after

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        """Return a grade for each completion, or `None`."""
        rows = list(zip(map(as_text, prompts), map(as_text, completions), strict=True))
        asked = ask_each(
            rows,
            self._grade,
            name=f"The judge {self.__name__}",
            workers=self._workers,
            give_up_after=self._give_up_after,
        )
        return asked.answers

    def _grade(self, row: tuple[str, str]) -> float | None:
        prompt, answer = row
        low, high = str(self._grades[0]), str(self._grades[-1])
        asked = fill(GRADE_QUESTION, prompt=prompt, answer=answer, criterion=self._criterion, low=low, high=high)
        weights = self._model.weigh([{"role": "user", "content": asked}], [str(grade) for grade in self._grades])
        mass = sum(weights.values())
        if mass <= 0 or mass < self._least_mass:
            return None
        return sum(grade * weights[str(grade)] for grade in self._grades) / mass
