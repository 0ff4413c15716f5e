"""Serve a reward over HTTP, for `RemoteReward` in another process. Only the standard library is needed."""

from __future__ import annotations

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Score = Callable[[list[Any], list[Any], list[bool]], list[float]]

logger = logging.getLogger(__name__)

_WAITING = 32  # requests at a time, waiting ones included


class RewardServer(ThreadingHTTPServer):
    """Answer `POST /score` with scores, and `GET /health` while the process lives.

    One request is scored at a time. There is no encryption and no key: serve on this machine, or behind a proxy that
    has both.

    Args:
        score: Function of prompts, completions and whether each is finished, such as `ClassifierReward.scores`. Its
            `ValueError`s are sent to the client, with status 400.
        host: Address to listen on.
        port: Port; 0 takes a free one (`server_port`).
        max_rows: Most completions in a request.
        max_bytes: Longest request.

    Example:
        >>> with RewardServer(lambda prompts, completions, finished: [0.0] * len(prompts), port=0) as server:
        ...     server.server_port > 0  # serve_forever() answers, until shutdown() is called in another thread
        True
    """

    daemon_threads = True

    def __init__(
        self,
        score: Score,
        host: str = "127.0.0.1",
        port: int = 8000,
        max_rows: int = 256,
        max_bytes: int = 8 * 2**20,
    ) -> None:
        super().__init__((host, port), _Handler)
        self.score, self.max_rows, self.max_bytes = score, max_rows, max_bytes
        self.model_lock, self.places = threading.Lock(), threading.BoundedSemaphore(_WAITING)


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 30.0  # seconds for a client that sends slowly

    def do_GET(self) -> None:
        """Answer that the server is there."""
        if self.path == "/health":
            self._answer(200, {"status": "ok"})
        else:
            self._answer(404, {"error": "there is GET /health and POST /score"})

    def do_POST(self) -> None:
        """Score the completions of a request."""
        if not self.server.places.acquire(blocking=False):
            self._answer(503, {"error": f"{_WAITING} requests are waiting; try again"})
            return
        try:
            prompts, completions, finished = self._read()
            with self.server.model_lock:
                scores = self.server.score(prompts, completions, finished)
            self._answer(200, {"scores": scores})
        except _Refused as error:
            self._answer(error.status, {"error": str(error)})
        except ValueError as error:  # of the reward: a text that is too long
            self._answer(400, {"error": str(error)})
        except TimeoutError:
            self.close_connection = True
        except Exception:
            logger.exception("A request could not be scored.")
            self._answer(500, {"error": "the server failed; see its log"})
        finally:
            self.server.places.release()

    def _read(self) -> tuple[list[Any], list[Any], list[bool]]:
        if self.path != "/score":
            raise _Refused(404, "there is GET /health and POST /score")
        if self.headers.get_content_type() != "application/json":  # which no form of a web page can send
            raise _Refused(415, "the content type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(411, "a Content-Length is needed")
        if int(length) > self.server.max_bytes:
            raise _Refused(413, f"the request has {length} bytes, and {self.server.max_bytes} are allowed")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(400, "the request is not JSON") from None
        return _rows(request, self.server.max_rows)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep one line per request out of the terminal."""
        logger.debug(format, *args)


def _rows(request: Any, max_rows: int) -> tuple[list[Any], list[Any], list[bool]]:
    prompts, completions = (
        request.get(name) if isinstance(request, dict) else None for name in ("prompts", "completions")
    )
    if not isinstance(prompts, list) or not isinstance(completions, list) or len(prompts) != len(completions):
        raise _Refused(400, "expected an object with `prompts` and `completions`, two lists of the same length")
    if not 1 <= len(prompts) <= max_rows:
        raise _Refused(413, f"the request has {len(prompts)} rows, and 1 to {max_rows} are allowed")
    finished = request.get("finished", [True] * len(prompts))
    if not isinstance(finished, list) or [type(flag) for flag in finished] != [bool] * len(prompts):
        raise _Refused(400, "`finished` must be a list of true and false, one per completion")
    for row, pair in enumerate(zip(prompts, completions, strict=True)):
        if not (all(isinstance(text, str) for text in pair) or all(map(_is_chat, pair))):
            raise _Refused(400, f"row {row} must be two texts, or two lists of messages with `role` and `content`")
    return prompts, completions, finished


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )
