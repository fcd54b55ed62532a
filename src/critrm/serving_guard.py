"""What stands between the network and the server: request ids, the token, limits, and an answer whatever happens.

An ASGI application around another one. A request's body is read here, up to the limit, before anything else sees it.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from critrm.serving_logs import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("critrm.serve")

OPEN_PATHS = ("/", "/health")
"""Need no token: the page holds no data and asks for the token, and load balancers ask after the server's health."""
BODY_SECONDS = 30.0
"""For a client to send its request."""
MAX_CLIENTS = 10_000
"""Whose rates are remembered."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may ask for."""

    token: str = field(default="", repr=False)
    """The bearer token; empty where none is needed."""
    max_body: int = 8 * 2**20
    """Bytes of a request."""
    max_in_flight: int = 1024
    """Requests that wait for an answer; further ones are told to come back."""
    requests_per_minute: float = 0.0
    """Of one client address; no limit when 0."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    status: int
    code: str
    message: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Guard:
    """The application as the network sees it."""

    def __init__(self, app: App, limits: Limits, *, metrics: Metrics, paths: frozenset[str]) -> None:
        """Args are what is guarded, what clients may ask, where requests are counted, and the paths that there are."""
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self._rates = _Rates(limits.requests_per_minute)
        self._n_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["critrm"] = {"request_id": request_id, "facts": {}}
        answer = _Answer(send, request_id)
        started = time.perf_counter()
        self._n_in_flight += 1
        self.metrics.in_flight.set(self._n_in_flight)
        try:
            await self._handle(scope, headers, receive, answer)
        # The last resort: the client gets no trace, the log does.
        except Exception:
            _log.exception("request failed", extra={"facts": {"request_id": request_id}})
            await answer.refuse(_Refusal(500, "internal", "something went wrong here; the log has this request's id"))
        finally:
            self._n_in_flight -= 1
            self._note(scope, answer, time.perf_counter() - started)

    async def _handle(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, answer: "_Answer") -> None:
        refusal = self._refusal(scope, headers)
        body: bytes | None = b""
        if refusal is None and scope["method"] not in ("GET", "HEAD"):
            body, refusal = await self._body(headers, receive)
        if body is None:
            return  # the client has gone away
        if refusal:
            await answer.refuse(refusal)
            return
        await self.app(scope, _replay(body, receive), answer.send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> _Refusal | None:
        """Why this request gets no further, judged by its head."""
        client = (scope.get("client") or ("",))[0]
        if not self.limits.token and not _is_local(headers.get(b"host", b"")):
            # A page of somebody else's that a browser here was made to take for this server (DNS rebinding).
            return _Refusal(403, "host", "this server answers to localhost only")
        if scope["path"] in OPEN_PATHS:
            return None
        # Before the token, so that nobody guesses it quickly.
        if wait := self._rates.wait(client):
            after = str(math.ceil(wait)).encode()
            return _Refusal(429, "rate", "too many requests from this address", ((b"retry-after", after),))
        if self.limits.token:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.limits.token.encode()):
                challenge = ((b"www-authenticate", b"Bearer"),)
                return _Refusal(401, "token", "send the server's token: Authorization: Bearer TOKEN", challenge)
        if self._n_in_flight > self.limits.max_in_flight:
            return _Refusal(503, "busy", "too many requests wait for an answer", ((b"retry-after", b"1"),))
        return None

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> tuple[bytes | None, _Refusal | None]:
        """The request's body, or None where the client has gone away."""
        limit = self.limits.max_body
        too_large = _Refusal(413, "size", f"a request may have {limit:,} bytes", ((b"connection", b"close"),))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            return b"", too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None, None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        return b"", too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            return b"", _Refusal(408, "slow", "the request did not arrive in time", ((b"connection", b"close"),))
        return b"".join(parts), None

    def _note(self, scope: Scope, answer: "_Answer", seconds: float) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.metrics.in_flight.set(self._n_in_flight)
        self.metrics.requests.labels(path, str(answer.status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        facts = {
            "request_id": answer.request_id,
            "method": scope["method"],
            "path": path,
            "status": answer.status,
            "seconds": round(seconds, 4),
            "client": (scope.get("client") or ("",))[0],
        }
        _log.info("request", extra={"facts": facts | scope["critrm"]["facts"]})


class _Answer:
    """What is sent to one client: every answer gets the request's id."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self.status = 0
        """0 until an answer has begun: for a client that has gone away."""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = ((b"x-request-id", self.request_id.encode()), *HEADERS)
            message["headers"] = [*message.get("headers", ()), *own]
        await self._send(message)

    async def refuse(self, refusal: _Refusal) -> None:
        """Answer with an error, unless an answer has begun."""
        if self.status:
            return
        error = {"code": refusal.code, "message": refusal.message, "request_id": self.request_id}
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *refusal.headers,
        ]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, for the application."""
    sent = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _is_local(host: bytes) -> bool:
    name = host.decode("latin-1").rsplit(":", 1)[0] if not host.endswith(b"]") else host.decode("latin-1")
    return is_loopback(name.strip("[]"))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Rates:
    """How often each client has asked lately: a bucket that fills evenly and holds ten seconds' worth."""

    def __init__(self, per_minute: float) -> None:
        self._per_second = per_minute / 60
        self._most = max(1.0, 10 * self._per_second)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """0 when the client may ask now; else the seconds until it may."""
        if not self._per_second:
            return 0.0
        now = time.monotonic()
        left, then = self._left.pop(client, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_second)
        allowed = left >= 1
        self._left[client] = (left - allowed, now)
        if len(self._left) > MAX_CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._per_second
