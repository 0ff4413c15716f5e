"""Rewards for reasoning in tags: is the answer right, by the verifiers of reasoning-gym, and is it in its place?"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rlhf_recipes.extras import from_extra

_FORMAT = re.compile(r"\s*<think>(?P<thought>.+?)</think>\s*<answer>(?P<answer>.+?)</answer>\s*", re.DOTALL)
_FIELD = re.compile(r"\{(\w+)\}")
_TAG = re.compile(r"</?(?:think|answer)>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tagged_answer(text: str) -> str | None:
    """Find the answer of a text: what stands in its one pair of answer tags.

    Args:
        text: A completion.

    Returns:
        The answer without spaces around it; `None` if there is no such pair, or several, of which one might be right.

    Example:
        >>> tagged_answer("<think>2 + 2</think><answer> 4 </answer>"), tagged_answer("4"), tagged_answer("<answer>4")
        ('4', None, None)
    """
    found = _ANSWER.findall(text)
    return found[0].strip() if len(found) == 1 else None


def format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Pay 1 for a thought and an answer, each in its tags, and nothing else; a reward function for any trainer.

    Source: DeepSeek-R1, https://huggingface.co/papers/2501.12948, section 2.2.2.

    Args:
        completions: `B` completions, texts or lists with one assistant message.
        **kwargs: Other columns, which are not read.

    Returns:
        `B` rewards, 0 or 1.

    Example:
        >>> format_reward(["<think>2 + 2</think><answer>4</answer>", "<answer>4</answer>", "4"])
        [1.0, 0.0, 0.0]
    """
    texts = map(_text, completions)
    return [float(_FORMAT.fullmatch(text) is not None and len(_TAG.findall(text)) == 4) for text in texts]


def gym_accuracy(completions: list[Any], answer: list[str], metadata: list[str], **kwargs: Any) -> list[float]:
    """Pay 1 for an answer in tags that a task of reasoning-gym calls right, else 0; a reward function for any trainer.

    Many of its verifiers also pay a part: "-12" is worth two thirds for "12" (docs/verifier.md). Here nothing but full
    pay counts, so that a policy cannot live on parts.

    Source: DeepSeek-R1, https://huggingface.co/papers/2501.12948, section 2.2.2, with the verifiers of reasoning-gym,
    https://huggingface.co/papers/2505.24760.

    Args:
        completions: `B` completions, texts or lists with one assistant message.
        answer: The true answers, `B` texts.
        metadata: What the tasks say of their rows, as `gym_rows` writes it, `B` texts of JSON.
        **kwargs: Other columns, which are not read.

    Returns:
        `B` rewards, 0 or 1.

    Raises:
        ModuleNotFoundError: If reasoning-gym is not installed.
        ValueError: If a row is of no task of reasoning-gym.

    Example:
        >>> rows = gym_rows("chain_sum", 1, seed=0, min_digits=1, max_digits=1)  # doctest: +SKIP
        >>> gym_accuracy(["<answer>7</answer>"], [rows[0]["answer"]], [rows[0]["metadata"]])  # doctest: +SKIP
        [0.0]
    """
    gym = _reasoning_gym()
    rewards = []
    for row, (completion, true, about) in enumerate(zip(completions, answer, metadata, strict=True)):
        known = json.loads(about)
        task = known.get("source_dataset")
        if task not in gym.factory.DATASETS:
            raise ValueError(f"Row {row} is of the task {task!r}, which reasoning-gym does not have.")
        given = tagged_answer(_text(completion))
        entry = {"question": "", "answer": true, "metadata": known}
        rewards.append(float(given is not None and gym.get_score_answer_fn(task)(given, entry) == 1.0))
    return rewards


def gym_rows(
    task: str, size: int, seed: int, prompt: str = "{question}\n", without: Sequence[str] = (), **options: Any
) -> list[dict[str, str]]:
    """Make rows of a task of reasoning-gym, each prompt once.

    Args:
        task: Name of the task.
        size: How many questions are drawn; those that occur twice, or are left out, are not made up for.
        seed: Seed. Question `i` is that of `seed + i`, so take seeds far apart for rows that must differ.
        prompt: Template of the prompts, with `{question}` or a text of the task's metadata, such as `{expression}`.
        without: Prompts that are left out, such as those held out.
        **options: Options of the task, such as `max_terms`.

    Returns:
        Rows with `prompt`, `answer` and `metadata` (JSON), in their order.

    Raises:
        ModuleNotFoundError: If reasoning-gym is not installed.
        ValueError: If it has no such task, or the template names no text of the task, or one that there is not.
    """
    gym = _reasoning_gym()
    if task not in gym.factory.DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}. It has {', '.join(sorted(gym.factory.DATASETS))}.")
    rows = {}
    for entry in gym.create_dataset(task, size=size, seed=seed, **options):
        text = _filled(prompt, {"question": entry["question"], **entry["metadata"]})
        rows[text] = {"prompt": text, "answer": str(entry["answer"]), "metadata": json.dumps(entry["metadata"])}
    return [row for text, row in rows.items() if text not in set(without)]


def _filled(template: str, known: dict[str, Any]) -> str:
    """Fill in a template with the texts that are known."""
    texts = {name: text for name, text in known.items() if isinstance(text, str)}
    named = _FIELD.findall(template)
    if not named or not texts.keys() >= set(named):
        names = ", ".join(f"{{{name}}}" for name in texts)
        raise ValueError(f"The template of a prompt must hold some of {names} and no others, got {template!r}.")
    return _FIELD.sub(lambda found: texts[found[1]], template)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _reasoning_gym() -> Any:
    with from_extra("reasoning", needed_by="A verifier of reasoning-gym"):
        import reasoning_gym
    return reasoning_gym
