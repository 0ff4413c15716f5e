"""Check the rows that a reward model is to learn from, and bring the preference table to token ids."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from rlhf_recipes.data.chat_templates import encode_prompt, options_of
from rlhf_recipes.data.preferences import check_preferences
from rlhf_recipes.data.preferences.schema import JUDGEMENTS, place_of, quoted
from rlhf_recipes.reward_modeling.collator import Row, ranks_of, sequences_of
from rlhf_recipes.reward_modeling.preparation import cut_after_eos
from rlhf_recipes.statistics.numbers import is_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from rlhf_recipes.reward_modeling.config import PreferenceConfig

logger = logging.getLogger(__name__)

# The columns that each objective reads: the first one that a row has.
_TARGETS = {
    "pairwise": ("label",),
    "ranking": ("ranks",),
    "plackett_luce": ("ranks",),
    "best_of_k": ("best",),
    "regression": ("ratings",),
    "token": ("token_labels", "step_labels", "ratings"),
}


def is_table(columns: Sequence[str]) -> bool:
    """Tell the preference table from TRL's rows with `chosen` and `rejected`.

    Example:
        >>> is_table(["prompt", "completions", "ranks"]), is_table(["prompt", "chosen", "rejected"])
        (True, False)
    """
    return "completions" in columns or "completion_ids" in columns


def check_rows(dataset: Dataset, config: PreferenceConfig, name: str) -> Dataset:
    """Refuse rows that the objective cannot learn from.

    Args:
        dataset: Rows of the preference table, or of TRL.
        config: Says what is to be learned.
        name: What the error calls the rows: `"train"` or `"eval"`.

    Returns:
        The rows; those of the preference table in its types.

    Raises:
        ValueError: With the row, what was expected, what it has, and the fix.
    """
    if is_table(dataset.column_names):
        dataset = check_preferences(dataset)
        used = [column for column in dataset.column_names if column not in ("prompt", "steps")]
        check = _table_problem
    elif config.objective != "pairwise":
        raise ValueError(
            f"`objective` is {config.objective!r}, but the {name} rows have `chosen` and `rejected`: pairs. Use "
            "`objective: pairwise`, or rows with `completions`."
        )
    else:
        used = [column for column in ("label", "margin") if column in dataset.column_names]
        check = _pair_problem
    for index, row in enumerate(dataset.select_columns(used).with_format(None) if used else []):
        if problem := check(row, config):
            raise ValueError(f"{name.capitalize()} {place_of({'row': index, **row})} {problem}")
    if check is _table_problem and config.margin_use == "margin":
        _check_margins_are_whole(dataset, name)
    return dataset


def drop_ties(dataset: Dataset, config: PreferenceConfig) -> Dataset:
    """Leave out the training rows in which all completions are tied, if the configuration says `ties: drop`.

    They carry no loss then. In the mean over prompts they would only dilute the loss of the others.

    Args:
        dataset: Rows of the preference table, or of TRL.
        config: Says what becomes of ties.

    Returns:
        The other rows.

    Raises:
        ValueError: If no row is left.
    """
    if config.ties == "soft":
        return dataset
    indices = [index for index, row in enumerate(dataset) if len(set(ranks_of(row) or [])) > 1]
    if len(indices) == len(dataset):
        return dataset
    if not indices:
        raise ValueError(
            f"All {len(dataset)} training rows are ties, which `ties: drop` leaves out. Set `ties: soft`."
        )
    logger.info(
        "%d of %d training rows are ties and left out (`ties: drop`).", len(dataset) - len(indices), len(dataset)
    )
    return dataset.select(indices)


def to_whole_texts(table: Dataset) -> Dataset:
    """Rows with `chosen` and `rejected` that hold all whole texts of a table, two and two, for TRL to tokenize.

    So completions get the same template and end token whether they come in pairs or in groups. The last text is
    doubled if their number is odd.

    Example:
        >>> table = Dataset.from_dict({"prompt": ["a"], "completions": [[" b", " c", " d"]]})
        >>> to_whole_texts(table)[:]
        {'chosen': ['a b', 'a d'], 'rejected': ['a c', 'a d']}
    """
    rows = table.select_columns([column for column in ("prompt", "completions") if column in table.column_names])
    texts = [_join(row.get("prompt"), completion) for row in rows for completion in row["completions"]]
    texts += texts[-1:] * (len(texts) % 2)
    return Dataset.from_dict({"chosen": texts[::2], "rejected": texts[1::2]})


def with_completion_ids(table: Dataset, tokenized: Dataset, eos_token_id: int) -> Dataset:
    """Put the token ids that TRL made of `to_whole_texts` back into the groups, cut after their last end token."""
    pairs = zip(tokenized["chosen_ids"], tokenized["rejected_ids"], strict=True)
    sequences = iter(cut_after_eos(ids, eos_token_id) for pair in pairs for ids in pair)
    groups = [[next(sequences) for _ in completions] for completions in table["completions"]]
    table = table.remove_columns("completion_ids") if "completion_ids" in table.column_names else table
    return table.add_column("completion_ids", groups)


def prompt_lengths(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Count the tokens of each sequence that belong to the prompt: those that the prompt alone has, too.

    A token that holds the end of the prompt and the start of the completion counts as the completion's.

    Args:
        dataset: Prepared rows with `prompt`, and maybe the `tools` and `chat_template_kwargs` of chats.
        tokenizer: The tokenizer of the token ids; its chat template is used for chats.

    Returns:
        `K` numbers for each row.

    Raises:
        ValueError: If a row has no prompt, shares no token with it, or has nothing after it.
    """
    lengths = []
    for index, row in enumerate(dataset):
        if not row.get("prompt"):
            raise ValueError(
                f"Row {index} has no `prompt`, so that the tokens of the completion cannot be told from it. Give "
                "`prompt`, or use `readout: last`."
            )
        ids = encode_prompt(tokenizer, row["prompt"], **options_of(row))
        lengths.append([_shared(ids, sequence) for sequence in sequences_of(row)])
        for sequence, length in zip(sequences_of(row), lengths[-1], strict=True):
            if length == 0 or length == len(sequence):
                fault = (
                    "do not begin with the tokens of its prompt" if length == 0 else "have nothing after its prompt"
                )
                raise ValueError(f"Row {index}: the token ids of a completion {fault}. They hold both, in this order.")
    return lengths


