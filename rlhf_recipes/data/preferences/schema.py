"""The table of preferences: its columns, their types, and how rows become a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from rlhf_recipes.data.dialogues import Row

JUDGEMENTS = ("label", "ranks", "best", "ratings", "step_labels", "token_labels")
PROVENANCE = ("source", "row", "line")


def preference_features(*, chat: bool = False) -> Features:
    """Return the columns of a preference table and their types. K is the number of completions of a row.

    Args:
        chat: Whether prompts and completions are chats instead of text.

    Returns:
        - `prompt`: what is answered. `completions`: K answers to it.
        - `completion_ids`: the token ids of K whole sequences (prompt and completion), for rows that bring them.
        - `label`: probability that the first of two completions is better. `margin`: by how much the better one is, in
          the unit of the loss, at least 0.
        - `ranks`: K ranks; 1 is the best, and ties share a rank. `best`: index of the best of K. `ratings`: K scores.
        - `steps`: the texts that each completion consists of. `step_labels`: for each, the probability that it is
          good, or null where nobody judged it.
        - `token_labels`: a target for each of `completion_ids`, or null where there is none (the prompt's, say).
        - `source`, `row`, `line`: where the row comes from: a name, the row in it from 0, its line in a file from 1.

        A column that a row does not need is null.

    Example:
        >>> features = preference_features()
        >>> features["label"], features["ranks"]
        (Value('float64'), List(Value('int64')))
    """
    text, number, integer = Value("string"), Value("float64"), Value("int64")
    value = List({"role": text, "content": text}) if chat else text
    return Features(
        prompt=value,
        completions=List(value),
        completion_ids=List(List(integer)),
        label=number,
        margin=number,
        ranks=List(integer),
        best=integer,
        ratings=List(number),
        steps=List(List(text)),
        step_labels=List(List(number)),
        token_labels=List(List(number)),
        source=text,
        row=integer,
        line=integer,
    )


TABLE_COLUMNS = tuple(preference_features())


def make_table(rows: Sequence[Row], others: dict[str, Any] | None = None) -> Dataset:
    """Make a table of checked rows.

    Args:
        rows: At least one row by column names; missing columns become null.
        others: Further columns and their types; a type of None is found from the values.

    Returns:
        The table, with the types of `preference_features`. Messages of chats that have more than a role and a text
        (calls of tools, say) keep what they have.

    Raises:
        ValueError: If some rows are text and others chats, or a further column has values of different types.

    Example:
        >>> table = make_table([{"prompt": "Hi", "completions": ["Hello!", "No."], "label": 1.0, "row": 0}])
        >>> table[0]["completions"], table[0]["ranks"]
        (['Hello!', 'No.'], None)
    """
    chat = isinstance(rows[0]["prompt"], list)
    for row in rows:
        if isinstance(row["prompt"], list) != chat:
            kinds = ("chats", "text") if chat else ("text", "chats")
            raise ValueError(
                f"{place_of(rows[0])} is {kinds[0]} and {place_of(row)} is {kinds[1]}. Make two tables of them."
            )
    features = preference_features(chat=chat)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in features}
    if chat:
        columns["prompt"] = [_messages(chat) for chat in columns["prompt"]]
        columns["completions"] = [[_messages(chat) for chat in chats] for chats in columns["completions"]]
        if not all(map(_plain, columns["prompt"] + [chat for chats in columns["completions"] for chat in chats])):
            features.update({name: _type_of(name, columns[name]) for name in ("prompt", "completions")})
    for name, kind in (others or {}).items():
        columns[name] = [row.get(name) for row in rows]
        features[name] = kind or _type_of(name, columns[name])
    return Dataset.from_dict(columns, features=features)


def place_of(row: Row) -> str:
    """Describe where a row comes from.

    Args:
        row: A row with `row` and perhaps `line`.

    Returns:
        Such as "row 3" or "row 3 in line 5".

    Example:
        >>> place_of({"row": 3, "line": 5})
        'row 3 in line 5'
    """
    return f"row {row['row']}" if row.get("line") is None else f"row {row['row']} in line {row['line']}"


def quoted(names: Sequence[str]) -> str:
    """Quote names of columns for a message.

    Args:
        names: The names.

    Returns:
        The names in backticks, separated by commas.

    Example:
        >>> quoted(["label", "ranks"])
        '`label`, `ranks`'
    """
    return ", ".join(f"`{name}`" for name in names)


def _type_of(name: str, values: list[Any]) -> Any:
    try:
        return Dataset.from_dict({name: values}).features[name]
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"`{name}` has values of different types: {error} Remove it, or give it one type.") from error


def _messages(chat: list[Row]) -> list[Row]:
    """Leave out what `datasets` put where a message has nothing."""
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"} for message in chat
    ]


def _plain(chat: list[Row]) -> bool:
    return all(message.keys() == {"role", "content"} and isinstance(message["content"], str) for message in chat)
