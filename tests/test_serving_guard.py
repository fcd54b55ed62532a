import asyncio
import json

import pytest

from critrm.serving_guard import Guard, Limits, _Rates, is_loopback

BODY = b'{"a": 1}'


class Counts:
    """Stands in for the metrics."""

    def __init__(self):
        self.rows = []
        self.in_flight = self.requests = self.seconds = self

    def set(self, value):
        pass

    def labels(self, *names):
        self.rows.append(names)
        return self

    def inc(self):
        pass

    def observe(self, value):
        pass


async def echo(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def ask(
    limits, *, app=echo, path="/v1/score", headers=(), parts=(BODY,), host=b"localhost:8000", method="POST", guard=None
):
    """Status, body and headers of one request."""
    guard = guard or Guard(app, limits, metrics=Counts(), paths=frozenset({"/v1/score"}))
    scope = {"type": "http", "method": method, "path": path, "client": ("10.0.0.1", 1)}
    scope["headers"] = [(b"host", host), *headers]
    pending = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    sent = []

    async def receive():
        return pending.pop(0) if pending else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    if not sent:
        return 0, b"", {}
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def code(body: bytes) -> str:
    return json.loads(body)["error"]["code"]


def test_a_request_passes_with_an_id():
    status, body, headers = ask(Limits(), parts=(BODY[:3], BODY[3:]))
    assert (status, body) == (200, BODY)
    assert len(headers[b"x-request-id"]) == 32
    assert ask(Limits(), headers=[(b"x-request-id", b"mine-1")])[2][b"x-request-id"] == b"mine-1"
    assert ask(Limits(), headers=[(b"x-request-id", b'"><script>')])[2][b"x-request-id"] != b'"><script>'


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (None, 401),
        (b"Bearer wrong", 401),
        (b"Basic secret-token", 401),
        (b"secret-token", 401),
        (b"Bearer secret-token", 200),
        (b"bearer secret-token", 200),
    ],
)
def test_the_token_is_asked_for(given, status):
    headers = [(b"authorization", given)] if given else []
    found, body, answered = ask(Limits(token="secret-token"), headers=headers, host=b"rm.example.org")
    assert found == status
    if status == 401:
        assert code(body) == "token"
        assert answered[b"www-authenticate"] == b"Bearer"
    assert b"secret-token" not in body
    assert "secret-token" not in repr(Limits(token="secret-token"))


def test_without_a_token_only_localhost_is_answered():
    for host in (b"localhost", b"127.0.0.1:80", b"[::1]:8000", b"127.8.8.8"):
        assert ask(Limits(), host=host)[0] == 200
    for host in (b"evil.example.org", b"localhost.evil.org", b"", b"0.0.0.0:8000"):
        status, body, _ = ask(Limits(), host=host)
        assert (status, code(body)) == (403, "host")


def test_open_paths_need_no_token():
    assert ask(Limits(token="t"), path="/health", method="GET", host=b"x")[0] == 200
    assert ask(Limits(token="t"), path="/metrics", method="GET", host=b"x")[0] == 401


def test_large_bodies_are_refused():
    assert ask(Limits(max_body=8))[0] == 200
    for headers in ([(b"content-length", b"9")], []):
        status, body, _ = ask(Limits(max_body=8), parts=(BODY, b" "), headers=headers)
        assert (status, code(body)) == (413, "size")


def test_slow_bodies_are_refused(monkeypatch):
    monkeypatch.setattr("critrm.serving_guard.BODY_SECONDS", 0.01)
    guard = Guard(echo, Limits(), metrics=Counts(), paths=frozenset())
    sent = []

    async def receive():
        await asyncio.sleep(5)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "client": None, "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 408


def test_a_client_that_goes_away_is_no_error(caplog):
    guard = Guard(echo, Limits(), metrics=Counts(), paths=frozenset({"/v1/score"}))
    assert ask(Limits(), parts=(), guard=guard)[0] == 0
    assert guard.metrics.rows[0] == ("/v1/score", "0")
    assert not [record for record in caplog.records if record.exc_info]


def test_rates_are_limited_by_address():
    guard = Guard(echo, Limits(requests_per_minute=6), metrics=Counts(), paths=frozenset())
    assert ask(None, guard=guard)[0] == 200
    status, body, headers = ask(None, guard=guard)
    assert (status, code(body)) == (429, "rate")
    assert 1 <= int(headers[b"retry-after"]) <= 10
    assert ask(None, guard=guard, path="/health", method="GET")[0] == 200


def test_rates_come_back_and_forget_old_clients(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("critrm.serving_guard.time.monotonic", lambda: now[0])
    monkeypatch.setattr("critrm.serving_guard.MAX_CLIENTS", 3)
    rates = _Rates(60)
    assert [rates.wait("a") for _ in range(10)] == [0.0] * 10
    assert rates.wait("a") == pytest.approx(1.0)
    now[0] = 1.0
    assert rates.wait("a") == 0.0
    for client in "bcde":
        rates.wait(client)
    assert len(rates._left) == 3


def test_too_many_in_flight_are_told_to_come_back():
    status, body, headers = ask(Limits(max_in_flight=0))
    assert (status, code(body), headers[b"retry-after"]) == (503, "busy", b"1")


def test_a_defect_shows_no_trace(caplog):
    async def broken(scope, receive, send):
        raise RuntimeError("inner secret")

    status, body, _ = ask(Limits(), app=broken, headers=[(b"x-request-id", b"id-7")])
    assert (status, code(body)) == (500, "internal")
    assert b"inner secret" not in body
    assert json.loads(body)["error"]["request_id"] == "id-7"
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.facts == {"request_id": "id-7"}


def test_unknown_paths_do_not_fill_the_metrics():
    guard = Guard(echo, Limits(), metrics=Counts(), paths=frozenset({"/v1/score"}))
    for i in range(3):
        ask(None, guard=guard, path=f"/{i}")
    assert {row[0] for row in guard.metrics.rows} == {"other"}


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.1.2.3")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.")))
