"""Errors of reward functions, found where they happen and named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from trl.trainer.utils import get_callable_name, is_async_callable

RewardFunction = Callable[..., Any]


def checked(function: RewardFunction) -> RewardFunction:
    """Wrap a reward function, plain or async, so that what it returns is checked.

    A function may return `None` for a completion that it does not judge; that function is then left out of that
    completion's reward. `NaN` and infinity are errors: they would silently ruin the policy.

    Args:
        function: A reward function with TRL's signature.

    Returns:
        A callable with the same name, which raises `RuntimeError` if the function raises, `TypeError` if it returns
        something that is not a number, and `ValueError` if it returns the wrong number of rewards, `NaN` or infinity.

    Example:
        >>> def short(completions, **kwargs):
        ...     return [-float(len(text)) for text in completions]
        >>> checked(short)(prompts=["a"], completions=["bcd"], completion_ids=[[1]])
        [-3.0]
    """
    return _AsyncCheckedReward(function) if is_async_callable(function) else _CheckedReward(function)


class _CheckedReward:
    def __init__(self, function: RewardFunction) -> None:
        self.__name__ = get_callable_name(function)
        self._function = function

    def __call__(self, prompts: list[Any], **kwargs: Any) -> list[float | None]:
        try:
            rewards = self._function(prompts=prompts, **kwargs)
        except Exception as error:
            raise _raised(self.__name__, error, kwargs) from error
        return _check(self.__name__, rewards, len(prompts))


class _AsyncCheckedReward(_CheckedReward):
    async def __call__(self, prompts: list[Any], **kwargs: Any) -> list[float | None]:  # type: ignore[override]
        try:
            rewards = await self._function(prompts=prompts, **kwargs)
        except Exception as error:
            raise _raised(self.__name__, error, kwargs) from error
        return _check(self.__name__, rewards, len(prompts))


def _raised(name: str, error: Exception, kwargs: dict[str, Any]) -> RuntimeError:
    return RuntimeError(
        f"The reward function {name!r} raised {type(error).__name__}: {error}. It is called with the keyword "
        f"arguments {sorted({'prompts', *kwargs})}; take the ones you do not need with `**kwargs`."
    )


def _check(name: str, rewards: Any, expected: int) -> list[float | None]:
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if not isinstance(rewards, Sequence) or isinstance(rewards, str) or len(rewards) != expected:
        found = f"{len(rewards)} values" if isinstance(rewards, Sequence) else f"a {type(rewards).__name__}"
        raise ValueError(
            f"The reward function {name!r} must return a list of {expected} rewards, one per completion; it returned "
            f"{found}."
        )
    return [_number(name, reward, row) for row, reward in enumerate(rewards)]


def _number(name: str, reward: Any, row: int) -> float | None:
    if reward is None:
        return None
    wanted = "expected a finite number, or None to leave this function out for that completion"
    try:
        value = float(reward)
    except (TypeError, ValueError):
        raise TypeError(f"The reward function {name!r} returned {reward!r} for completion {row}; {wanted}.") from None
    if not math.isfinite(value):
        raise ValueError(f"The reward function {name!r} returned {value} for completion {row}; {wanted}.")
    return value
