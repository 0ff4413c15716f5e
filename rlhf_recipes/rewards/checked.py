"""Errors of reward functions, found where they happen and named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from trl.trainer.utils import get_callable_name, is_async_callable

from rlhf_recipes.rewards.record import RewardRecord

RewardFunction = Callable[..., Any]


def checked(function: RewardFunction) -> RewardFunction:
    """Wrap a reward function, plain or async, so that what it returns is checked.

    A function may return `None` for a completion that it does not judge; that function is then left out of that
    completion's reward. `NaN` and infinity are errors: they would silently ruin the policy. In place of a number it
    may return a list of numbers, one per token of the completion; then PPO pays each token its own.

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
        >>> def rising(completion_ids, **kwargs):
        ...     return [[0.1 * i for i in range(len(ids))] for ids in completion_ids]
        >>> record = RewardRecord()
        >>> checked(rising)(prompts=["a"], completions=["b c"], completion_ids=[[5, 6]], reward_record=[record])
        [0.1]
        >>> record.token_rewards
        {'rising': [[0.0, 0.1]]}
    """
    return _AsyncCheckedReward(function) if is_async_callable(function) else _CheckedReward(function)


class _CheckedReward:
    def __init__(self, function: RewardFunction) -> None:
        self.__name__ = get_callable_name(function)
        self._function = function

    def __call__(
        self, prompts: list[Any], reward_record: Sequence[RewardRecord] = (), **kwargs: Any
    ) -> list[float | None]:
        try:
            rewards = self._function(prompts=prompts, **kwargs)
        except Exception as error:
            raise _raised(self.__name__, error, kwargs) from error
        return self._check(rewards, prompts, kwargs["completion_ids"], reward_record)

    def _check(
        self, rewards: Any, prompts: list[Any], completion_ids: list[list[int]], record: Sequence[RewardRecord]
    ) -> list[float | None]:
        rewards = _as_list(self.__name__, rewards, len(prompts))
        rows = zip(rewards, completion_ids, strict=True)
        per_token = [_per_token(self.__name__, index, *row) for index, row in enumerate(rows)]
        if record and any(row is not None for row in per_token):
            record[0].token_rewards[self.__name__] = per_token
        return [
            _number(self.__name__, rewards[index], index) if row is None else math.fsum(row)
            for index, row in enumerate(per_token)
        ]


class _AsyncCheckedReward(_CheckedReward):
    async def __call__(  # type: ignore[override]
        self, prompts: list[Any], reward_record: Sequence[RewardRecord] = (), **kwargs: Any
    ) -> list[float | None]:
        try:
            rewards = await self._function(prompts=prompts, **kwargs)
        except Exception as error:
            raise _raised(self.__name__, error, kwargs) from error
        return self._check(rewards, prompts, kwargs["completion_ids"], reward_record)


def _raised(name: str, error: Exception, kwargs: dict[str, Any]) -> RuntimeError:
    return RuntimeError(
        f"The reward function {name!r} raised {type(error).__name__}: {error}. It is called with the keyword "
        f"arguments {sorted({'prompts', *kwargs})}; take the ones you do not need with `**kwargs`."
    )


def _as_list(name: str, rewards: Any, expected: int) -> list[Any]:
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if not isinstance(rewards, Sequence) or isinstance(rewards, str) or len(rewards) != expected:
        returned = f"{len(rewards)} values" if isinstance(rewards, Sequence) else f"a {type(rewards).__name__}"
        raise ValueError(
            f"The reward function {name!r} must return a list of {expected} rewards, one per completion; it returned "
            f"{returned}."
        )
    return list(rewards)


def _per_token(name: str, index: int, reward: Any, ids: list[int]) -> list[float] | None:
    reward = reward.tolist() if hasattr(reward, "tolist") else reward
    if not isinstance(reward, Sequence) or isinstance(reward, str):
        return None
    if len(reward) != len(ids):
        raise ValueError(
            f"The reward function {name!r} returned {len(reward)} token rewards for completion {index}, which has "
            f"{len(ids)} tokens (`completion_ids`, the end token included). Return one number per token."
        )
    numbers = [_number(name, value, index) for value in reward]
    if None in numbers:
        raise TypeError(f"The reward function {name!r} returned None for a token of completion {index}. Return 0.0.")
    return [float(number) for number in numbers if number is not None]


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
