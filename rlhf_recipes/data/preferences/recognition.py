"""Recognise by their columns what kind of preferences rows hold, and read them."""

from __future__ import annotations

from collections.abc import Collection, Set
from functools import partial
from typing import NamedTuple, Protocol

from datasets import Dataset

from rlhf_recipes.data.dialogues import Row
from rlhf_recipes.data.loading import load_records
from rlhf_recipes.data.preferences.grades import from_graded_pairs, from_helpsteer3, from_signed_pairs
from rlhf_recipes.data.preferences.groups import from_rankings, from_ratings, from_token_labels
from rlhf_recipes.data.preferences.helpsteer import from_helpsteer2
from rlhf_recipes.data.preferences.label_studio import from_label_studio
from rlhf_recipes.data.preferences.nectar import from_nectar
from rlhf_recipes.data.preferences.pairs import LABEL_WORDS, SIDES, from_labelled_pairs, from_pairs, label_of
from rlhf_recipes.data.preferences.reading import Rows, column_names, read
from rlhf_recipes.data.preferences.reward_bench import from_reward_bench
from rlhf_recipes.data.preferences.safe_rlhf import from_safe_rlhf
from rlhf_recipes.data.preferences.schema import JUDGEMENTS, TABLE_COLUMNS, quoted
from rlhf_recipes.data.preferences.sharegpt import from_sharegpt
from rlhf_recipes.data.preferences.steps import from_steps
from rlhf_recipes.data.preferences.ultrafeedback import from_ultrafeedback


