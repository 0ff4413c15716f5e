"""What asking a language model costs, and a limit to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from threading import Lock


class BudgetSpentError(RuntimeError):
    """There is nothing left to ask with."""


@dataclass(frozen=True)
class Usage:
    """What was asked of a model so far.

    Attributes:
        calls: Requests, those that were repeated or failed too.
        prompt_tokens: Tokens that the model read.
        completion_tokens: Tokens that it wrote.
        seconds: Time of all that were answered, waits included; those at the same time count each.
        estimated: Whether some of the tokens are an estimate (one for 3 bytes), since the endpoint did not say.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    estimated: bool = False

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """Return the price of the tokens.

        Args:
            prompt_price: Price of a million tokens read.
            completion_price: Price of a million tokens written.

        Example:
            >>> Usage(prompt_tokens=2_000_000, completion_tokens=500_000).cost(0.5, 2.0)
            2.0
        """
        return (self.prompt_tokens * prompt_price + self.completion_tokens * completion_price) / 1e6


class Budget:
    """Count what is asked, and stop before more is asked than was allowed. Threads may share one.

    A budget of tokens is spent when it is reached: the requests that are under way then still end.

    Args:
        calls: Most requests. `None`: any number.
        tokens: Most tokens, read and written. `None`: any number.

    Raises:
        ValueError: If a limit is negative.

    Example:
        >>> budget = Budget(calls=1)
        >>> budget.begin()
        >>> budget.add(prompt_tokens=120, completion_tokens=1, seconds=0.2)
        >>> budget.usage
        Usage(calls=1, prompt_tokens=120, completion_tokens=1, seconds=0.2, estimated=False)
        >>> budget.begin()
        Traceback (most recent call last):
        ...
        rlhf_recipes.evaluation.judges.budget.BudgetSpentError: the budget of 1 calls is spent
    """

    def __init__(self, calls: int | None = None, tokens: int | None = None) -> None:
        if any(limit is not None and limit < 0 for limit in (calls, tokens)):
            raise ValueError(f"A budget must be at least 0, got {calls} calls and {tokens} tokens.")
        self._most_calls, self._most_tokens = calls, tokens
        self._usage, self._lock = Usage(), Lock()

    @property
    def usage(self) -> Usage:
        """What was used so far."""
        return self._usage

    def begin(self) -> None:
        """Count one request, before it is made.

        Raises:
            BudgetSpentError: If there is nothing left for it.
        """
        with self._lock:
            used = self._usage
            if self._most_calls is not None and used.calls >= self._most_calls:
                raise BudgetSpentError(f"the budget of {self._most_calls} calls is spent")
            if self._most_tokens is not None and used.prompt_tokens + used.completion_tokens >= self._most_tokens:
                raise BudgetSpentError(f"the budget of {self._most_tokens} tokens is spent")
            self._usage = replace(used, calls=used.calls + 1)

    def add(
        self, prompt_tokens: int = 0, completion_tokens: int = 0, seconds: float = 0.0, estimated: bool = False
    ) -> None:
        """Add what a request took, once it has ended.

        Args:
            prompt_tokens: Tokens read.
            completion_tokens: Tokens written.
            seconds: Its time.
            estimated: Whether the tokens are an estimate.
        """
        with self._lock:
            used = self._usage
            self._usage = Usage(
                used.calls,
                used.prompt_tokens + prompt_tokens,
                used.completion_tokens + completion_tokens,
                used.seconds + seconds,
                used.estimated or estimated,
            )
