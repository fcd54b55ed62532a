"""Where served models are: base URLs and the key, endpoints that are down or ask for a pause, calls per minute.

The openai client could retry by itself, but then a call would go on knocking at a dead endpoint while another is free,
and each call would meet a rate limit alone. So retries are decided here and in `llm.py`, and the client makes one try.
"""

import asyncio
import base64
import contextlib
import functools
import html
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, quote, quote_plus, unquote, urlsplit

from critrm.errors import ConfigError, CriticError

if TYPE_CHECKING:
    import openai

URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"
CALLS_PER_CLIENT = 8
"""A client looks through all its connections at every call, so a few clients are quicker than a large one."""
FAILURES_UNTIL_REST = 5
"""So many calls in a row that an endpoint failed, and it is left alone while others are up."""
REST_SECONDS = 15.0
FIRST_DELAY, MAX_DELAY = 0.5, 8.0
"""Seconds before the first retry, doubled for each further one."""
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Access:
    """How to get at an API: its base URLs and the key, which appears in no text made here."""

    urls: tuple[str, ...]
    variable: str
    """The environment variable that holds the key, for messages."""
    key: str = field(repr=False)

    @classmethod
    def find(cls, base_url: str | Sequence[str] | None, *, api_key: str | None, variable: str) -> "Access":
        """Complete what was given from the environment.

        Args:
            base_url: one URL, several with commas between, or a sequence; by default OPENAI_BASE_URL, else OpenAI.
            api_key: by default the environment's.
            variable: the environment variable that holds the key.

        Raises:
            ConfigError: a URL or the key cannot be used.
            CriticError: there is no key, and no base URL that might do without one.
        """
        given = base_url if isinstance(base_url, str) else ",".join(base_url or ())
        parts = (given or os.environ.get(URL_VARIABLE) or "").split(",")
        urls = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
        for url in urls:
            if not _is_http(url):
                raise ConfigError("a base URL must start with http:// or https:// and name a host")
        # A key pasted into a file often ends in a newline, which no HTTP header may hold.
        key = (api_key or (os.environ.get(variable) if variable else "") or "").strip()
        if not key and not urls:
            raise CriticError(f"no API key: set {variable}, or name an endpoint that needs none (--base-url)")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the API key ({variable}) holds a character that cannot be sent: copy it again")
        return cls(urls=urls or (OPENAI_URL,), variable=variable, key=key)

    def client(self, url: str, *, max_retries: int = 0, timeout: float | None = None) -> "openai.AsyncOpenAI":
        """A client of one of the URLs; `timeout` is the most seconds without a byte."""
        import openai

        parts = urlsplit(url)
        timeouts = openai.Timeout(timeout, connect=CONNECT_SECONDS)
        # Taken out of the URL, which the HTTP library writes into its log.
        basic = base64.b64encode(_credentials(parts).encode()).decode()
        return openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=_plain(url),
            default_headers={"Authorization": f"Basic {basic}"} if basic else None,
            default_query=dict(parse_qsl(parts.query)) or None,
            max_retries=max_retries,
            http_client=openai.DefaultAsyncHttpxClient(verify=_tls(), timeout=timeouts),
        )

    def names(self) -> str:
        """The endpoints for messages: without user names, passwords and queries, which may hold keys."""
        return "OpenAI" if self.urls == (OPENAI_URL,) else ", ".join(map(_plain, self.urls))

    def words(self, text: str) -> str:
        """A server's words, fit for a message: no key in any spelling, one line, short."""
        secrets = _secrets(self)
        text = secrets.sub("***", text) if secrets else text
        text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
        return text if len(text) <= 120 else text[:119] + "…"


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all clients: reading the certificates takes longer than a hundred calls."""
    import httpx2  # openai's own HTTP library

    return httpx2.create_ssl_context()


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address
        return False


def _plain(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _credentials(parts: SplitResult) -> str:
    return unquote(parts.netloc.rpartition("@")[0])


@functools.lru_cache(maxsize=64)
def _secrets(access: Access) -> re.Pattern[str] | None:
    """Whatever may not be shown, in the spellings in which servers echo it."""
    found = {access.key}
    for parts in map(urlsplit, access.urls):
        credentials = _credentials(parts)
        found |= {credentials, credentials.partition(":")[2], base64.b64encode(credentials.encode()).decode()}
        found |= {value for _, value in parse_qsl(parts.query)}
    # Shorter ones are not secret, and their letters are all over any message.
    found = {text for text in found if len(text) >= 4 or text == access.key != ""}
    spellings: tuple[Callable[[str], str], ...] = (
        str,
        quote,
        quote_plus,
        html.escape,
        lambda text: quote(text, safe=""),
        lambda text: text.replace("/", "\\/"),
    )
    texts = {spell(text) for text in found for spell in spellings}
    longest_first = sorted(map(re.escape, texts), key=len, reverse=True)
    return re.compile("|".join(longest_first), re.IGNORECASE) if texts else None


class Endpoint:
    """One base URL during one run: its clients, its calls under way and how it has been doing."""

    def __init__(self, access: Access, url: str) -> None:
        """Nothing is opened before the first call."""
        self.access, self.url = access, url
        self.is_openai = (urlsplit(url).hostname or "").endswith("api.openai.com")
        self.under_way = 0
        self.n_answered = 0
        self.paused_until = 0.0
        self._failures = 0
        self._down_until = 0.0
        self._clients: list[openai.AsyncOpenAI] = []
        self._free: list[openai.AsyncOpenAI] = []

    @contextlib.contextmanager
    def client(self) -> Iterator["openai.AsyncOpenAI"]:
        """Take a place in one of the clients."""
        if not self._free:
            self._clients.append(self.access.client(self.url))
            self._free = self._clients[-1:] * CALLS_PER_CLIENT
        client = self._free.pop()
        self.under_way += 1
        try:
            yield client
        finally:
            self.under_way -= 1
            self._free.append(client)

    def answered(self) -> None:
        """It works: whatever went wrong before is over."""
        self._failures = 0
        self.n_answered += 1

    def failed(self) -> None:
        """A call got no answer; after a few in a row the endpoint is left alone for a while."""
        self._failures += 1
        self._down_until = time.monotonic() + REST_SECONDS

    def probe(self) -> None:
        """A call is about to find out whether it is up again; no other call tries until then."""
        if self._failures >= FAILURES_UNTIL_REST:
            self._down_until = time.monotonic() + REST_SECONDS

    def is_down(self) -> bool:
        """Whether it failed a few calls in a row, not long ago."""
        return self._failures >= FAILURES_UNTIL_REST and time.monotonic() < self._down_until

    def pause(self, seconds: float) -> None:
        """It asked for a pause; all calls keep it, and then come back one after the other."""
        self.paused_until = max(self.paused_until, time.monotonic() + seconds)

    async def wait_out_pause(self) -> None:
        """Return when no pause is asked for any more."""
        while (left := self.paused_until - time.monotonic()) > 0:
            await asyncio.sleep(left * random.uniform(1.0, 1.1))


class Endpoints:
    """All base URLs during one run."""

    def __init__(self, access: Access) -> None:
        """Nothing is opened before the first call."""
        self._all = [Endpoint(access, url) for url in access.urls]

    def choose(self, avoid: set[Endpoint]) -> Endpoint:
        """The endpoint with the fewest calls under way, of those that are up; of all when none is."""
        now = time.monotonic()
        candidates = self.up(avoid) or self._all
        chosen = min(candidates, key=lambda endpoint: (endpoint.paused_until > now, endpoint.under_way))
        chosen.probe()
        return chosen

    def up(self, avoid: set[Endpoint]) -> list[Endpoint]:
        """The endpoints that are up, without some."""
        return [endpoint for endpoint in self._all if endpoint not in avoid and not endpoint.is_down()]

    def n_answered(self) -> int:
        """How many calls have been answered so far."""
        return sum(endpoint.n_answered for endpoint in self._all)

    async def close(self) -> None:
        """Close all connections."""
        for endpoint in self._all:
            for client in endpoint._clients:
                await client.close()


class Pace:
    """At most so much per minute, evenly spaced; whoever comes first goes first."""

    def __init__(self, per_minute: float | None) -> None:
        """No limit when None."""
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    async def take(self, amount: float) -> None:
        """Wait until this much may be spent."""
        if not self._seconds_each:
            return
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + amount * self._seconds_each
        if start > now:
            await asyncio.sleep(start - now)

    def correct(self, amount: float) -> None:
        """Spend this much more than was taken (less, when negative)."""
        self._free_at += amount * self._seconds_each


def delay_before_retry(n_retries: int) -> float:
    """Seconds to wait before retry number `n_retries` (from 0), where the server names none."""
    return min(FIRST_DELAY * 2.0 ** min(n_retries, 10), MAX_DELAY) * random.uniform(0.75, 1.0)
