"""Reward callables: checked outputs and penalties."""

import asyncio
import functools

import pytest
import torch
from trl.trainer.utils import is_async_callable

from rlhf_recipes.rewards import checked


def call(function, n=3):
    return checked(function)(prompts=["p"] * n, completions=["c"] * n, completion_ids=[[1]] * n)


def returns(value):
    return lambda **kwargs: value


@pytest.mark.parametrize("value", [[1, 2.5, None], (1, 2.5, None), [True, 2.5, None]])
def test_good_rewards_pass(value):
    assert call(returns(value)) == [1.0, 2.5, None]


def test_tensors_pass():
    assert call(returns(torch.tensor([1.0, 2.0, 3.0]))) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], ValueError, "list of 3 rewards, one per completion; it returned 1 values"),
        (1.0, ValueError, "it returned a float"),
        (None, ValueError, "it returned a NoneType"),
        ("abc", ValueError, "list of 3 rewards"),
        (torch.tensor(1.0), ValueError, "it returned a float"),
        ([1.0, float("nan"), 1.0], ValueError, "returned nan for completion 1"),
        ([1.0, 1.0, float("inf")], ValueError, "returned inf for completion 2"),
        ([1.0, "good", 1.0], TypeError, "returned 'good' for completion 1"),
        ([1.0, [1.0] * 9, 1.0], ValueError, "returned 9 token rewards for completion 1"),
        ([1.0, [None], 1.0], TypeError, "None for a token of completion 1"),
        ([[[1.0]], 1.0, 1.0], TypeError, r"returned \[1.0\] for completion 0"),
    ],
)
def test_bad_rewards_are_named(value, error, message):
    with pytest.raises(error, match=message):
        call(returns(value))


def test_a_function_that_raises_is_named_with_its_error():
    def broken(completions, **kwargs):
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="'broken' raised KeyError: 'answer'.*completion_ids") as caught:
        call(broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_names_are_those_of_the_functions():
    def length(completions, scale=1.0, **kwargs):
        return [scale * len(text) for text in completions]

    assert checked(length).__name__ == "length"
    assert checked(functools.partial(length, scale=2.0)).__name__ == "length"
    assert call(functools.partial(length, scale=2.0)) == [2.0, 2.0, 2.0]


def test_async_functions_stay_async_and_are_checked():
    async def good(prompts, **kwargs):
        return [1.0] * len(prompts)

    async def bad(prompts, **kwargs):
        return [float("nan")] * len(prompts)

    assert is_async_callable(checked(good))
    assert asyncio.run(call(good)) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="'bad' returned nan"):
        asyncio.run(call(bad))
