"""Check which wrong answers are paid by a reward that compares answers with the true one."""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.trainer.utils import is_async_callable

from rlhf_recipes.rewards.checked import checked
from rlhf_recipes.statistics.metrics import proportion_interval

Row = Mapping[str, Any]

_NUMBER = re.compile(r"[-+]?(\d[\d,]*(\.\d*)?|\.\d+)([eE][-+]?\d+)?(/\d+)?")
_BREAK = "{answer}"


@dataclass(frozen=True)
class PaidAnswers:
    """The reward that a verifier pays for one kind of answer.

    Attributes:
        kind: `true`, the row's own answer; the same in another form: `spaces`, with white space around it, `sentence`,
            inside a sentence, `twice`, said twice; or a wrong one: `constant`, the same text for every row, `other`,
            another row's answer, `negated`, the number with the other sign, `empty`, no text at all.
        right: Whether the text holds the true answer.
        rows: Number of rows that such an answer was written for.
        paid: Mean reward, as a share of the most that the reward pays; nan without rows.
        interval: Wilson's 95 % interval of it over the rows (too wide rather than too narrow where rewards lie
            between all and nothing); None without rows.
        example: The text that stands out: of wrong ones the best paid, of right ones the worst paid.
        row: Its row, from 0.
    """

    kind: str
    right: bool
    rows: int
    paid: float
    interval: tuple[float, float] | None
    example: str
    row: int


def check_verifier(
    reward: Callable[..., Any],
    rows: Iterable[Row],
    answer_column: str = "answer",
    template: str = _BREAK,
    constant: str = "0",
    pays: tuple[float, float] = (0.0, 1.0),
) -> list[PaidAnswers]:
    r"""Score right answers, and wrong ones that cost nothing to find, with a reward that is to tell them apart.

    A policy finds whatever is paid, and if a verifier ignores the sign, or pays any answer, the reward's curve looks
    like success. Where a wrong text happens to be right for a row (a constant that is its answer, the negative of 0)
    that row is left out; of tasks with several right answers, another row's may be right, too.

    Args:
        reward: A reward function with TRL's signature (`completions` and the rows' columns by keyword; plain or
            async), or a scorer that is called with the text and the row, such as `score_answer` of a reasoning-gym
            task. `None` counts as not paid. `completion_ids` are empty: a verifier reads texts.
        rows: Rows with the true answer, a text or a number, and what else the reward reads. A row whose `prompt` is a
            list of messages gets its completion as one.
        answer_column: Column of the true answers.
        template: What a completion looks like, with `{answer}` where the answer goes, such as `\boxed{{answer}}`.
        constant: The constant answer.
        pays: The least and the most that the reward pays.

    Returns:
        One entry for each kind, right ones first.

    Raises:
        TypeError: If the reward takes neither set of arguments.
        ValueError: If there are no rows, one has no answer, `template` has no place for it, `pays` is empty, or a
            reward lies outside of it.
        RuntimeError: If the reward raises, or returns something that is no reward; with the answer that it got.

    Example:
        >>> rows = [{"prompt": f"2 * {n} =", "answer": str(2 * n)} for n in range(1, 21)]
        >>> def ends_alike(completions, answer, **kwargs):
        ...     return [float(text.strip("-") == truth) for text, truth in zip(completions, answer)]
        >>> found = check_verifier(ends_alike, rows)
        >>> [entry.kind for entry in found if not entry.right and entry.paid > 0.1]
        ['negated']
    """
    row_dicts = [dict(row) for row in rows]
    answers = _answers(row_dicts, answer_column)
    if _BREAK not in template:
        raise ValueError(f"`template` must hold {_BREAK!r}, where the answer goes; got {template!r}.")
    if not pays[0] < pays[1]:
        raise ValueError(f"`pays` is the least and the most that the reward pays, such as (0.0, 1.0); got {pays}.")
    function = _as_function(reward, row_dicts)
    results = []
    for kind, (right, texts) in _texts(answers, template, constant).items():
        attempts = [(number, text) for number, text in enumerate(texts) if text is not None]
        try:
            rewards = function([row_dicts[number] for number, _ in attempts], [text for _, text in attempts])
        except Exception as error:
            raise RuntimeError(f"The reward failed on answers of the kind {kind!r}: {error}") from error
        results.append(_summary(kind, right, attempts, rewards, pays))
    return results


