"""Critique and revision: a model answers, says what goes against a principle, and writes the answer anew."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.evaluation.judges.cache import AnswerCache, key_of
from rlhf_recipes.evaluation.judges.language import LanguageModel, Message
from rlhf_recipes.evaluation.judges.questions import CRITIQUE, REVISION, fill, principle_of
from rlhf_recipes.messages import as_text

_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Round:
    """One critique and the revision after it.

    Attributes:
        principle: What the answer was criticised by.
        critique: What the model said of the answer.
        revision: The answer, written anew.
    """

    principle: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Revised:
    """An answer, and what became of it.

    Attributes:
        first: The first answer.
        rounds: The rounds, in their order. The last revision is the new answer.
    """

    first: str
    rounds: list[Round]


class Writer:
    """Ask a language model for texts that are not blank, and for none of them twice.

    Args:
        model: The model.
        name: Its name, with its version: texts in the cache are its own.
        cache: Texts that are known.
        temperature: Temperature at which texts are drawn; 0 for the likeliest.

    Raises:
        ValueError: When asked: if the model writes nothing.
    """

    def __init__(self, model: LanguageModel, name: str, cache: AnswerCache, temperature: float = 1.0) -> None:
        self._model, self._name, self._cache, self._temperature = model, name, cache, temperature

    def __call__(self, messages: Sequence[Message], max_tokens: int, seed: int) -> str:
        """Return the text, without the white space around it."""
        key = key_of(self._name, list(messages), max_tokens, self._temperature, seed)
        known: str | None = self._cache.get(key)
        if known is not None:
            return known
        text = self._model.write(messages, max_tokens, self._temperature, seed).strip()
        if not text:
            raise ValueError("the model wrote nothing")
        self._cache.put(key, text)
        return text


def revise(
    write: Writer, prompt: Any, principles: Sequence[str], *, rounds: int = 1, max_tokens: int = 256, seed: int = 0
) -> Revised:
    r"""Let a model answer a prompt, and revise its answer by principles.

    Source: https://huggingface.co/papers/2212.08073: in each round a principle is drawn, the model criticises its
    answer by it, and revises the answer after the critique.

    Args:
        write: The model.
        prompt: Text or a chat. Text whose turns start with "\n\nHuman:" and "\n\nAssistant:" is read as a chat.
        principles: What an answer should follow, at least one.
        rounds: Number of critiques and revisions.
        max_tokens: Longest text, for answers, critiques and revisions alike.
        seed: Seed of the principles and of the model's texts.

    Returns:
        The first answer and the rounds.

    Raises:
        ValueError: If there is no principle or no round, or the model writes nothing.

    Example:
        >>> class Parrot:
        ...     def write(self, messages, max_tokens, temperature, seed):
        ...         return "Hello!" if "anew" in messages[-1]["content"] else "No."
        >>> write = Writer(Parrot(), "parrot", AnswerCache(None, lambda text: isinstance(text, str)))
        >>> done = revise(write, "Say hello.", ["Be polite."])
        >>> done.first, done.rounds
        ('No.', [Round(principle='Be polite.', critique='No.', revision='Hello!')])
    """
    if not principles or rounds < 1:
        raise ValueError(f"Give at least one principle and one round, got {len(principles)} and {rounds}.")
    text = as_text(prompt)
    first = write(as_messages(prompt), max_tokens, seed)
    answer, done = first, []
    for number in range(rounds):
        principle = principle_of(principles, seed, text, str(number)) or ""
        asked = fill(CRITIQUE, prompt=text, answer=answer, principle=principle)
        critique = write([{"role": "user", "content": asked}], max_tokens, seed)
        asked = fill(REVISION, prompt=text, answer=answer, critique=critique, principle=principle)
        answer = write([{"role": "user", "content": asked}], max_tokens, seed)
        done.append(Round(principle, critique, answer))
    return Revised(first, done)


def as_messages(prompt: Any) -> list[Message]:
    r"""Read a prompt as messages to answer.

    Args:
        prompt: A chat, a dialogue in text, or text, which is a message of the user.

    Returns:
        The messages.

    Example:
        >>> as_messages("\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:")[1:]
        [{'role': 'assistant', 'content': 'Hello!'}, {'role': 'user', 'content': 'Bye'}]
    """
    if isinstance(prompt, list):
        return [{"role": str(message["role"]), "content": as_text(message.get("content"))} for message in prompt]
    text = as_text(prompt)
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        return [{"role": "user", "content": text}]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in turns[::2]]
    said = [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[1::2], strict=True)]
    return said[:-1] if roles[-1] == "assistant" and not said[-1]["content"] else said
