import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.tools.labeling import guard as guard_module
from rlhf_recipes.tools.labeling.guard import MOST_BYTES, Guard, RateLimit, is_loopback

OWN = {"host": "127.0.0.1:8731", "origin": "http://127.0.0.1:8731"}


async def echo(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(guard, method="POST", path="/judge", headers=OWN, chunks=(b"",), client="127.0.0.1"):
    """Send a request; return the status, the headers and the body of the answer."""
    messages = [{"type": "http.request", "body": body, "more_body": True} for body in chunks]
    messages[-1]["more_body"] = False
    sent = []

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": encoded, "client": (client, 1)}
    asyncio.run(guard(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def test_a_request_of_the_page_passes_with_strict_headers():
    status, headers, body = ask(Guard(echo, "127.0.0.1"), chunks=[b"a=", b"1"])
    assert (status, body) == (200, b"a=1")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "*" not in policy
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8731", 200),
        ("localhost:9000", 200),
        ("[::1]:8731", 200),
        ("evil.example:8731", 421),
        ("127.0.0.1.evil.example", 421),
        ("192.168.1.7:8731", 421),
        ("127.0.0.1@evil.example", 421),
        ("[evil", 421),
        ("", 421),
    ],
)
def test_only_names_of_this_machine_are_answered(host, status):
    assert ask(Guard(echo, "127.0.0.1"), "GET", "/", {"host": host})[0] == status


@pytest.mark.parametrize(("host", "status"), [("192.168.1.7:8731", 200), ("label.lan", 200), ("evil.example", 421)])
def test_beyond_this_machine_addresses_and_its_own_names_are_answered(host, status, monkeypatch):
    monkeypatch.setattr(guard_module.socket, "gethostname", lambda: "label.lan")
    assert ask(Guard(echo, "0.0.0.0"), "GET", "/", {"host": host})[0] == status


@pytest.mark.parametrize(
    "headers",
    [
        {"host": OWN["host"]},
        OWN | {"origin": "null"},
        OWN | {"origin": "http://evil.example"},
        OWN | {"origin": "http://127.0.0.1:9999"},
        OWN | {"origin": "http://localhost:8731"},
        OWN | {"sec-fetch-site": "cross-site"},
        OWN | {"sec-fetch-site": "same-site"},
    ],
)
def test_what_another_page_sends_is_refused(headers):
    guard = Guard(echo, "127.0.0.1")
    for path in ("/judge", "/undo", "/sign-in", "/sign-out", "/leave"):
        assert ask(guard, path=path, headers=headers)[0] == 403
    assert ask(guard, "PUT", headers=headers)[0] == 403


def test_bodies_are_limited_whatever_their_length_says():
    guard, large = Guard(echo, "127.0.0.1"), b"x" * (MOST_BYTES // 2 + 1)
    assert ask(guard, chunks=[large])[0] == 200
    assert ask(guard, chunks=[large, large])[0] == 413
    assert ask(guard, headers=OWN | {"content-length": str(MOST_BYTES + 1)})[0] == 413
    assert ask(guard, headers=OWN | {"content-length": "-1"})[0] == 413


def test_a_body_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(guard_module, "_BODY_SECONDS", 0.05)

    async def never():
        await asyncio.sleep(60)

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/judge", "client": ("a", 1)}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in OWN.items()]
    asyncio.run(Guard(echo, "127.0.0.1")(scope, never, send))
    assert sent[0]["status"] == 408


def test_passwords_cannot_be_tried_fast(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(guard_module, "monotonic", lambda: now[0])
    guard = Guard(echo, "127.0.0.1")
    statuses = [ask(guard, path="/sign-in")[0] for _ in range(12)]
    assert statuses == [200] * 10 + [429] * 2
    status, headers, _ = ask(guard, path="/sign-in")
    assert (status, headers["retry-after"]) == (429, "5")
    assert ask(guard, path="/sign-in", client="10.0.0.9")[0] == 200
    assert ask(guard, path="/judge")[0] == 200
    now[0] += 5
    assert ask(guard, path="/sign-in")[0] == 200
    assert [ask(guard, "GET", "/", OWN)[0] for _ in range(400)].count(429) > 50


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3)), max_size=60))
def test_a_client_never_gets_more_than_its_burst_and_rate(calls):
    limit, now, passed = RateLimit(burst=3, per_second=0.5), 0.0, {"a": [], "b": []}
    for client, later in calls:
        now += later
        if limit.wait(client, now) == 0:
            passed[client].append(now)
    for times in passed.values():
        for start, first in enumerate(times):
            for count, last in enumerate(times[start:], 1):
                assert count <= 3 + 0.5 * (last - first) + 1e-6


def test_few_clients_are_remembered():
    limit = RateLimit(burst=1, per_second=0.001, most_clients=2)
    assert [limit.wait(client, 0.0) > 0 for client in "abca"] == [False] * 4
    assert limit.wait("c", 0.0) > 0


def test_loopback():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "a.b")] == (
        [True] * 3 + [False] * 4
    )