def token_labels(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, kind: str) -> list[list[list[float]]]:
    """Targets of every token: given per token, per step (each token of a step), or per completion (each token).

    Args:
        dataset: Prepared rows with `token_labels`, `step_labels` and `steps`, or `ratings`.
        tokenizer: The tokenizer of the token ids. Steps need a fast one.
        kind: `"mse"`, or `"bce"`, whose targets are probabilities.

    Returns:
        For each row `K` lists with one target per token id, nan where there is none. Those at the prompt's tokens do
        not count.

    Raises:
        ValueError: With the row, if targets and tokens do not fit together.
    """
    targets = []
    for index, row in enumerate(dataset):
        sequences = sequences_of(row)
        if row.get("token_labels") is not None:
            labels = row["token_labels"]
        elif row.get("step_labels") is not None:
            try:
                labels = [_labels_of_steps(row, k, tokenizer) for k in range(len(sequences))]
            except ValueError as error:
                raise ValueError(f"{place_of({'row': index, **row}).capitalize()}: {error}") from error
        else:
            labels = [[rating] * len(ids) for rating, ids in zip(row["ratings"], sequences, strict=True)]
        targets.append([[math.nan if label is None else float(label) for label in per_token] for per_token in labels])
        if kind == "bce" and any(label < 0 or label > 1 for per_token in targets[-1] for label in per_token):
            raise ValueError(
                f"{place_of({'row': index, **row}).capitalize()} has a target that is not in [0, 1], as "
                "`token_loss: bce` needs. Rescale it, or use `token_loss: mse`."
            )
    return targets


