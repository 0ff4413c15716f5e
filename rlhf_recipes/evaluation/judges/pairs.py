"""Judges of pairs on language models, and `PairJudge`, which asks any judge in both orders.

`PairJudge` remembers answers on disk, and counts what goes wrong instead of raising.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.evaluation.judges.asking import ask_each
from rlhf_recipes.evaluation.judges.budget import Budget
from rlhf_recipes.evaluation.judges.cache import AnswerCache, key_of
from rlhf_recipes.evaluation.judges.language import EndpointModel, LanguageModel, LocalModel, Message
from rlhf_recipes.evaluation.judges.orders import Answer, Choice, Judge, Judgement, is_answer, judgement_of
from rlhf_recipes.evaluation.judges.questions import (
    AS_LETTER,
    AS_REASONS,
    AS_VERDICT,
    QUESTION,
    comparison,
    principle_of,
)
from rlhf_recipes.messages import as_text
from rlhf_recipes.statistics.metrics import share_interval

if TYPE_CHECKING:
    import httpx

_CHOICES: dict[str, Choice] = {"A": "first", "B": "second", "C": "tie"}


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def parse_choice(reply: str) -> Choice | None:
    """Read a judge's reply: the verdict in double square brackets, in the way of MT-Bench.

    Source: https://huggingface.co/papers/2306.05685, appendix A.

    Args:
        reply: What the judge wrote.

    Returns:
        The choice; `None` if there is no verdict, or verdicts that contradict each other.

    Example:
        >>> parse_choice("Both are fine, the first is shorter. [[A]]"), parse_choice("[[A]] or [[B]]")
        ('first', None)
    """
    verdicts = set(re.findall(r"\[\[([ABC])\]\]", reply))
    return _CHOICES[verdicts.pop()] if len(verdicts) == 1 else None


class LanguageJudge:
    """A language model as a judge of pairs, by its words or by the probabilities of its answer.

    Source: https://huggingface.co/papers/2309.00267 (probabilities of the two answers; reasons first, in a call of
    their own) and https://huggingface.co/papers/2212.08073 (principles).

    Args:
        model: The model.
        question: The question, with `{prompt}`, `{first}` and `{second}`, and `{principle}` where there are some. The
            form of the reply is added.
        max_tokens: Longest reply of a judge that answers in words.
        soft: Whether the answer is the probability of A over that of A and B as the first token of the reply, instead
            of a word.
        least_mass: Where A and B together are less probable than this, the model has something else to say, and that
            is no answer.
        reasoning_tokens: Longest reasons that the model is asked for before. 0: none.
        principles: Texts, of which one is drawn for each pair, the same in both orders.
        seed: Seed of the draws.

    Raises:
        ValueError: If there are principles and the question has no place for them, or a number is out of range.

    Example:
        >>> class Polite:
        ...     def weigh(self, messages, options):
        ...         return {"A": 0.75, "B": 0.25}
        >>> LanguageJudge(Polite(), soft=True)("Say hello.", "Hello!", "No.")
        0.75
    """

    def __init__(
        self,
        model: LanguageModel,
        question: str = QUESTION,
        max_tokens: int = 16,
        *,
        soft: bool = False,
        least_mass: float = 0.5,
        reasoning_tokens: int = 0,
        principles: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if max_tokens < 1 or reasoning_tokens < 0 or not 0 <= least_mass <= 1:
            raise ValueError(
                "`max_tokens` must be at least 1, `reasoning_tokens` at least 0 and `least_mass` from 0 to 1, got "
                f"{max_tokens}, {reasoning_tokens} and {least_mass:g}."
            )
        if principles:
            comparison(question, "", "", "", principles[0])  # refuses a question without a place for it
        self._model, self._question, self._max_tokens = model, question, max_tokens
        self._soft, self._least_mass, self._reasoning_tokens = soft, least_mass, reasoning_tokens
        self._principles, self._seed = principles, seed

    def principle(self, prompt: str, first: str, second: str) -> str | None:
        """Return the principle of a pair, which is the same in both orders."""
        return principle_of(self._principles, self._seed, prompt, *sorted((first, second)))

    def __call__(self, prompt: str, first: str, second: str) -> Answer | None:
        """Ask; `None` if the reply is no answer."""
        asked = comparison(self._question, prompt, first, second, self.principle(prompt, first, second))
        form = AS_LETTER if self._soft else AS_VERDICT
        messages = [_says("user", f"{asked}\n\n{form}")]
        if self._reasoning_tokens:
            messages = [_says("user", f"{asked}\n\n{AS_REASONS}")]
            reasons = self._model.write(messages, self._reasoning_tokens)
            messages += [_says("assistant", reasons), _says("user", form)]
        if not self._soft:
            return parse_choice(self._model.write(messages, self._max_tokens))
        weights = self._model.weigh(messages, ("A", "B"))
        mass = weights["A"] + weights["B"]
        return weights["A"] / mass if mass > 0 and mass >= self._least_mass else None


class ModelJudge(LanguageJudge):
    """A local language model as a judge, through a text-generation pipeline of transformers.

    Args:
        pipeline: `transformers.pipeline("text-generation", model=...)`. A model with a chat template gets a chat.
        question: The question, with `{prompt}`, `{first}` and `{second}`.
        max_new_tokens: Longest reply, written without sampling.
        budget: Counts calls and tokens.
        **options: Those of `LanguageJudge`.
    """

    def __init__(
        self,
        pipeline: Callable[..., Any],
        question: str = QUESTION,
        max_new_tokens: int = 16,
        budget: Budget | None = None,
        **options: Any,
    ) -> None:
        super().__init__(LocalModel(pipeline, budget), question, max_new_tokens, **options)


class EndpointJudge(LanguageJudge):
    """A model behind an OpenAI-compatible endpoint as a judge.

    Args:
        url: Base address, such as `http://localhost:8000/v1`; `/chat/completions` is added.
        model: Name of the model there.
        api_key: Sent as a bearer token, and nowhere written down.
        timeout: Seconds for one try, from connecting to the last byte.
        retries: How often a request is repeated that timed out, or was answered by 429 or 5xx.
        question: The question, with `{prompt}`, `{first}` and `{second}`.
        max_tokens: Longest reply.
        transport: Transport of httpx, for tests and proxies.
        backoff: Seconds before the first repetition; each wait is twice the one before.
        budget: Counts calls and tokens.
        **options: Those of `LanguageJudge`.

    Raises:
        ModuleNotFoundError: Without the extra `judges`, which brings httpx.
        ValueError: As `EndpointModel`, also when asked.
        httpx.HTTPError: When asked: if the endpoint does not answer, or with an error, after all retries.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        question: str = QUESTION,
        max_tokens: int = 16,
        transport: httpx.BaseTransport | None = None,
        backoff: float = 0.5,
        budget: Budget | None = None,
        **options: Any,
    ) -> None:
        endpoint = EndpointModel(
            url,
            model,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            budget=budget,
            transport=transport,
        )
        super().__init__(endpoint, question, max_tokens, **options)


