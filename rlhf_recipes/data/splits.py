"""The training and the held-out rows of a stage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from datasets import Dataset, DatasetDict

from rlhf_recipes.config import DataArguments
from rlhf_recipes.data.formats import prompt_keys, split_by_prompt
from rlhf_recipes.data.instructions import instructions_as_chats
from rlhf_recipes.data.loading import load_rows
from rlhf_recipes.data.preferences import load_preferences

logger = logging.getLogger(__name__)


class Converter(Protocol):
    """Bring rows into the columns of a stage: `to_prompts`, `to_preferences` or `to_completions`."""

    def __call__(self, dataset: Dataset, /, *, drop_bad_rows: bool = False) -> Dataset:
        """Convert all rows."""
        ...


def load_splits(data_args: DataArguments, convert: Converter, chat_template: Any = None) -> DatasetDict:
    r"""Load the rows that a stage trains on and those that it is evaluated on.

    Without a test split of its own, `test_size` of the prompts are held out with all of their rows. The same prompts
    are held out whatever the seed of the run, so that no stage trains on a prompt that another stage tests on. A
    warning counts the prompts that a test split of its own shares with the training split.

    Args:
        data_args: Which rows, and how many at most: the first ones.
        convert: What makes the stage's columns.
        chat_template: The tokenizer's template, with which instructions that are text become chats
            (`instructions_as_chats`).

    Returns:
        The splits `train` and `test`, converted.

    Raises:
        FileNotFoundError: If the dataset is not found.
        ValueError: If it has no rows, wrong columns or unusable rows, or only one prompt and no test split.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from rlhf_recipes.data import to_completions
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> rows = [{"prompt": f"prompt {number}", "completion": "yes"} for number in range(20)]
        >>> _ = path.write_text("\n".join(map(json.dumps, rows)))
        >>> splits = load_splits(DataArguments(str(path), max_train_rows=5), to_completions)
        >>> len(splits["train"]), set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
        (5, set())
    """

    def load(split: str) -> Dataset:
        rows = load_rows(data_args.dataset_name or "", config=data_args.dataset_config, split=split)
        return convert(instructions_as_chats(rows, chat_template), drop_bad_rows=data_args.drop_bad_rows)

    return _load_both(data_args, load)


def load_preference_splits(data_args: DataArguments) -> DatasetDict:
    r"""Load the preferences that a reward model trains on and those that it is evaluated on.

    Like `load_splits`, with `load_preferences` in place of a converter: rows of any kind become preference tables,
    and messages name the lines of files. All rows of a prompt, with all of their completions, lie on one side.

    Args:
        data_args: Which rows, and how many at most: the first ones.

    Returns:
        The splits `train` and `test`, both preference tables.

    Raises:
        FileNotFoundError: If the dataset is not found.
        ValueError: If it has no rows, wrong columns or unusable rows, or only one prompt and no test split.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "rankings.jsonl"
        >>> rows = [{"prompt": str(number), "completions": ["a", "b", "c"], "ranks": [2, 1, 1]} for number in range(9)]
        >>> _ = path.write_text("\n".join(map(json.dumps, rows)))
        >>> load_preference_splits(DataArguments(str(path)))["test"][0]["ranks"]
        [2, 1, 1]
    """

    def load(split: str) -> Dataset:
        return load_preferences(
            data_args.dataset_name or "",
            config=data_args.dataset_config,
            split=split,
            drop_bad_rows=data_args.drop_bad_rows,
        )

    return _load_both(data_args, load)


def _load_both(data_args: DataArguments, load: Callable[[str], Dataset]) -> DatasetDict:
    rows = load(data_args.dataset_train_split)
    if data_args.dataset_test_split is None:
        splits = split_by_prompt(rows, data_args.test_size, seed=0)
    else:
        splits = DatasetDict(train=rows, test=load(data_args.dataset_test_split))
    for name, most in (("train", data_args.max_train_rows), ("test", data_args.max_test_rows)):
        if most is not None and most < len(splits[name]):
            splits[name] = splits[name].select(range(most))
    if data_args.dataset_test_split is not None:
        _warn_of_shared_prompts(splits)
    return splits


def _warn_of_shared_prompts(splits: DatasetDict) -> None:
    train, test = (prompt_keys(splits[name]) for name in ("train", "test"))
    train_prompts, test_prompts = set(train), set(test)
    shared = train_prompts & test_prompts
    # One prompt for all rows is a task, and cannot be held out.
    if not shared or len(train_prompts | test_prompts) == 1:
        return
    row = next(row for row, prompt in enumerate(test) if prompt in shared)
    logger.warning(
        "%d of %d prompts of the test split are also in the training split (first: row %d, %s): what is measured on "
        "them may be learned by heart, so that the evaluation looks better than it is on new prompts. Take them out "
        "of one of the two, or unset `dataset_test_split`: then prompts of the training split are held out.",
        *(len(shared), len(test_prompts), row, _in_short(test[row])),
    )


def _in_short(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