def _pair_problem(row: Row, config: PreferenceConfig) -> str | None:
    """Return what is wrong with a row of TRL's, or `None`."""
    label, margin = row.get("label"), row.get("margin")
    if label is not None and not (is_number(label) and 0.0 <= label <= 1.0):
        return f"has the `label` {label!r}. Give the probability that `chosen` wins, in [0, 1], or rename the column."
    if "margin" not in row or config.margin_use == "ignore" or (margin is None and config.margin_use == "scale"):
        return None
    if not is_number(margin) or margin < 0.0:
        return (
            f"has the `margin` {margin!r}. Give a finite number that is not negative (0 where nothing is known), "
            "remove the column, or set `margin_use: ignore`."
        )
    return None


def _check_margins_are_whole(table: Dataset, name: str) -> None:
    """Refuse a table in which some decided pairs have a margin and others none: theirs would count as 0."""
    pairs = table.select_columns(["label", "margin", "row", "line"])
    decided = [row for row in pairs if row["label"] not in (None, 0.5)]
    missing = next((row for row in decided if row["margin"] is None), None)
    if missing is not None and any(row["margin"] is not None for row in decided):
        raise ValueError(
            f"{name.capitalize()} {place_of(missing)} has no `margin`, but other rows have one. Give every pair a "
            "number (0 where nothing is known), remove the column, or set `margin_use: ignore`."
        )


def _table_problem(row: Row, config: PreferenceConfig) -> str | None:
    """Return what the objective misses in a checked row of the preference table, or `None`."""
    targets = _TARGETS[config.objective]
    if all(row.get(column) is None for column in targets):
        judgements = [name for name in JUDGEMENTS if row.get(name) is not None]
        return (
            f"has no {' or '.join(f'`{name}`' for name in targets)}, which `objective: {config.objective}` reads; it "
            f"has {quoted(judgements)}. Choose the objective that fits, or make pairs of the rows with `to_pairs`."
        )
    if row.get("margin") is not None and config.objective != "pairwise":
        return f"has a `margin`, which `objective: {config.objective}` does not use. Remove the column."
    return None


def _join(prompt: Any, completion: Any) -> Any:
    return completion if prompt is None else prompt + completion


def _shared(prompt: list[int], sequence: list[int]) -> int:
    pairs = enumerate(zip(prompt, sequence, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(prompt), len(sequence)))


def _labels_of_steps(row: Row, k: int, tokenizer: PreTrainedTokenizerBase) -> list[float | None]:
    """Label of the step that each token's last character is in; of the last step after it (the end token)."""
    steps, ids = row["steps"][k], sequences_of(row)[k]
    text: Any = _join(row["prompt"], row["completions"][k])
    is_chat = not isinstance(text, str)
    if is_chat:
        tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
        tools = json.loads(tools) if isinstance(tools, str) else tools
        text = tokenizer.apply_chat_template(text, tokenize=False, tools=tools or None, **more)
    start = text.rfind("".join(steps))
    encoded: Any = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not is_chat)
    shared = _shared(encoded["input_ids"], ids)
    if start < 0 or shared < min(len(ids), len(encoded["input_ids"])):
        raise ValueError(
            f"the token ids of completion {k} are not those that the tokenizer makes of its text, so that `steps` "
            "cannot be found in them. Give `token_labels`."
        )
    ends = [start + sum(map(len, steps[: count + 1])) for count in range(len(steps))]
    last = len(ends) - 1
    places = [
        next((step for step, end in enumerate(ends) if stop <= end), last) for _, stop in encoded["offset_mapping"]
    ]
    return [row["step_labels"][k][step] for step in (places + [last] * len(ids))[: len(ids)]]
