"""The rows that the reward stage trains on and is evaluated on, as its trainer reads them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict

from rlhf_recipes.data.formats import to_preferences
from rlhf_recipes.data.preferences import compared_pairs, to_preference_table
from rlhf_recipes.data.splits import load_splits
from rlhf_recipes.reward_modeling.table import check_rows, drop_ties

if TYPE_CHECKING:
    from rlhf_recipes.config import DataArguments
    from rlhf_recipes.reward_modeling.config import PreferenceConfig


def load_reward_rows(data_args: DataArguments, config: PreferenceConfig, chat_template: Any = None) -> DatasetDict:
    r"""Load the rows that a reward model trains on and those that it is evaluated on, split as `load_splits` does.

    Rows with `chosen` and `rejected` stay as they are; those of any other kind become the preference table, of which
    `objective: pairwise` takes two completions at a time. `ties: drop` leaves tied rows out of the training.

    Args:
        data_args: Which rows, and how many at most: the first ones.
        config: Says what is learned.
        chat_template: The tokenizer's template, with which instructions that are text become chats.

    Returns:
        The splits `train` and `test`. Rows with `chosen` and `rejected` have their number in the split as `_row`, by
        which they are found again among those that the trainer keeps: it leaves out what is too long.

    Raises:
        FileNotFoundError: If the dataset is not found.
        ValueError: If it has no rows, wrong columns or unusable rows, or the objective cannot learn from them.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from rlhf_recipes.config import DataArguments
        >>> from rlhf_recipes.reward_modeling.config import PreferenceConfig
        >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
        >>> rows = [{"prompt": str(n), "chosen": " yes", "rejected": " no", "label": (n + 1) / 10} for n in range(9)]
        >>> _ = path.write_text("\n".join(map(json.dumps, rows)))
        >>> rows = load_reward_rows(DataArguments(str(path)), PreferenceConfig("outputs", bf16=False, ties="drop"))
        >>> rows["train"][4]  # prompt 4, a tie, is left out, and another prompt is held out
        {'prompt': '6', 'chosen': ' yes', 'rejected': ' no', 'label': 0.7, '_row': 4}
    """
    rows = load_splits(data_args, partial(_to_rows, config=config), chat_template)
    if config.objective == "pairwise" and "completions" in rows["train"].column_names:
        rows = DatasetDict({name: compared_pairs(split) for name, split in rows.items()})
    rows["train"] = drop_ties(rows["train"], config)
    if "chosen" in rows["train"].column_names:
        rows = DatasetDict({name: split.add_column("_row", range(len(split))) for name, split in rows.items()})
    return rows


def _to_rows(dataset: Dataset, /, *, config: PreferenceConfig, drop_bad_rows: bool = False) -> Dataset:
    columns = dict(dataset.features)
    in_words = "label" in columns and getattr(columns["label"], "dtype", None) in ("string", "bool")
    graded = {"strength", "preference_strength", "num_correct"} & columns.keys()
    if not {"chosen", "rejected"} <= columns.keys() or in_words or graded:
        return to_preference_table(dataset, drop_bad_rows=drop_bad_rows)
    check_rows(dataset, config, "given")
    return to_preferences(dataset, drop_bad_rows=drop_bad_rows)
