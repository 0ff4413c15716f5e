"""What stands before the page: which hosts it answers to, whose requests, how large and how many, and its headers."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_BYTES = 64 * 1024  # of a request's body: a note of 2,000 characters has at most 24 KB when it is encoded
_BODY_SECONDS = 10.0
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not `no-referrer`: a form would then be sent with the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that is bound to a host.

    Args:
        host: An address, or a name.

    Example:
        >>> [is_loopback(host) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost", "0.0.0.0", "example.org")]
        [True, True, True, True, False, False]
    """
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


class RateLimit:
    """A bucket of tokens for each client: a burst, then a steady rate.

    Args:
        burst: Requests at once.
        per_second: Requests that come back in a second.
        most_clients: How many clients are remembered; those that were seen longest ago are forgotten.

    Example:
        >>> limit = RateLimit(burst=2, per_second=0.5)
        >>> [limit.wait("a", now) for now in (0.0, 0.0, 1.0, 2.0)], limit.wait("b", 0.0)
        ([0.0, 0.0, 1.0, 0.0], 0.0)
    """

    def __init__(self, burst: float, per_second: float, most_clients: int = 10_000) -> None:
        self.burst, self.per_second, self.most_clients = burst, per_second, most_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str, now: float) -> float:
        """Take a token.

        Args:
            client: Whose.
            now: The time in seconds, on a clock that does not go back.

        Returns:
            0 if there was one; else the seconds until there is.
        """
        tokens, then = self._buckets.pop(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.per_second)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self.per_second
        self._buckets[client] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > self.most_clients:
            self._buckets.popitem(last=False)
        return wait


class Guard:
    """Pass on what a browser on this page sent, and refuse the rest.

    - A `Host` that is not this server's is refused: a page of another name that was made to lead here (DNS rebinding)
      reads nothing.
    - What changes something needs an `Origin` that is this page's: a page elsewhere sends nothing.
    - Bodies are limited, and requests and attempts to sign in per client.

    Args:
        app: What is guarded.
        host: What the server is bound to. Bound to more than this machine, it answers to addresses in numbers, which
            cannot be rebound, to this machine's name, and to `host`.
    """

    def __init__(self, app: App, host: str) -> None:
        self.app, self.local = app, is_loopback(host)
        self.names = _LOOPBACK | {host} | (set() if self.local else {socket.gethostname(), socket.getfqdn()})
        self.requests = RateLimit(burst=300, per_second=50)
        self.attempts = RateLimit(burst=10, per_second=0.2)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no other protocol is spoken here
        status, reason, extra = self._refusal(scope)
        body = b""
        if not status:
            status, reason, body = await _read_body(receive)
        if status:
            await _refuse(send, status, reason, extra)
            return
        await self.app(scope, _replay(body, receive), _with_headers(send, scope["path"]))

    def _refusal(self, scope: Message) -> tuple[int, str, dict[str, str]]:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        client = scope["client"][0] if scope.get("client") else "?"
        limits = [self.requests]
        if scope["method"] == "POST" and scope["path"] == "/sign-in":
            limits.append(self.attempts)
        for limit in limits:
            if wait := limit.wait(client, monotonic()):
                again = {"retry-after": str(math.ceil(wait))}
                return 429, f"Too many requests. Try again in {math.ceil(wait)} s.", again
        if not self._is_own_host(headers.get("host", "")):
            return 421, "This server does not answer to that name.", {}
        if scope["method"] not in ("GET", "HEAD") and not _is_own_origin(headers):
            return 403, "This request does not come from this page.", {}
        if not headers.get("content-length", "0").isdecimal() or int(headers.get("content-length", "0")) > MOST_BYTES:
            return 413, f"At most {MOST_BYTES} bytes are read.", {}
        return 0, "", {}

    def _is_own_host(self, host: str) -> bool:
        name = _host_name(host)
        return name is not None and (name in self.names or (not self.local and _address(name) is not None))


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_own_origin(headers: dict[str, str]) -> bool:
    origin = headers.get("origin", "")
    own = origin in (f"http://{headers.get('host')}", f"https://{headers.get('host')}")
    return own and headers.get("sec-fetch-site", "same-origin") == "same-origin"


async def _read_body(receive: Receive) -> tuple[int, str, bytes]:
    body, more = b"", True
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MOST_BYTES:
                    return 413, f"At most {MOST_BYTES} bytes are read.", b""
    except TimeoutError:
        return 408, "The request did not come to its end.", b""
    return 0, "", body


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


def _with_headers(send: Send, path: str) -> Send:
    own = {**_HEADERS, "cache-control": "no-cache"} if path.startswith("/static/") else _HEADERS
    encoded = [(name.encode(), value.encode()) for name, value in own.items()]

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *encoded]
        await send(message)

    return send_with_headers


async def _refuse(send: Send, status: int, reason: str, extra: dict[str, str]) -> None:
    headers = {**_HEADERS, "content-type": "text/plain; charset=utf-8", "connection": "close"} | extra
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": reason.encode()})
