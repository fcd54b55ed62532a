"""Which endpoint is asked, how fast, and that no key shows."""

import asyncio
import time
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm import endpoints as module
from critrm.endpoints import Access, Endpoint, Endpoints, Pace, delay_before_retry
from critrm.errors import ConfigError, CriticError

URLS = ("http://a.example/v1", "http://b.example/v1")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def access(base_url: str | tuple[str, ...] | None = URLS, api_key: str | None = None) -> Access:
    return Access.find(base_url, api_key=api_key, variable="OPENAI_API_KEY")


def test_urls_come_as_a_sequence_with_commas_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert access().urls == access(" , ".join(URLS) + ",").urls == access((*URLS, URLS[0])).urls == URLS
    monkeypatch.setenv("OPENAI_BASE_URL", ",".join(URLS))
    assert access(None).urls == access(()).urls == access("").urls == URLS
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert access(None, "key").names() == "OpenAI"
    with pytest.raises(CriticError, match="set OPENAI_API_KEY"):
        access(None)


@pytest.mark.parametrize("url", ["a.example/v1", "ftp://a.example", "http://", "http://[::1/v1", "http://a:port/v1"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="http://"):
        access((URLS[0], url))


PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40)


@given(PRINTABLE, st.text(max_size=150), st.sampled_from([str, quote, quote_plus, lambda t: quote(t, safe="")]))
def test_no_words_show_the_key(key: str, around: str, spell) -> None:
    found = Access.find(URLS[0], api_key=key, variable="V")
    words = found.words(f"{around}{spell(key)}{around}")
    assert key not in words and spell(key) not in words
    assert key not in repr(found)
    assert len(words) <= 120 and "\n" not in words


def test_names_and_words_hide_what_a_url_holds() -> None:
    found = access("https://me:hunter2@a.example:1/v1?key=topsecret")
    assert found.names() == "https://a.example:1/v1"
    assert found.words("GET https://me:hunter2@a.example/v1?key=topsecret") == "GET https://***@a.example/v1?key=***"
    assert access(URLS[0]).words("none of it") == "none of it"


# Which one is asked


def fail(endpoint: Endpoint, n: int) -> None:
    for _ in range(n):
        endpoint.failed()


def test_the_fewest_calls_under_way_win_and_a_pause_is_respected() -> None:
    both = Endpoints(access())
    first, second = both.up(set())
    first.under_way = 3
    assert both.choose(set()) is second
    second.pause(60)
    assert both.choose(set()) is first
    assert both.choose({first}) is second


def test_after_some_failures_in_a_row_an_endpoint_rests_then_one_call_probes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = Endpoints(access())
    first, second = both.up(set())
    second.under_way = 100
    fail(first, module.FAILURES_UNTIL_REST - 1)
    first.answered()
    fail(first, module.FAILURES_UNTIL_REST - 1)
    assert both.choose(set()) is first  # not so many in a row
    first.failed()
    assert both.choose(set()) is second
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + module.REST_SECONDS + 1)
    assert both.choose(set()) is first  # the probe
    assert both.choose(set()) is second  # nobody else until it is back
    first.answered()
    assert both.choose(set()) is first


def test_when_all_are_down_one_is_asked_all_the_same() -> None:
    both = Endpoints(access())
    for endpoint in both.up(set()):
        fail(endpoint, 9)
    assert both.up(set()) == []
    assert isinstance(both.choose(set()), Endpoint)


# How fast


def test_pace_spaces_calls_evenly_and_takes_corrections() -> None:
    async def timed(n: int, correction: float) -> float:
        pace = Pace(6000)  # one each 10 ms
        start = time.monotonic()
        for _ in range(n):
            await pace.take(1)
            pace.correct(correction)
        return time.monotonic() - start

    assert 0.19 <= asyncio.run(timed(20, 0)) < 2
    assert 0.38 <= asyncio.run(timed(20, 1)) < 3
    assert asyncio.run(timed(20, -1)) < 0.15


def test_no_limit_takes_no_time() -> None:
    async def take() -> None:
        pace = Pace(None)
        for _ in range(1000):
            await pace.take(10**6)

    start = time.monotonic()
    asyncio.run(take())
    assert time.monotonic() - start < 0.5


def test_delays_grow_to_a_bound() -> None:
    assert all(0.75 * 2**n * module.FIRST_DELAY <= delay_before_retry(n) <= module.MAX_DELAY for n in range(4))
    assert delay_before_retry(5000) <= module.MAX_DELAY
