"""Ask many questions of something that may fail, without ever raising for it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

from rlhf_recipes.evaluation.judges.budget import BudgetSpentError

logger = logging.getLogger(__name__)

_LONGEST_PROBLEM = 300  # characters

Question = TypeVar("Question")
Reply = TypeVar("Reply")


@dataclass
class Asked(Generic[Reply]):
    """The answers to `N` questions.

    Attributes:
        answers: An answer to each, or `None`.
        not_asked: Which of them were not asked.
        stopped: Why they were not; empty if all were asked.
        problems: How often each kind of failure came, by its message.
    """

    answers: list[Reply | None]
    not_asked: set[int] = field(default_factory=set)
    stopped: str = ""
    problems: Counter[str] = field(default_factory=Counter)


def ask_each(
    questions: Sequence[Question],
    ask: Callable[[Question], Reply | None],
    *,
    name: str,
    known: Callable[[Question], Reply | None] = lambda question: None,
    workers: int = 1,
    give_up_after: int = 5,
) -> Asked[Reply]:
    """Ask questions until all are asked, the budget is spent, or too many in a row fail.

    Args:
        questions: The questions.
        ask: Answers one. What it raises is a failure, and `None` too.
        name: Who is asked, for the log, which has each kind of failure once.
        known: Answers that need not be asked for, also when nothing more is asked.
        workers: Questions at the same time.
        give_up_after: Failures in a row after which nothing more is asked.

    Returns:
        The answers, and what went wrong.

    Example:
        >>> ask_each([1, 0, 2], lambda number: 6 // number, name="divisor").answers
        [6, None, 3]
    """
    watch = _Watch(name, give_up_after, len(questions))

    def answer(number: int) -> Reply | None:
        question = questions[number]
        if (already := known(question)) is not None:
            return already
        if watch.asked.stopped:
            watch.pass_over(number)
            return None
        try:
            reply = ask(question)
        except BudgetSpentError as error:
            watch.pass_over(number, str(error))
            return None
        except Exception as error:  # somebody else's code or service
            watch.failed(f"{type(error).__name__}: {error}")
            return None
        if reply is None:
            watch.failed("what was said is no answer")
        else:
            watch.succeeded()
        return reply

    with ThreadPoolExecutor(workers) as pool:
        watch.asked.answers = list(pool.map(answer, range(len(questions))))
    return watch.asked


class _Watch:
    """What goes wrong, for all workers together."""

    def __init__(self, name: str, give_up_after: int, count: int) -> None:
        self.asked: Asked[Any] = Asked([None] * count)
        self._name, self._give_up_after, self._in_a_row, self._lock = name, give_up_after, 0, Lock()

    def failed(self, problem: str) -> None:
        problem = problem[:_LONGEST_PROBLEM]
        with self._lock:
            if not self.asked.problems[problem]:
                logger.warning("%s failed: %r", self._name, problem)
            self.asked.problems[problem] += 1
            self._in_a_row += 1
            if self._in_a_row >= self._give_up_after:
                self.asked.stopped = f"{self._in_a_row} failures in a row"

    def succeeded(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def pass_over(self, number: int, reason: str = "") -> None:
        with self._lock:
            self.asked.not_asked.add(number)
            self.asked.stopped = self.asked.stopped or reason