@dataclass(frozen=True)
class Verdicts:
    """What a judge said about `N` pairs.

    Attributes:
        rows: Which of the pairs got an answer in both orders.
        judgement: The judgement on those; `None` if there are none.
        failures: Number of pairs without one: a judge that raised, did not answer in time, or said nothing that is an
            answer, and pairs that were not asked about.
        answers: For each of `rows` the answer, and the one with the completions swapped.
        not_asked: Number of pairs that were not, or not in both orders, asked about, since the judge was down or the
            budget spent.
        stopped: Why; empty if all were asked.
        problems: How often each kind of failure came, by its message.
        cached: Number of answers that were not asked for, since they were known.
    """

    rows: list[int]
    judgement: Judgement | None
    failures: int
    answers: list[tuple[Answer, Answer]] = field(default_factory=list)
    not_asked: int = 0
    stopped: str = ""
    problems: dict[str, int] = field(default_factory=dict)
    cached: int = field(default=0, compare=False)

    def metrics(self, clusters: Sequence[int], seed: int = 0) -> dict[str, float]:
        """Sum up: `win_rate` of the first of each pair (a tie or a disagreement counts half) with its 95 % interval.

        Args:
            clusters: Which prompt each of the `N` pairs has.
            seed: Seed of the bootstrap.

        Returns:
            Also `agreement` of the two orders, `position_bias`, and `failure_rate`; without any verdict only that.
        """
        metrics = {"failure_rate": self.failures / (self.failures + len(self.rows))}
        if self.judgement is None:
            return metrics
        labels, prompts = self.judgement.labels, [clusters[row] for row in self.rows]
        metrics |= {"win_rate": sum(labels) / len(labels), "agreement": self.judgement.agreement}
        metrics["position_bias"] = self.judgement.position_bias
        if len(set(prompts)) > 1:
            metrics["win_rate_low"], metrics["win_rate_high"] = share_interval(labels, prompts, seed=seed)
        return metrics