def paid_verdict(results: Sequence[PaidAnswers], bound: float = 0.1) -> tuple[str, list[PaidAnswers]]:
    """Say whether the reward can be had without the answer.

    Args:
        results: What `check_verifier` returned.
        bound: Largest share of the full reward that a wrong kind of answer may be paid on average.

    Returns:
        `not bought`, `bought`, or `true answers not paid` (less than `1 - bound`, which counts first); and the wrong
        kinds that are paid more than `bound`.

    Raises:
        ValueError: If `bound` is no share below 1.

    Example:
        >>> rows = [{"answer": "4"}, {"answer": "7"}]
        >>> verdict, bought = paid_verdict(check_verifier(lambda text, row: float(text > "0"), rows))
        >>> verdict, [entry.kind for entry in bought]
        ('bought', ['other'])
    """
    if not 0 <= bound < 1:
        raise ValueError(f"`bound` is a share of the full reward, from 0 to below 1; got {bound}.")
    bought = [entry for entry in results if not entry.right and entry.paid > bound]
    if next(entry for entry in results if entry.kind == "true").paid < 1 - bound:
        return "true answers not paid", bought
    return ("bought" if bought else "not bought"), bought


def refuse_if_bought(results: Sequence[PaidAnswers], bound: float = 0.1) -> None:
    """Stop before a training whose reward can be had without the answer.

    Args:
        results: What `check_verifier` returned.
        bound: Largest share of the full reward that a wrong kind of answer may be paid on average.

    Raises:
        ValueError: If a wrong kind is paid more than `bound`, or the true answers less than `1 - bound`.

    Example:
        >>> rows = [{"answer": "4"}, {"answer": "7"}]
        >>> refuse_if_bought(check_verifier(lambda text, row: float(text == row["answer"]), rows))
        >>> refuse_if_bought(check_verifier(lambda text, row: float(text > "0"), rows))
        Traceback (most recent call last):
            ...
        ValueError: The verifier can be bought: it pays 1.00 for the kind 'other', such as '7' in row 0; at most ...
    """
    verdict, bought = paid_verdict(results, bound)
    table = f"\n{paid_table(results)}"
    if verdict == "true answers not paid":
        true = next(entry for entry in results if entry.kind == "true")
        raise ValueError(
            f"The verifier pays the rows' own answers {true.paid:.2f} of the full reward, such as {true.example!r} in "
            f"row {true.row}: see that `template` says how a completion gives its answer, and `pays` what the reward "
            f"pays.{table}"
        )
    if verdict == "bought":
        kinds = ", ".join(
            f"{entry.paid:.2f} for the kind {entry.kind!r}, such as {entry.example!r} in row {entry.row}"
            for entry in bought
        )
        raise ValueError(
            f"The verifier can be bought: it pays {kinds}; at most {bound} is allowed. Repair it, or leave the task "
            f"out.{table}"
        )


def paid_table(results: Sequence[PaidAnswers]) -> str:
    """Write the results of `check_verifier` as a table.

    Args:
        results: Its entries.

    Returns:
        Lines of text.

    Example:
        >>> print(paid_table([PaidAnswers("other", False, 20, 0.25, (0.11, 0.47), "7", 3)]))
        answer            paid  95 % interval     rows  example
        other     wrong   0.25  0.11 to 0.47        20  '7'
    """
    lines = [f"{'answer':<18}{'paid':<6}{'95 % interval':<18}{'rows':<6}example"]
    for entry in results:
        line = f"{entry.kind:<10}{'right' if entry.right else 'wrong':<8}"
        if entry.interval is None:
            lines.append(f"{line}not tried: no row has such an answer")
            continue
        low, high = entry.interval
        example = repr(entry.example if len(entry.example) <= 60 else f"{entry.example[:57]}...")
        lines.append(f"{line}{entry.paid:<6.2f}{f'{low:.2f} to {high:.2f}':<18}{entry.rows:<6}{example}")
    return "\n".join(lines)


def _answers(rows: Sequence[Row], column: str) -> list[str]:
    if not rows:
        raise ValueError("There are no rows to try the verifier on.")
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), str | int | float) or row[column] == "":
            raise ValueError(
                f"Row {number} has no answer: expected a text or a number in `{column}`, got {row.get(column)!r}; its "
                f"columns are {sorted(row)}."
            )
    return [str(row[column]) for row in rows]


