"""Answers that are kept on disk, so that nothing is asked, or paid, twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

logger = logging.getLogger(__name__)


def key_of(*parts: Any) -> str:
    """Return the key of a question: a hash, so that no text of a prompt is in the file.

    Args:
        *parts: All that the answer depends on, as JSON has it.

    Example:
        >>> key_of("a judge", "a question") == key_of("a judge", "a question") != key_of("a judgea", " question")
        True
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class AnswerCache:
    """Answers by their keys, in memory and in a file to which each is added at once. Threads may share one.

    Args:
        path: JSON-lines file; damaged lines, and answers that are not usable, are passed over with a warning. `None`:
            memory only.
        usable: Tells answers from what is none.

    Attributes:
        hits: How often an answer was there.

    Example:
        >>> cache = AnswerCache(None, usable=lambda answer: isinstance(answer, str))
        >>> cache.put("a key", "first")
        >>> cache.get("a key"), cache.get("another key")
        ('first', None)
    """

    def __init__(self, path: str | Path | None, usable: Callable[[Any], bool]) -> None:
        self._path = None if path is None else Path(path)
        self._lock = Lock()
        self._answers: dict[str, Any] = {}
        self.hits = 0
        if self._path is None or not self._path.is_file():
            return
        for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line) if line else None
                if row is not None and usable(row["answer"]):
                    self._answers[str(row["key"])] = row["answer"]
            except (ValueError, KeyError, TypeError):
                logger.warning("A line of %s is damaged and is passed over.", self._path)

    def get(self, key: str) -> Any:
        """Return the answer, or `None`."""
        with self._lock:
            self.hits += key in self._answers
            return self._answers.get(key)

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer. It is on the disk when this returns.

        Args:
            key: Its key.
            answer: What JSON can hold, and `usable` takes.
        """
        with self._lock:
            self._answers[key] = answer
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                torn = self._path.is_file() and not self._ends_with_a_line()
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(("\n" if torn else "") + json.dumps({"key": key, "answer": answer}) + "\n")

    def _ends_with_a_line(self) -> bool:
        """Whether the last line is whole: what a killed process left of one would spoil the next."""
        with self._path.open("rb") as file:  # type: ignore[union-attr]  # there is a file
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            return file.read() in (b"", b"\n")