class PairJudge:
    """Ask a judge about pairs of completions, in both orders, and never raise for what it does.

    Args:
        judge: Callable from prompt and two completions (texts) to "first", "second" or "tie", or to the probability
            that the first is better: a function, a `ModelJudge` or an `EndpointJudge`. Anything else that it returns,
            or raises, is a failure.
        name: Name of the judge, with its version: answers in the cache are its own.
        cache: JSON-lines file in which answers are kept; damaged lines are passed over. Failures are not kept.
        workers: Questions at the same time, for an endpoint.
        give_up_after: After this many failures in a row the rest of the pairs is not asked, so that an endpoint that
            is down costs a few timeouts, not thousands.

    Example:
        >>> def longer(prompt, first, second):
        ...     return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"
        >>> PairJudge(longer, "longer").compare(["q", "q"], [("aa", "a"), ("b", "bb")]).metrics([0, 0])["win_rate"]
        0.5
    """

    def __init__(
        self,
        judge: Judge | Callable[[str, str, str], Answer | None],
        name: str,
        cache: str | Path | None = None,
        workers: int = 1,
        give_up_after: int = 5,
    ) -> None:
        self._judge, self._name, self._workers, self._give_up_after = judge, name, workers, give_up_after
        self._answers = AnswerCache(cache, usable=is_answer)

    def compare(self, prompts: Sequence[Any], pairs: Sequence[tuple[Any, Any]]) -> Verdicts:
        """Ask about each pair twice, with the completions swapped.

        Args:
            prompts: `N` prompts, texts or lists of messages.
            pairs: Two completions for each, texts or lists of messages.

        Returns:
            The verdicts.
        """
        texts = [tuple(map(as_text, (prompt, *pair))) for prompt, pair in zip(prompts, pairs, strict=True)]
        questions = [(p, *answers) for p, a, b in texts for answers in ((a, b), (b, a))]
        before = self._answers.hits
        asked = ask_each(
            questions,
            self._ask,
            name=f"The judge {self._name}",
            known=lambda question: self._answers.get(key_of(self._name, *question)),
            workers=self._workers,
            give_up_after=self._give_up_after,
        )
        rows, answers = [], []
        for row, both in enumerate(zip(asked.answers[::2], asked.answers[1::2], strict=True)):
            if both[0] is not None and both[1] is not None:
                rows.append(row)
                answers.append((both[0], both[1]))
        return Verdicts(
            rows,
            judgement_of(answers) if rows else None,
            len(texts) - len(rows),
            answers,
            len({number // 2 for number in asked.not_asked}),
            asked.stopped,
            dict(asked.problems),
            self._answers.hits - before,
        )

    def _ask(self, question: tuple[str, str, str]) -> Answer | None:
        answer: Any = self._judge(*question)
        if not is_answer(answer):
            if answer is None:
                return None
            raise TypeError(f"{answer!r} is neither first, second, tie nor a probability")
        self._answers.put(key_of(self._name, *question), answer)
        return answer