def _texts(answers: list[str], template: str, constant: str) -> dict[str, tuple[bool, list[str | None]]]:
    # For each kind whether it holds the true answer, and its text in each row.
    def write(wrong: list[str | None]) -> list[str | None]:
        pairs = zip(wrong, answers, strict=True)
        return [None if text is None or _same(text, true) else _fill(template, text) for text, true in pairs]

    filled = [_fill(template, answer) for answer in answers]
    return {
        "true": (True, list(filled)),
        "spaces": (True, [f" {text}\n" for text in filled]),
        "sentence": (True, [f"The answer is {text}." for text in filled]),
        "twice": (True, [f"{text} {text}" for text in filled]),
        "constant": (False, write([constant] * len(answers))),
        "other": (False, write([_other(answers, number) for number in range(len(answers))])),
        "negated": (False, write([_negated(answer) for answer in answers])),
        "empty": (False, [""] * len(answers)),
    }


def _fill(template: str, answer: str) -> str:
    return template.replace(_BREAK, answer)


def _same(first: str, second: str) -> bool:
    try:
        return float(first) == float(second)
    except ValueError:
        return first.strip().casefold() == second.strip().casefold()


def _other(answers: list[str], number: int) -> str | None:
    following = answers[number + 1 :] + answers[:number]
    return next((answer for answer in following if not _same(answer, answers[number])), None)


def _negated(answer: str) -> str | None:
    text = answer.strip()
    if not _NUMBER.fullmatch(text) or not re.search(r"[1-9]", text):
        return None
    return text[1:] if text[0] == "-" else f"-{text.removeprefix('+')}"


def _as_function(reward: Callable[..., Any], rows: list[dict[str, Any]]) -> Callable[..., list[Any]]:
    # Both kinds of rewards as one function of rows and texts.
    columns = sorted({column for row in rows for column in row} - {"prompt", "completion", "completion_ids"})

    def of_columns(part: list[dict[str, Any]], texts: list[str]) -> list[Any]:
        prompts = [row.get("prompt", "") for row in part]
        pairs = zip(prompts, texts, strict=True)
        completions = [text if isinstance(prompt, str) else _message(text) for prompt, text in pairs]
        values = {column: [row.get(column) for row in part] for column in columns}
        called = checked(reward)(prompts=prompts, completions=completions, completion_ids=[[] for _ in part], **values)
        return asyncio.run(called) if is_async_callable(reward) else called

    def of_each(part: list[dict[str, Any]], texts: list[str]) -> list[Any]:
        return [reward(text, row) for text, row in zip(texts, part, strict=True)]

    signature = inspect.signature(reward)
    if _takes(signature, prompts=[], completions=[], completion_ids=[], **dict.fromkeys(columns)):
        return of_columns
    if _takes(signature, "", rows[0]):
        return of_each
    raise TypeError(
        f"Expected a reward function of `completions`, the rows' columns {columns} and `**kwargs`, or a scorer of a "
        f"text and its row; {getattr(reward, '__name__', reward)!r} takes {signature}."
    )


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _takes(signature: inspect.Signature, *positional: Any, **named: Any) -> bool:
    try:
        signature.bind(*positional, **named)
    except TypeError:
        return False
    return True


def _summary(
    kind: str, right: bool, attempts: list[tuple[int, str]], rewards: list[Any], pays: tuple[float, float]
) -> PaidAnswers:
    if not attempts:
        return PaidAnswers(kind, right, 0, math.nan, None, "", -1)
    shares = []
    for (number, text), reward in zip(attempts, rewards, strict=True):
        value = pays[0] if reward is None else float(reward)
        share = (value - pays[0]) / (pays[1] - pays[0])
        if not -1e-9 <= share <= 1 + 1e-9:  # scorers that divide lengths end a little above 1
            raise ValueError(
                f"The reward pays {value:g} for {text!r} in row {number}, but `pays` says {pays[0]:g} to {pays[1]:g}."
            )
        shares.append(min(max(share, 0.0), 1.0))
    stands_out = shares.index(min(shares) if right else max(shares))
    number, text = attempts[stands_out]
    # Numbers in [0, 1] spread no more than zeros and ones of the same mean, so Wilson's interval is wide enough.
    interval = proportion_interval(math.fsum(shares), len(shares))
    return PaidAnswers(kind, right, len(shares), math.fsum(shares) / len(shares), interval, text, number)
