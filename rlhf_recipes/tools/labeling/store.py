"""The file with the items and every judgement of them: one SQLite database, in which every click is durable.

What was judged is never changed or removed. Undoing writes when, and the judgement stays.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any, NamedTuple

from rlhf_recipes.tools.labeling.database import check_ours, connect, insert, insert_items, read_json, recount
from rlhf_recipes.tools.labeling.records import Answer, Item, Judgement, checked, fingerprint

SESSION_SECONDS = 7 * 24 * 3600.0
_ADDED = "added "  # before the name of items that were added, in the settings

# An item is free for a session if its labeller has not judged it and does not see it elsewhere, and if more judgements
# are missing than others are about to give. Items with a known answer are for everybody.
_FREE = """
FROM items WHERE missing > 0
AND NOT EXISTS (SELECT 1 FROM judgements j WHERE j.item = items.item AND labeller = :labeller AND undone_at IS NULL)
AND NOT EXISTS (
    SELECT 1 FROM leases l WHERE l.item = items.item AND session != :session AND labeller = :labeller
    AND expires_at > :now
)
AND (gold IS NOT NULL OR missing > (
    SELECT count(*) FROM leases l WHERE l.item = items.item AND session != :session AND expires_at > :now
))
"""
_SEEN_BY_NOBODY = """
AND NOT EXISTS (SELECT 1 FROM leases l WHERE l.item = items.item AND session != :session AND expires_at > :now)
"""


class Session(NamedTuple):
    """One browser of one labeller, from signing in to signing out."""

    session: int
    labeller: str


class Showing(NamedTuple):
    """An item as it is shown to somebody.

    Attributes:
        number: The item's.
        item: The item.
        shown: Which answer stands where: the indices of `completions` in the order on the page.
        showing: A word for this one time that it was shown.
        note: What the labeller had noted before the judgement was undone.
    """

    number: int
    item: Item
    shown: list[int]
    showing: str
    note: str


class Progress(NamedTuple):
    """How far labelling is.

    Attributes:
        done: Items that this labeller has judged or skipped.
        left: Items that are free for this labeller, or that others see now.
        items: All items.
        finished: Items that need no more judgements; those with a known answer are not counted.
        wanted: Items without a known answer.
        can_undo: Whether this session has judged something that holds.
    """

    done: int
    left: int
    items: int
    finished: int
    wanted: int
    can_undo: bool


class Store:
    """A database of items and judgements.

    Args:
        path: The file.
        lease_seconds: For how long an item that is on somebody's page is nobody else's.
        secret: What sessions rest on, such as the password: with another one they end.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no database of labels.

    Example:
        >>> import tempfile
        >>> from rlhf_recipes.tools.labeling.database import create
        >>> path = Path(tempfile.mkdtemp()) / "labels.sqlite"
        >>> create(path, [Item({"prompt": "Hi", "completions": ["Hello!", "No."]})])
        >>> store = Store(path)
        >>> ann = store.session(store.sign_in("Ann"))
        >>> showing = store.show(ann)
        >>> store.judge(ann, showing.number, Answer("ranked", [1, 2], "much"), milliseconds=900)
        True
        >>> store.show(ann) is None, [judgement.answer.ranks for judgement in store.judgements()]
        (True, [[1, 2]])
        >>> store.close()
    """

    def __init__(self, path: Path, lease_seconds: float = 1800.0, secret: str = "") -> None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}. Name the rows to label, and it is made.")
        self.path, self.lease_seconds, self._secret = path, lease_seconds, secret
        self._lock = threading.RLock()
        self._database = connect(path)
        try:
            check_ours(self._database, path)
        except ValueError:
            self._database.close()
            raise
        self.settings = dict(self._database.execute("SELECT name, value FROM settings"))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # One writer at a time, across processes too. What is committed is on the disk (`synchronous`).
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _all(self, query: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def check_same(self, items: Sequence[Item], source: str) -> None:
        """Refuse rows that are not those of this database.

        Args:
            items: The rows.
            source: Where they come from, for the message.

        Raises:
            ValueError: If they differ in anything but the name of their file.
        """
        if fingerprint(items) != self.settings["fingerprint"]:
            [(number,)] = self._all("SELECT count(*) FROM items")
            raise ValueError(
                f"{self.path} holds judgements of other data ({number} rows of {self.settings['source']}) than "
                f"{source} ({len(items)} rows). Name another database, or leave out the data to go on with its own."
            )

    def add(self, items: Sequence[Item], source: str) -> bool:
        """Add items behind those that are there, also while the page is served: it shows them as they come.

        Args:
            items: The items.
            source: Their name. What was added under it is not added again, so that whoever was interrupted can call
                this once more.

        Returns:
            Whether they were added; False if they are there already.

        Raises:
            ValueError: If other items were added under this name.

        Example:
            >>> import tempfile
            >>> from rlhf_recipes.tools.labeling.database import create
            >>> path = Path(tempfile.mkdtemp()) / "labels.sqlite"
            >>> first, more = (Item({"prompt": text, "completions": ["a", "b"]}) for text in ("Hi", "Bye"))
            >>> create(path, [first])
            >>> store = Store(path)
            >>> store.add([more], "round 2"), store.add([more], "round 2"), sorted(store.items())
            (True, False, [0, 1])
            >>> store.close()
        """
        with self._transaction() as database:
            settings = dict(database.execute("SELECT name, value FROM settings"))
            first = {settings["source"]: settings["fingerprint"]}
            there = first | {name[len(_ADDED) :]: value for name, value in settings.items() if name.startswith(_ADDED)}
            if source in there:
                if there[source] != fingerprint(items):
                    raise ValueError(f"{self.path} has other items under the name {source!r}. Give these another one.")
                return False
            insert_items(database, items, settings)
            database.execute("INSERT INTO settings VALUES (?, ?)", (f"{_ADDED}{source}", fingerprint(items)))
        return True

    def open_items(self) -> list[int]:
        """Return the numbers of the items that need judgements, but for those that somebody skipped.

        An item that a lone labeller skips never gets a judgement: whoever waits for the labels is not to wait for it.
        """
        query = (
            "SELECT item FROM items WHERE missing > 0 AND gold IS NULL AND NOT EXISTS (SELECT 1 FROM judgements j "
            "WHERE j.item = items.item AND undone_at IS NULL AND verdict = 'skipped') ORDER BY item"
        )
        return [item for (item,) in self._all(query)]

    def want(self, per_item: int | None, shared: float | None) -> None:
        """Set how many labellers are to judge an item; what is None stays as it is.

        Args:
            per_item: Number of labellers for each item that is shared, from 1 on.
            shared: Share of the items that so many are to judge, in [0, 1]; the others get one labeller each.

        Raises:
            ValueError: If a number is out of its range.
        """
        if per_item is None and shared is None:
            return
        per_item = int(self.settings["per_item"]) if per_item is None else per_item
        shared = float(self.settings["shared"]) if shared is None else shared
        if per_item < 1 or not 0 <= shared <= 1:
            raise ValueError(
                f"Expected at least 1 labeller for an item and a share from 0 to 1, got {per_item} and {shared:g}."
            )
        with self._transaction() as database:
            [(number,)] = database.execute("SELECT count(*) FROM items WHERE gold IS NULL")
            # Positions are drawn at random, so the first ones are a random sample, and the agreement is known early.
            database.execute(
                "UPDATE items SET wanted = CASE WHEN item IN "
                "(SELECT item FROM items WHERE gold IS NULL ORDER BY position LIMIT ?) THEN ? ELSE 1 END",
                (round(shared * number), per_item),
            )
            recount(database, "TRUE")
            new = {"per_item": str(per_item), "shared": str(shared)}
            database.executemany("UPDATE settings SET value = ? WHERE name = ?", [(v, k) for k, v in new.items()])
        self.settings |= new

    def sign_in(self, labeller: str) -> str:
        """Start a session.

        Args:
            labeller: The name.

        Returns:
            The secret that the browser keeps; the database has its hash.
        """
        token = secrets.token_urlsafe(32)
        with self._transaction() as database:
            database.execute(
                "INSERT INTO sessions (token, labeller, started_at) VALUES (?, ?, ?)",
                (self._hash(token), labeller, _utc(time())),
            )
        return token

    def sign_out(self, session: Session) -> None:
        """End a session, and let go of what it sees. Its judgements stay.

        Args:
            session: The session.
        """
        with self._transaction() as database:
            database.execute("DELETE FROM leases WHERE session = ?", (session.session,))
            database.execute("UPDATE sessions SET token = randomblob(32) WHERE session = ?", (session.session,))

    def session(self, token: str) -> Session | None:
        """Find the session of a secret; None where there is none, or it is over.

        Args:
            token: What `sign_in` returned.
        """
        query = "SELECT session, labeller FROM sessions WHERE token = ? AND started_at > ?"
        found = self._all(query, (self._hash(token), _utc(time() - SESSION_SECONDS)))
        return Session(*found[0]) if found else None

    def _hash(self, token: str) -> bytes:
        return hashlib.sha256(f"{token}/{self._secret}".encode()).digest()

    def show(self, session: Session) -> Showing | None:
        """Lease an item to a session: the one that it sees already, or the next one.

        Args:
            session: The session.

        Returns:
            The item; None where nothing is free.
        """
        with self._transaction() as database:
            here = {"session": session.session, "labeller": session.labeller, "now": time()}
            own = database.execute("SELECT item FROM leases WHERE session = :session", here).fetchone()
            found = None
            if own is not None:
                query = f"SELECT item {_FREE} AND item = :item"
                found = database.execute(query, here | {"item": own[0]}).fetchone()
            for others in (_SEEN_BY_NOBODY, ""):
                query = f"SELECT item {_FREE} {others} ORDER BY position LIMIT 1"
                found = found or database.execute(query, here).fetchone()
            if found is None:
                database.execute("DELETE FROM leases WHERE session = :session", here)
                return None
            showing = self._lease(database, session, found[0])
            [(row, models, gold)] = database.execute("SELECT row, models, gold FROM items WHERE item = ?", found)
            note = database.execute(
                "SELECT note FROM judgements WHERE item = ? AND labeller = ? ORDER BY judgement DESC LIMIT 1",
                (found[0], session.labeller),
            ).fetchone()
        item = _item(row, models, gold)
        shown = self.order(session.labeller, found[0], len(item.row["completions"]))
        return Showing(found[0], item, shown, showing, "" if note is None else note[0])

    def _lease(self, database: sqlite3.Connection, session: Session, item: int) -> str:
        showing, now = secrets.token_hex(8), time()
        database.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (session) DO UPDATE SET item = excluded.item, "
            "showing = excluded.showing, shown_at = excluded.shown_at, expires_at = excluded.expires_at",
            (session.session, item, session.labeller, showing, now, now + self.lease_seconds),
        )
        return showing

    def order(self, labeller: str, item: int, number: int) -> list[int]:
        """Draw in which order a labeller sees the answers of an item: always the same one.

        Args:
            labeller: The name.
            item: The item's number.
            number: How many answers there are.

        Returns:
            Their indices, in the order on the page.
        """
        shown = list(range(number))
        random.Random(f"{self.settings['seed']}/{item}/{labeller}").shuffle(shown)
        return shown

    def number_of_answers(self, item: int) -> int:
        """Return how many answers an item has; 0 where there is no such item.

        Args:
            item: The item's number.
        """
        found = self._all("SELECT json_array_length(row, '$.completions') FROM items WHERE item = ?", (item,))
        return int(found[0][0]) if found else 0

    def leave(self, session: Session, showing: str) -> None:
        """Let go of an item, unless it was shown again meanwhile (a page that is loaded again leaves the old one).

        Args:
            session: The session.
            showing: The time that it was shown.
        """
        with self._transaction() as database:
            # The lease stays as one that is over: who comes back in time gets the same item, and may still judge it.
            database.execute(
                "UPDATE leases SET expires_at = 0 WHERE session = ? AND showing = ?", (session.session, showing)
            )

    def judge(self, session: Session, item: int, answer: Answer, milliseconds: int | None = None) -> bool:
        """Write a judgement down. When this returns, it is on the disk.

        Args:
            session: The session that saw the item, even if its lease is over.
            item: The item's number.
            answer: What is said.
            milliseconds: How long it was seen; without it, the time since it was shown.

        Returns:
            Whether it was written down: not if this session does not see the item, as after a second click.

        Raises:
            ValueError: If the answer does not fit the item.
        """
        with self._transaction() as database:
            lease = database.execute(
                "SELECT shown_at, row FROM leases JOIN items USING (item) WHERE session = ? AND item = ?",
                (session.session, item),
            ).fetchone()
            if lease is None or self._has_judged(database, session.labeller, item):
                return False
            shown_at, now = lease[0], time()
            number = len(json.loads(lease[1])["completions"])
            answer = checked(answer, number)
            insert(
                database,
                Judgement(
                    number=0,
                    item=item,
                    labeller=session.labeller,
                    answer=answer,
                    shown=self.order(session.labeller, item, number),
                    shown_at=_utc(shown_at),
                    judged_at=_utc(now),
                    milliseconds=round((now - shown_at) * 1000) if milliseconds is None else milliseconds,
                    undone_at=None,
                ),
                session.session,
            )
            database.execute("DELETE FROM leases WHERE session = ?", (session.session,))
            recount(database, "item = ?", item)
        return True

    def judge_all(self, labeller: str, say: Callable[[int, Item], Answer]) -> int:
        """Let a program judge whatever is free for it. Each judgement is on the disk before the next one.

        Args:
            labeller: Its name, which nobody else has.
            say: Takes an item's number and the item, and gives the answer. One that depends on these alone is the
                same again after an interruption.

        Returns:
            How many items it judged.
        """
        with self._transaction() as database:  # what it saw when it was killed would be nobody's for half an hour
            database.execute("DELETE FROM leases WHERE labeller = ?", (labeller,))
        session = self.session(self.sign_in(labeller))
        assert session is not None  # it has just been started
        judged = 0
        while (showing := self.show(session)) is not None:
            judged += self.judge(session, showing.number, say(showing.number, showing.item))
        return judged

    @staticmethod
    def _has_judged(database: sqlite3.Connection, labeller: str, item: int) -> bool:
        query = "SELECT 1 FROM judgements WHERE item = ? AND labeller = ? AND undone_at IS NULL"
        return database.execute(query, (item, labeller)).fetchone() is not None

    def undo(self, session: Session) -> bool:
        """Take back the last judgement of this session that holds, and lease its item to the session again.

        Args:
            session: The session.

        Returns:
            Whether there was one.
        """
        with self._transaction() as database:
            last = database.execute(
                "SELECT judgement, item FROM judgements WHERE session = ? AND undone_at IS NULL "
                "ORDER BY judgement DESC LIMIT 1",
                (session.session,),
            ).fetchone()
            if last is None:
                return False
            database.execute("UPDATE judgements SET undone_at = ? WHERE judgement = ?", (_utc(time()), last[0]))
            recount(database, "item = ?", last[1])
            self._lease(database, session, last[1])
        return True

    def progress(self, session: Session) -> Progress:
        """Count what is done and what is left.

        Args:
            session: Whose.
        """
        here = {"session": session.session, "labeller": session.labeller}
        [(done, left, items, finished, wanted, can_undo)] = self._all(
            "SELECT (SELECT count(*) FROM judgements WHERE labeller = :labeller AND undone_at IS NULL), "
            "(SELECT count(*) FROM items WHERE missing > 0) - (SELECT count(*) FROM judgements JOIN items USING "
            "(item) WHERE labeller = :labeller AND undone_at IS NULL AND missing > 0), "
            "(SELECT count(*) FROM items), "
            "(SELECT count(*) FROM items WHERE missing <= 0), "
            "(SELECT count(*) FROM items WHERE gold IS NULL), "
            "EXISTS (SELECT 1 FROM judgements WHERE session = :session AND undone_at IS NULL)",
            here,
        )
        return Progress(done, left, items, finished, wanted, bool(can_undo))

    def items(self) -> dict[int, Item]:
        """Return all items by their number."""
        return {number: _item(*parts) for number, *parts in self._all("SELECT item, row, models, gold FROM items")}

    def judgements(self, latest: int | None = None) -> list[Judgement]:
        """Return judgements in the order in which they came, those that were taken back too.

        Args:
            latest: At most so many, the latest ones; None for all.
        """
        query = (
            "SELECT judgement, item, labeller, verdict, ranks, strength, note, shown, shown_at, judged_at, "
            "milliseconds, undone_at FROM judgements ORDER BY judgement DESC LIMIT ?"
        )
        rows = self._all(query, (-1 if latest is None else latest,))
        return [
            Judgement(
                *(number, item, labeller, Answer(verdict, read_json(ranks), strength, note), read_json(shown), *times),
            )
            for number, item, labeller, verdict, ranks, strength, note, shown, *times in reversed(rows)
        ]


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _item(row: str, models: str | None, gold: str | None) -> Item:
    return Item(json.loads(row), read_json(models), read_json(gold))
