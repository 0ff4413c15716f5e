"""The column `reward_prompt`: what a reward reads before a completion, in place of the policy's prompt.

It holds what the policy must not see: facts to check the answer against (LLaVA-RLHF,
https://huggingface.co/papers/2309.14525, section 2.3), a reference answer, grading instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.dialogues import BadRow, check_kind

if TYPE_CHECKING:
    from collections.abc import Mapping


REWARD_PROMPT = "reward_prompt"


def graded_prompt(row: Mapping[str, Any]) -> Any:
    """Return what whoever grades a row's completion reads before it.

    Example:
        >>> graded_prompt({"prompt": "Hi"}), graded_prompt({"prompt": "Hi", "reward_prompt": "Be kind. Hi"})
        ('Hi', 'Be kind. Hi')
    """
    return row[REWARD_PROMPT] if REWARD_PROMPT in row else row.get("prompt")


def with_graded_prompts(dataset: Any) -> Any:
    """Put `reward_prompt` in the place of `prompt`, for the training and the evaluation of reward models.

    Args:
        dataset: A `Dataset` or `IterableDataset`; without the column it comes back as it is.

    Returns:
        The same rows without the column.

    Raises:
        ValueError: If a reward prompt cannot stand for its prompt; it names the row.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"prompt": ["a :"], "reward_prompt": ["a is red . a :"], "chosen": [" red"]})
        >>> with_graded_prompts(rows)[0]
        {'prompt': 'a is red . a :', 'chosen': ' red'}
    """
    if REWARD_PROMPT not in (dataset.column_names or ()):
        return dataset

    def swapped(row: dict[str, Any], index: int) -> dict[str, Any]:
        if problem := reward_prompt_problem(row):
            raise ValueError(f"Row {index}: {problem}.")
        return {"prompt": row[REWARD_PROMPT]}

    names = [name for name in dataset.column_names if name != REWARD_PROMPT]
    # Without the old `prompt`, so that a chat in its place keeps its own fields
    swapped_rows = dataset.map(swapped, with_indices=True, remove_columns=[REWARD_PROMPT, "prompt"])
    return swapped_rows.select_columns(names if "prompt" in names else ["prompt", *names])


def reward_prompt_problem(row: Mapping[str, Any]) -> str | None:
    """Say why a row's reward prompt cannot stand for its prompt, and how to put it right; `None` if it can.

    Args:
        row: Values by column.

    Example:
        >>> reward_prompt_problem({"prompt": "Hi", "reward_prompt": None})
        "`reward_prompt` is missing. Fill it in each row (without facts: repeat the row's `prompt`), or remove ..."
    """
    value, prompt = row.get(REWARD_PROMPT), row.get("prompt")
    fix = "Fill it in each row (without facts: repeat the row's `prompt`), or remove the column"
    if value is None:
        return f"`{REWARD_PROMPT}` is missing. {fix}"
    try:
        check_kind(value, REWARD_PROMPT)
    except BadRow as reason:
        return f"{reason}. Give it in the form of the row's `prompt`"
    if not (value.strip() if isinstance(value, str) else value):
        return f"`{REWARD_PROMPT}` is empty. {fix}"
    if prompt is not None and isinstance(value, str) != isinstance(prompt, str):
        kinds = [f"`{name}` is {'text' if isinstance(one, str) else 'a chat'}" for name, one in _both(value, prompt)]
        return f"{kinds[0]}, but {kinds[1]}. Give both in one form: the completion has that of the prompt"
    return None


def _both(value: Any, prompt: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return (REWARD_PROMPT, value), ("prompt", prompt)
