"""The SQLite file of a labelling: its tables, how it is made and opened."""

from __future__ import annotations

import json
import os
import random
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rlhf_recipes.tools.labeling.records import Item, Judgement, checked, fingerprint

_APPLICATION = 0x524C4246  # "RLBF": SQLite's mark of what a file is for
_VERSION = 1
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE items (
    item INTEGER PRIMARY KEY, row TEXT NOT NULL, models TEXT, gold TEXT, position INTEGER NOT NULL UNIQUE,
    wanted INTEGER NOT NULL, missing INTEGER NOT NULL
) STRICT;
CREATE INDEX open_items ON items (position) WHERE missing > 0;
CREATE TABLE sessions (
    session INTEGER PRIMARY KEY, token BLOB NOT NULL UNIQUE, labeller TEXT NOT NULL, started_at TEXT NOT NULL
) STRICT;
CREATE TABLE leases (
    session INTEGER PRIMARY KEY REFERENCES sessions, item INTEGER NOT NULL REFERENCES items, labeller TEXT NOT NULL,
    showing TEXT NOT NULL, shown_at REAL NOT NULL, expires_at REAL NOT NULL
) STRICT;
CREATE INDEX leased_items ON leases (item);
CREATE TABLE judgements (
    judgement INTEGER PRIMARY KEY AUTOINCREMENT, item INTEGER NOT NULL REFERENCES items, labeller TEXT NOT NULL,
    session INTEGER REFERENCES sessions, verdict TEXT NOT NULL, ranks TEXT, strength TEXT, note TEXT NOT NULL,
    shown TEXT, shown_at TEXT, judged_at TEXT, milliseconds INTEGER, undone_at TEXT
) STRICT;
CREATE UNIQUE INDEX one_of_each_labeller ON judgements (item, labeller) WHERE undone_at IS NULL;
CREATE INDEX by_labeller ON judgements (labeller, verdict) WHERE undone_at IS NULL;
CREATE INDEX by_session ON judgements (session, judgement) WHERE undone_at IS NULL;
"""


def create(
    path: Path, items: Sequence[Item], source: str = "?", seed: int = 0, past: Sequence[Judgement] = ()
) -> None:
    """Make a database, all of it or nothing.

    Args:
        path: A file that is not there yet, or is empty.
        items: What is to be labelled.
        source: Where it comes from.
        seed: Seed of the order of the items, and of the answers on the page.
        past: Judgements that were given elsewhere. Their items are numbered as `items`, from 0.

    Raises:
        FileExistsError: If the file holds something.
        ValueError: If a judgement does not fit its item.
    """
    if path.exists() and path.stat().st_size:
        raise FileExistsError(f"{path} is there already. Name another file, or remove it.")
    settings = {"name": secrets.token_hex(8), "fingerprint": fingerprint(items), "source": source}
    settings |= {"seed": str(seed), "per_item": "1", "shared": "1"}
    part = path.with_name(f"{path.name}.part")  # a file that is there is whole, whenever this is killed
    part.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(part)) as database, database:
            _fill(database, items, settings, past)
        os.replace(part, path)
    except sqlite3.IntegrityError as error:
        raise ValueError(f"A labeller judges the same item twice: {error}. Keep one of the two judgements.") from error
    finally:
        part.unlink(missing_ok=True)


def _fill(
    database: sqlite3.Connection,
    items: Sequence[Item],
    settings: dict[str, str],
    past: Sequence[Judgement],
) -> None:
    for statement in _SCHEMA.split(";"):
        database.execute(statement)
    database.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())
    insert_items(database, items, settings)
    for judgement in past:
        number = len(items[judgement.item].row["completions"])
        insert(database, judgement._replace(answer=checked(judgement.answer, number)), None)
    recount(database, "TRUE")
    database.execute(f"PRAGMA application_id = {_APPLICATION}")
    database.execute(f"PRAGMA user_version = {_VERSION}")


def insert_items(database: sqlite3.Connection, items: Sequence[Item], settings: Mapping[str, str]) -> None:
    """Write items into a transaction, behind those that are there, in an order drawn at random.

    Args:
        database: The database.
        items: The items; they are numbered on from those that are there.
        settings: The database's: `seed`, and how many labellers are to judge an item (`per_item`, `shared`).
    """
    [(start,)] = database.execute("SELECT count(*) FROM items")
    positions = list(range(len(items)))
    random.Random(int(settings["seed"])).shuffle(positions)
    shared, per_item = round(float(settings["shared"]) * len(items)), int(settings["per_item"])
    database.executemany(
        "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, 1)",
        [
            (
                *(start + number, write_json(item.row), write_json(item.models), write_json(item.gold)),
                *(start + position, per_item if item.gold is None and position < shared else 1),
            )
            for number, (item, position) in enumerate(zip(items, positions, strict=True))
        ],
    )
    recount(database, "item >= ?", start)


def connect(path: Path) -> sqlite3.Connection:
    """Open a file so that every commit is on the disk before it returns, and others can read meanwhile.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no database.
    """
    database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
    except sqlite3.DatabaseError as error:
        database.close()
        raise ValueError(f"{path} cannot be read as a database of labels: {error}. Name another file.") from error
    # With WAL, FULL alone syncs the log at every commit; NORMAL would lose the last ones with the power.
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA foreign_keys = ON")
    return database


def check_ours(database: sqlite3.Connection, path: Path) -> None:
    """Check that a database is one of labels.

    Args:
        database: The database.
        path: Its file, for the message.

    Raises:
        ValueError: If it is none, or of another version.
    """
    [[application]] = database.execute("PRAGMA application_id")
    [[version]] = database.execute("PRAGMA user_version")
    if (application, version) != (_APPLICATION, _VERSION):
        ours = f"one of version {version}; this is for version {_VERSION}" if application == _APPLICATION else "none"
        raise ValueError(f"Expected a database of labels, and {path} is {ours}. Name another file.")


def insert(database: sqlite3.Connection, judgement: Judgement, session: int | None) -> None:
    """Write a judgement into a transaction.

    Args:
        database: The database.
        judgement: The judgement; its number is given here.
        session: Who judged; None where it was elsewhere.
    """
    answer = judgement.answer
    database.execute(
        "INSERT INTO judgements (item, labeller, session, verdict, ranks, strength, note, shown, shown_at, judged_at, "
        "milliseconds, undone_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(judgement.item, judgement.labeller, session, answer.verdict, write_json(answer.ranks), answer.strength),
            *(answer.note, write_json(judgement.shown), judgement.shown_at, judgement.judged_at),
            *(judgement.milliseconds, judgement.undone_at),
        ),
    )


def recount(database: sqlite3.Connection, which: str, *values: Any) -> None:
    """Count anew what items miss: a counter could drift. Who skips says nothing; a known answer never has enough.

    Args:
        database: The database.
        which: A condition on `items`.
        *values: Its values.
    """
    database.execute(
        "UPDATE items SET missing = CASE WHEN gold IS NOT NULL THEN 1 ELSE wanted - (SELECT count(*) FROM "
        f"judgements j WHERE j.item = items.item AND undone_at IS NULL AND verdict != 'skipped') END WHERE {which}",
        values,
    )


def read_json(text: str | None) -> Any:
    """Read a cell that may be null.

    Example:
        >>> read_json("[1]"), read_json(None)
        ([1], None)
    """
    return None if text is None else json.loads(text)


def write_json(value: Any) -> str | None:
    """Write a cell that may be null. Halves of surrogate pairs, which SQLite cannot hold, are escaped by JSON.

    Example:
        >>> write_json([1]), write_json(None)
        ('[1]', None)
    """
    return None if value is None else json.dumps(value, sort_keys=True, default=str)