def check_preferences(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    """Read rows that have the columns of a preference table: bring them into its types, and check them.

    Args:
        rows: Rows with `prompt`, `completions` and at least one of `label` (a number or a word of `LABEL_WORDS`),
            `ranks`, `best`, `ratings`, `step_labels` and `token_labels`. Missing columns become null, other ones stay.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        The table. A row without `row` gets its own number.

    Raises:
        ValueError: If a column is missing, a row is bad (see `check_row`), or none is left.

    Example:
        >>> check_preferences([{"prompt": "Hi", "completions": ["Hello!", "No."], "label": 1.5}])
        Traceback (most recent call last):
        ...
        ValueError: No row is left. 1 of 1 rows cannot be used: 1 x `label` is not a probability between 0 and 1 ...
    """
    names = column_names(rows)
    if not set(names) & set(JUDGEMENTS):
        raise ValueError(f"Expected at least one of the columns {quoted(JUDGEMENTS)}; found {quoted(names)}.")

    def convert(row: Row) -> Row:
        table_row = {name: row.get(name) for name in TABLE_COLUMNS}
        if table_row["label"] is not None:
            table_row["label"] = label_of(table_row["label"], LABEL_WORDS)
        return table_row

    return read(
        rows,
        convert,
        needs=["prompt", "completions"],
        may_have=TABLE_COLUMNS,
        drop_bad_rows=drop_bad_rows,
        source=source,
    )


class Reader(Protocol):
    """Read rows of one kind into a preference table."""

    def __call__(self, rows: Rows, /, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
        """Read all rows."""
        ...


class _Kind(NamedTuple):
    """Rows of this kind have the columns of the completions, those that judge them, and perhaps some more."""

    completions: tuple[str, ...]
    judgement: tuple[str, ...]
    may_have: tuple[str, ...]
    read: Reader

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((*self.completions, *self.judgement))


_RESPONSES = ("response_0", "response_1")
_KINDS = [
    _Kind(SIDES[0], (), ("margin",), from_pairs),
    *(_Kind(sides, ("label",), ("margin",), from_labelled_pairs) for sides in SIDES),
    *(_Kind(sides, ("strength",), ("label",), from_graded_pairs) for sides in SIDES),
    *(_Kind(sides, ("preference_strength",), (), from_signed_pairs) for sides in SIDES),
    *(_Kind(("completions",), (name,), ("steps", "margin", *JUDGEMENTS), check_preferences) for name in JUDGEMENTS),
    _Kind(("completions",), ("ranking",), (), from_rankings),
    _Kind(("completions",), ("labels",), (), from_steps),
    _Kind(("completion",), ("rating",), (), from_ratings),
    _Kind(("completion",), ("token_labels",), (), from_token_labels),
    _Kind(("instruction", "completions"), (), (), from_ultrafeedback),
    _Kind(("data",), ("annotations",), (), from_label_studio),
    _Kind(SIDES[0], ("num_correct",), (), from_reward_bench),
    _Kind(("conversations", *SIDES[0]), (), ("margin",), from_sharegpt),
    _Kind(_RESPONSES, ("better_response_id",), ("safer_response_id",), from_safe_rlhf),
    _Kind(_RESPONSES, ("safer_response_id",), (), partial(from_safe_rlhf, preference="safer")),
    _Kind(("response1", "response2"), ("overall_preference",), (), from_helpsteer3),
    _Kind(("response",), ("helpfulness",), (), from_helpsteer2),
    _Kind(("prompt", "answers"), (), (), from_nectar),
]
# Columns that belong to a kind, whatever else there is. Many rows have columns of these names with another meaning.
_SIGNS = {name for kind in _KINDS for name in (*kind.needs, *kind.may_have)}
_SIGNS -= {"data", "instruction", "prompt", "response", "helpfulness", "answers", "conversations"}


def to_preference_table(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    """Read preferences of any known kind, which their columns name.

    Columns that could be read in two ways are refused, never guessed about: call the reader that is meant, or rename
    or remove the other columns. The readers' options are those of their defaults.

    Args:
        rows: A dataset, or a list of rows.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table; see `preference_features`.

    Raises:
        ValueError: If the columns are of no kind or of several, rows cannot be used, or none is left.

    Example:
        >>> to_preference_table([{"prompt": "Hi", "completions": ["No.", "Hello!"], "ranking": "B > A"}])["ranks"][:]
        [[2, 1]]
        >>> to_preference_table([{"prompt": "Hi", "chosen": "Hello!", "rejected": "No.", "ranks": [1, 2]}])
        Traceback (most recent call last):
        ...
        ValueError: Expected the columns of one kind of preferences; found `chosen`, `prompt`, `ranks`, `rejected`...
    """
    names = set(column_names(rows))
    fitting = _fitting(names)
    if len({kind.read for kind in fitting}) != 1:
        raise ValueError(
            f"Expected the columns of one kind of preferences; found {quoted(sorted(names)) or 'none'}. The kinds are "
            f"{_kinds()}. Rename or remove the columns that do not belong to it, or call its reader."
        )
    return fitting[0].read(rows, drop_bad_rows=drop_bad_rows, source=source)


def are_preferences(names: Collection[str]) -> bool:
    """Return whether `to_preference_table` knows what kind of preferences rows with these columns hold.

    Example:
        >>> are_preferences(["prompt", "answers"]), are_preferences(["prompt", "completion"])
        (True, False)
    """
    return len({kind.read for kind in _fitting(set(names))}) == 1


def _fitting(names: Set[str]) -> list[_Kind]:
    """Return the kinds whose columns are there, without those that another one needs and more."""
    kinds = [kind for kind in _KINDS if kind.needs <= names and names & _SIGNS <= {*kind.needs, *kind.may_have}]
    return [kind for kind in kinds if not any(kind.needs < other.needs for other in kinds)]


def _kinds() -> str:
    judgements: dict[str, list[str]] = {}
    for kind in _KINDS:
        judgements.setdefault(quoted(kind.completions), []).append(quoted(kind.judgement) or "nothing more")
    return "; ".join(f"{completions} with {' or '.join(names)}" for completions, names in judgements.items())


def load_preferences(
    name: str, *, config: str | None = None, split: str = "train", drop_bad_rows: bool = False
) -> Dataset:
    r"""Load one split of a dataset as a preference table; see `load_rows` and `to_preference_table`.

    Args:
        name: A local file or folder, or a dataset id on the hub.
        config: Configuration of a dataset on the hub.
        split: Split to load.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.

    Returns:
        The table, with `source` (the file, or the id), `row` and, for files with a row per line, `line`.

    Raises:
        FileNotFoundError: If there is neither a local file or folder nor a dataset on the hub of this name.
        ValueError: If a file is broken, the columns are of no kind or of several, or rows cannot be used.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
        >>> _ = path.write_text('\n{"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}\n')
        >>> table = load_preferences(str(path))
        >>> table[0]["row"], table[0]["line"]
        (0, 2)
    """
    rows = load_records(name, config=config, split=split)
    return to_preference_table(rows, drop_bad_rows=drop_bad_rows)
