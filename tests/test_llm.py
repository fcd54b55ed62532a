"""The seam to a model: every fault of an endpoint is a reply with its reason, or an error that says what to do."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from critrm.errors import ConfigError, CriticError
from critrm.llm import ChatRequest, OpenAIChat, Reply, Sampling, ScriptedChat, _Answer
from critrm.types import Message
from scripted_server import Answer, completion, serving

KEY = "sk-very-secret"
SOURCE = Path(__file__).parents[1] / "src"


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("critrm.endpoints.FIRST_DELAY", 0.01)
    monkeypatch.setattr("critrm.endpoints.MAX_DELAY", 0.02)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def requests(n: int) -> Iterator[ChatRequest]:
    return (ChatRequest(id=str(i), messages=(Message("user", f"question {i}"),)) for i in range(n))


def ask(chat: Any, n: int = 1, sampling: Sampling | None = None) -> list[Reply]:
    async def collect() -> list[Reply]:
        return [reply async for reply in chat.stream(requests(n), sampling or Sampling())]

    return asyncio.run(collect())


def chat_at(url: str | tuple[str, ...], **settings: Any) -> OpenAIChat:
    return OpenAIChat("some-model", base_url=url, **{"max_retries": 0, "timeout": 5.0, **settings})


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_answers_with_tokens_and_sends_the_sampling() -> None:
    with serving(lambda body: completion("Good: " + body["messages"][0]["content"])) as server:
        replies = ask(chat_at(server.url), 3, Sampling(temperature=0.5, top_p=0.9, max_tokens=5, seed=3))
    assert {reply.id: reply.text for reply in replies} == {str(i): f"Good: question {i}" for i in range(3)}
    assert all((r.n_prompt_tokens, r.n_completion_tokens, r.finish_reason) == (11, 7, "stop") for r in replies)
    assert all(reply.seconds > 0 and not reply.failure for reply in replies)
    sent = server.bodies[0]
    assert (sent["model"], sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (
        "some-model",
        0.5,
        0.9,
        5,
        3,
    )


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (Answer(status=500, body='{"error": {"message": "boom"}}'), "http 500: boom"),
        (Answer(status=500, body="<html>oops</html>", content_type="text/html"), "http 500"),
        (Answer(status=400, body='{"error": {"message": "context too long"}}'), "http 400: context too long"),
        (Answer(status=400, body=json.dumps({"error": {"message": "you sent " + KEY}})), "http 400: you sent ***"),
        (Answer(status=403, body='{"error": {"message": "flagged by moderation"}}'), "http 403: flagged by moderation"),
        (Answer(status=429, body='{"error": {"message": "slow down"}}'), "http 429: slow down"),
        (Answer(body="<html>Sign in</html>", content_type="text/html"), "HTML instead of JSON"),
        (Answer(body="<!doctype html>"), "HTML instead of JSON"),
        (Answer(body='{"choices": [{"mess'), "invalid JSON"),
        (Answer(body="[" * 100_000), "invalid JSON"),
        (Answer(body='{"error": {"message": "no capacity"}}'), "no choices: no capacity"),
        (Answer(body='{"choices": []}'), "no choices"),
        (Answer(body='{"choices": null}'), "no choices"),
        (Answer(body='{"choices": [{"message": null}]}'), "no choices"),
        (Answer(body="[]"), "no choices"),
        (completion(""), "empty reply"),
        (completion(" \n"), "empty reply"),
        (completion(None), "empty reply"),
        (completion("", finish_reason="length"), "empty reply: max_tokens ran out before any text"),
        (completion("half a", finish_reason="content_filter"), "content_filter"),
        (completion(None, refusal="I can't help with that."), "refusal: I can't help with that."),
        (Answer(status=429, headers={"retry-after": "9999"}), "http 429 (come back in 9999 seconds)"),
        (Answer(delay=5), "timeout"),
        (Answer(body=completion("slow").body, drip=0.05), "timeout"),
    ],
)
def test_a_fault_is_a_failure_with_its_reason(answer: Answer, failure: str) -> None:
    with serving(lambda _: answer) as server:
        (reply,) = ask(chat_at(server.url, timeout=0.3 if answer.delay or answer.drip else 5.0))
    assert (reply.failure, reply.text, reply.id) == (failure, "", "0")


@pytest.mark.parametrize("fault", [Answer(body='{"choices"', declared_length=500), Answer(reset=True), Answer(delay=9)])
def test_broken_off_and_hanging_calls_are_rows_and_never_end_the_run(fault: Answer) -> None:
    with serving(lambda _: fault) as server:
        replies = ask(chat_at(server.url, timeout=0.5 if fault.delay else 30), 40)
    assert len(replies) == 40
    assert {reply.failure.partition(":")[0] for reply in replies} == {"timeout" if fault.delay else "connection failed"}


@pytest.mark.parametrize("fault", [Answer(body='{"choices"', declared_length=500), Answer(reset=True)])
def test_broken_off_calls_are_made_again(fault: Answer) -> None:
    answers = iter([fault, fault, completion("third time")])
    with serving(lambda _: next(answers)) as server:
        assert ask(chat_at(server.url, max_retries=2))[0].text == "third time"


def test_refused_connection_and_unknown_host() -> None:
    assert ask(chat_at(closed_port()))[0].failure == "connection refused"
    assert ask(chat_at("http://no-such-host.invalid/v1"))[0].failure.startswith("connection failed: ")


def test_length_keeps_the_text() -> None:
    with serving(lambda _: completion("cut sho", finish_reason="length")) as server:
        (reply,) = ask(chat_at(server.url))
    assert (reply.text, reply.finish_reason, reply.failure) == ("cut sho", "length", "")


def test_retry_after_is_honoured_then_the_answer_counts() -> None:
    arrivals: list[float] = []

    def answer(_: dict[str, Any]) -> Answer:
        arrivals.append(time.monotonic())
        busy = Answer(status=429, body="{}", headers={"retry-after": "0.4"})
        return busy if len(arrivals) == 1 else completion("fine")

    with serving(answer) as server:
        (reply,) = ask(chat_at(server.url, max_retries=2))
    assert reply.text == "fine" and len(arrivals) == 2
    assert arrivals[1] - arrivals[0] >= 0.4


def test_server_errors_are_retried() -> None:
    answers = iter([Answer(status=500), Answer(status=503), completion("third time")])
    with serving(lambda _: next(answers)) as server:
        assert ask(chat_at(server.url, max_retries=4))[0].text == "third time"


def test_a_storm_of_429_ends_with_every_call_answered() -> None:
    windows: dict[int, int] = {}
    lock = threading.Lock()

    def answer(_: dict[str, Any]) -> Answer:
        window = int(time.monotonic() / 0.1)
        with lock:
            windows[window] = windows.get(window, 0) + 1
            busy = windows[window] > 4
        return Answer(status=429, body="{}", headers={"retry-after": "0.1"}) if busy else completion("ok")

    with serving(answer) as server:
        replies = ask(chat_at(server.url, concurrency=16, max_retries=2), 40)
        assert len(server.bodies) > 40
    assert [reply.failure for reply in replies] == [""] * 40


def test_a_storm_of_429_that_never_ends_becomes_rows() -> None:
    with serving(lambda _: Answer(status=429, body="{}")) as server:
        replies = ask(chat_at(server.url, max_retries=2), 40)
    assert [reply.failure for reply in replies] == ["http 429"] * 40


def test_requests_and_tokens_per_minute_are_kept() -> None:
    with serving(lambda _: completion("ok")) as server:
        start = time.monotonic()
        ask(chat_at(server.url, requests_per_minute=1200), 11)
        assert 0.5 <= time.monotonic() - start < 3
        start = time.monotonic()
        # 2 for the text, 256 for the answer, corrected to 18 by the usage: 18 calls of 18 are 0.5 s at 36,000 a minute
        ask(chat_at(server.url, tokens_per_minute=36_000, concurrency=1), 18)
        assert 0.3 <= time.monotonic() - start < 3


# Several endpoints


def test_calls_are_shared_by_all_base_urls() -> None:
    def slow(text: str) -> Answer:
        return Answer(body=completion(text).body, delay=0.02)

    with serving(lambda _: slow("a")) as first, serving(lambda _: slow("b")) as second:
        for base_url in ((first.url, second.url), f"{first.url}, {second.url}"):
            texts = sorted(reply.text for reply in ask(chat_at(base_url, concurrency=8), 40))
            assert 12 <= texts.count("a") <= 28 and texts.count("a") + texts.count("b") == 40


@pytest.mark.parametrize("fault", [Answer(status=503), Answer(reset=True), Answer(delay=2), None])
def test_the_run_goes_on_over_the_endpoints_that_are_up(fault: Answer | None) -> None:
    n_asked = 0
    with serving(lambda _: completion("ok")) as good, serving(lambda _: fault or completion("")) as bad:
        urls = (bad.url if fault else closed_port(), good.url)
        # Short only where it is what ends the call: on a busy machine the good endpoint may take a second as well.
        replies = ask(chat_at(urls, concurrency=4, timeout=1 if fault and fault.delay else 20), 60)
        n_asked = len(bad.bodies)
    assert [reply.text for reply in replies] == ["ok"] * 60
    assert n_asked <= 5 + 4  # then it was left alone


def test_an_endpoint_that_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("critrm.endpoints.REST_SECONDS", 0.1)
    ill = True

    def answer(_: dict[str, Any]) -> Answer:
        return Answer(status=503) if ill else Answer(body=completion("back").body, delay=0.01)

    async def talk(chat: OpenAIChat) -> list[str]:
        nonlocal ill
        texts: list[str] = []
        async for reply in chat.stream(requests(80), Sampling()):
            texts.append(reply.text)
            ill = len(texts) < 20
        return texts

    with serving(lambda _: Answer(body=completion("ok").body, delay=0.02)) as good, serving(answer) as other:
        texts = asyncio.run(talk(chat_at((other.url, good.url), concurrency=4)))
    assert set(texts[:20]) == {"ok"} and texts.count("back") > 5 and len(texts) == 80


def test_only_when_all_endpoints_are_down_does_the_run_end() -> None:
    received: list[Reply] = []

    async def collect(chat: OpenAIChat) -> None:
        async for reply in chat.stream(requests(1000), Sampling()):
            received.append(reply)

    with pytest.raises(CriticError, match=r"endpoint down.*connection refused.*run the same command again"):
        asyncio.run(collect(chat_at((closed_port(), closed_port()), max_retries=1)))
    assert received == []


def test_one_failure_does_not_stop_the_others() -> None:
    def answer(body: dict[str, Any]) -> Answer:
        return Answer(status=500) if body["messages"][0]["content"] == "question 3" else completion("ok")

    with serving(answer) as server:
        replies = ask(chat_at(server.url), 10)
    assert [reply.id for reply in replies if reply.failure] == ["3"] and len(replies) == 10


def test_concurrency_is_bounded_and_requests_are_drawn_lazily() -> None:
    drawn = 0

    def counted() -> Iterator[ChatRequest]:
        nonlocal drawn
        for request in requests(40):
            drawn += 1
            yield request

    async def most_ahead(chat: OpenAIChat) -> int:
        n_replies, ahead = 0, 0
        async for _ in chat.stream(counted(), Sampling()):
            ahead = max(ahead, drawn - n_replies)
            n_replies += 1
        return ahead

    with serving(lambda _: Answer(body=completion("ok").body, delay=0.01)) as server:
        assert asyncio.run(most_ahead(chat_at(server.url, concurrency=4))) <= 8
        assert server.peak <= 4 and drawn == 40


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_key_names_the_variable_and_never_the_key(status: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    refusal = Answer(status=status, body=json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}))
    with serving(lambda _: refusal) as server:
        chat = chat_at(server.url)
        with pytest.raises(CriticError, match="OPENAI_API_KEY") as caught:
            ask(chat)
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) + repr(caught.value) + repr(chat)
    assert KEY not in caplog.text


@pytest.mark.parametrize("spell", ["{}", "%{}", "https://x.example/v1?key={}"])
def test_a_key_echoed_in_any_spelling_is_blotted_out(spell: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key, url_key = "sk/a+b=c d&e", "hunter2hunter2"
    spellings = (key, quote(key), quote(key, safe=""), quote_plus(key), quote(key, safe="").lower(), url_key)
    for shown in spellings:
        for padding in ("", "x" * 103):  # also where the message is cut off in its midst
            error = Answer(status=400, body=json.dumps({"error": {"message": padding + spell.format(shown)}}))
            with serving(lambda _, error=error: error) as server:
                url = server.url.replace("//", f"//me:{url_key}@")
                (reply,) = ask(chat_at(url, api_key=key))
            assert ("***" in reply.failure or padding) and shown[:4].lower() not in reply.failure.lower()
    assert url_key not in caplog.text and key not in caplog.text


def test_the_key_is_read_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHERE_API_KEY", "co-secret-key")
    refusal = Answer(status=401, body="{}")
    with serving(lambda _: refusal) as server:
        with pytest.raises(CriticError, match="COHERE_API_KEY"):
            ask(chat_at(server.url, key_variable="COHERE_API_KEY"))
        assert server.headers[0]["authorization"] == "Bearer co-secret-key"
    monkeypatch.delenv("COHERE_API_KEY")
    with pytest.raises(CriticError, match="COHERE_API_KEY"):
        OpenAIChat("m", key_variable="COHERE_API_KEY")


def test_memory_does_not_grow_with_the_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(self: OpenAIChat, endpoint: object, request: ChatRequest, sampling: Sampling) -> _Answer:
        await asyncio.sleep(0)
        return _Answer(Reply(id=request.id, text="fine " * 50))

    async def count(n: int) -> int:
        chat = OpenAIChat("m", base_url="http://127.0.0.1:1/v1", concurrency=64)
        tracemalloc.reset_peak()
        async for _ in chat.stream(requests(n), Sampling()):
            pass
        return tracemalloc.get_traced_memory()[1]

    monkeypatch.setattr(OpenAIChat, "_call", call)
    tracemalloc.start()
    try:
        asyncio.run(count(300))
        few, many = asyncio.run(count(500)), asyncio.run(count(5000))
    finally:
        tracemalloc.stop()
    assert many < few + 100_000  # bytes; 4,500 replies are over a million


def test_unknown_model_and_empty_account_end_the_run() -> None:
    with serving(lambda _: Answer(status=404, body="{}")) as server, pytest.raises(CriticError, match="'some-model'"):
        ask(chat_at(server.url))
    poor = Answer(status=429, body='{"error": {"code": "insufficient_quota", "message": "pay"}}')
    with serving(lambda _: poor) as server, pytest.raises(CriticError, match="no credit"):
        ask(chat_at(server.url))


def test_answers_that_came_with_a_fatal_one_are_handed_over() -> None:
    received: list[str] = []

    async def collect(chat: OpenAIChat) -> None:
        async for reply in chat.stream(requests(50), Sampling()):
            received.append(reply.text)

    n = 0

    def answer(_: dict[str, Any]) -> Answer:
        nonlocal n
        n += 1
        return completion("ok") if n <= 10 else Answer(status=401, body="{}")

    with serving(answer) as server, pytest.raises(CriticError):
        asyncio.run(collect(chat_at(server.url, concurrency=1)))
    assert received == ["ok"] * 10


def test_a_dead_endpoint_ends_the_run() -> None:
    received: list[Reply] = []

    async def collect(chat: OpenAIChat) -> None:
        async for reply in chat.stream(requests(100_000), Sampling()):
            received.append(reply)

    with pytest.raises(CriticError, match=r"endpoint down.*connection refused.*run the same command again"):
        asyncio.run(collect(chat_at(closed_port())))
    assert received == []


def test_connection_failures_between_answers_do_not_end_the_run() -> None:
    def answer(body: dict[str, Any]) -> Answer:
        index = int(body["messages"][0]["content"].split()[1])
        return completion("ok") if index % 10 == 9 else Answer(status=503)

    with serving(answer) as server:
        replies = ask(chat_at(server.url, concurrency=1), 60)
    assert len(replies) == 60 and sum(not reply.failure for reply in replies) == 6


def test_half_a_character_is_replaced_or_refused() -> None:
    with serving(lambda _: Answer(body=completion("a\ud800b").body)) as server:
        assert ask(chat_at(server.url))[0].text == "a?b"

        async def send() -> list[Reply]:
            request = ChatRequest(id="x", messages=(Message("user", "\ud800"),))
            return [reply async for reply in chat_at(server.url).stream([request], Sampling())]

        assert "surrogate" in asyncio.run(send())[0].failure


def test_hostile_text_arrives_unharmed() -> None:
    text = "{{ x }} <|im_end|> \x00 \u202eabc \u2028 \U0001f9d1\u200d\U0001f680 </s>"

    async def send(chat: OpenAIChat) -> list[Reply]:
        return [r async for r in chat.stream([ChatRequest(id="x", messages=(Message("user", text),))], Sampling())]

    with serving(lambda body: completion(body["messages"][0]["content"])) as server:
        assert asyncio.run(send(chat_at(server.url)))[0].text == text
        assert server.bodies[0]["messages"] == [{"role": "user", "content": text}]


def test_leaving_the_stream_early_cancels_what_is_under_way() -> None:
    async def first_only(chat: OpenAIChat) -> float:
        stream = chat.stream(requests(20), Sampling())
        async for _ in stream:
            break
        start = time.monotonic()
        await stream.aclose()  # type: ignore[attr-defined]
        assert len(asyncio.all_tasks()) == 1
        return time.monotonic() - start

    def answer(body: dict[str, Any]) -> Answer:
        slow = body["messages"][0]["content"] != "question 0"
        return Answer(body=completion("ok").body, delay=3 if slow else 0)

    with serving(answer) as server:
        assert asyncio.run(first_only(chat_at(server.url, concurrency=4))) < 2
    gc.collect()


def test_ctrl_c_leaves_no_warnings() -> None:
    started = threading.Event()

    def answer(_: dict[str, Any]) -> Answer:
        started.set()
        return Answer(body=completion("late").body, delay=3)

    script = (
        "import asyncio, signal, sys\nfrom critrm.llm import *\nfrom critrm.types import Message\n"
        # A shell starts background jobs with the signal ignored, and whoever runs the tests may be one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "asked = (ChatRequest(id=str(i), messages=(Message('user', 'q'),)) for i in range(99))\n"
        "async def main():\n"
        "    async for _ in OpenAIChat('m', base_url=sys.argv[1], concurrency=4).stream(asked, Sampling()): pass\n"
        "try: asyncio.run(main())\nexcept KeyboardInterrupt: print('stopped')\n"
    )
    with serving(answer) as server:
        process = subprocess.Popen(
            [sys.executable, "-W", "default", "-c", script, server.url],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert started.wait(30)
        time.sleep(0.5)  # until all four calls are under way
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("stopped\n", "", 0)


def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="concurrency"):
        OpenAIChat("m", concurrency=0)
    with pytest.raises(ConfigError, match="http://"):
        OpenAIChat("m", base_url="localhost:8000/v1")
    with pytest.raises(ConfigError, match="http://"):
        OpenAIChat("m", base_url=["http://a.example/v1", "http://[::1/v1"])
    with pytest.raises(ConfigError, match="per minute"):
        OpenAIChat("m", requests_per_minute=0)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        OpenAIChat("m", api_key="sk-“quoted”")
    assert "quoted" not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(CriticError, match="OPENAI_API_KEY"):
        OpenAIChat("m")
    with serving(lambda _: completion("ok")) as server:
        assert ask(chat_at(server.url))[0].text == "ok"
        assert server.headers[0]["authorization"] == "Bearer none"


def test_endpoint_shows_no_credentials() -> None:
    chat = OpenAIChat("m", base_url="https://me:hunter2@host.example:1/v1?key=hunter2", api_key=" " + KEY + "\n")
    assert chat.endpoint == "https://host.example:1/v1"
    assert "hunter2" not in repr(chat) and KEY not in repr(chat)


def test_scripted_chat_keeps_its_calls() -> None:
    chat = ScriptedChat(lambda request: "even" if int(request.id) % 2 == 0 else Reply(id=request.id, failure="odd"))
    replies = ask(chat, 2)
    assert [reply.text for reply in replies] == ["even", ""] and replies[1].failure == "odd"
    assert [call.id for call in chat.calls] == ["0", "1"]
