"""The one seam to any LLM.

A `Chat` takes a stream of requests and yields a reply to each, in whatever order they finish. Hosted and served
models answer through `OpenAIChat`, a model in this process through `local_llm.LocalChat`, tests through `ScriptedChat`.
A call that fails is a `Reply` with its `failure` set: it never ends the run.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from critrm.errors import ConfigError, CriticError
from critrm.types import Message

if TYPE_CHECKING:
    import openai

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
MAX_CONNECTION_FAILURES = 20
"""So many calls in a row without reaching the model mean that the endpoint is down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a reply is drawn; part of a critique's key."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One call: an id of the caller's choosing, and the messages."""

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back, or why nothing did."""

    id: str
    text: str = ""
    n_prompt_tokens: int = 0
    n_completion_tokens: int = 0
    finish_reason: str = ""
    seconds: float = 0.0
    failure: str = ""


class Chat(Protocol):
    """Anything that answers chat requests."""

    model: str
    """The model's name as its provider knows it; part of a critique's key."""

    def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
        """Yield one reply per request, as they finish; requests are drawn as capacity frees up."""
        ...


class ScriptedChat:
    """The public fake: answers by a function of the request, and keeps the requests in `calls`."""

    def __init__(self, answer: Callable[[ChatRequest], Reply | str], *, model: str = "scripted") -> None:
        """Answer every request by `answer(request)`; a plain string is a reply's text."""
        self.model = model
        self.calls: list[ChatRequest] = []
        self._answer = answer

    async def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
        """Yield the scripted replies in the order of the requests."""
        for request in requests:
            self.calls.append(request)
            answer = self._answer(request)
            yield Reply(id=request.id, text=answer, finish_reason="stop") if isinstance(answer, str) else answer


class OpenAIChat:
    """Any OpenAI-compatible endpoint: hosted, or served by vLLM, SGLang, TGI, llama.cpp, Ollama."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 4,
    ) -> None:
        """Say where the model is; nothing is sent before `stream`.

        Args:
            model: the model's name at the endpoint.
            base_url: the endpoint, usually ending in `/v1`; by default OPENAI_BASE_URL, else OpenAI.
            api_key: by default OPENAI_API_KEY; a base URL needs none.
            concurrency: how many calls may be under way at once.
            timeout: seconds to wait for an answer.
            max_retries: how often a call is sent again after 408, 409, 429, 5xx or no connection, minding Retry-After.

        Raises:
            ConfigError: a setting cannot be used.
            CriticError: there is no key, and no base URL that might do without one.
        """
        if concurrency < 1 or timeout <= 0 or max_retries < 0:
            raise ConfigError("concurrency must be at least 1, timeout above 0 and max_retries at least 0")
        self.model = model
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.base_url = base_url or os.environ.get(URL_VARIABLE) or None
        if self.base_url and urlsplit(self.base_url).scheme not in ("http", "https"):
            raise ConfigError("the base URL must start with http:// or https://")
        # A key pasted into a file often ends in a newline, which no HTTP header may hold.
        key = (api_key or os.environ.get(KEY_VARIABLE) or "").strip()
        if not key and not self.base_url:
            raise CriticError(f"no API key: set {KEY_VARIABLE}, or name an endpoint that needs none (--base-url)")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the API key ({KEY_VARIABLE}) holds a character that cannot be sent: copy it again")
        self._key = key or "none"

    def __repr__(self) -> str:
        """The model and where it is; never the key."""
        return f"OpenAIChat({self.model!r}, endpoint={self.endpoint!r})"

    @property
    def endpoint(self) -> str:
        """The endpoint for messages: without user names, passwords and queries, which may hold keys."""
        if not self.base_url:
            return "OpenAI"
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    async def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
        """Yield a reply to each request as they finish; requests are drawn one by one as calls end.

        Raises:
            CriticError: the endpoint rejects the key or does not know the model, or it is down. Replies to calls that
                could not reach it are then not yielded, so that the caller asks them again next time.
        """
        import openai

        waiting: set[asyncio.Task[_Answer]] = set()
        unreachable: list[Reply] = []
        source = iter(requests)
        async with openai.AsyncOpenAI(
            api_key=self._key, base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries
        ) as client:
            try:
                while True:
                    while len(waiting) < self.concurrency and (request := next(source, None)):
                        waiting.add(asyncio.create_task(self._ask(client, request, sampling)))
                    if not waiting:
                        break
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    # What is answered is handed over before anything is raised: it has been paid for.
                    for answer in sorted((task.result() for task in done), key=lambda answer: bool(answer.fatal)):
                        if answer.fatal:
                            raise CriticError(answer.fatal)
                        if answer.reached:
                            for reply in unreachable:
                                yield reply
                            unreachable.clear()
                            yield answer.reply
                            continue
                        unreachable.append(answer.reply)
                        if len(unreachable) >= MAX_CONNECTION_FAILURES:
                            raise CriticError(self._down(answer.reply.failure))
                for reply in unreachable:
                    yield reply
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    def _down(self, reason: str) -> str:
        return (
            f"endpoint down: {MAX_CONNECTION_FAILURES} calls in a row did not reach {self.endpoint} ({reason}). "
            "Every answer so far is stored: check the endpoint and run the same command again."
        )

    async def _ask(self, client: "openai.AsyncOpenAI", request: ChatRequest, sampling: Sampling) -> "_Answer":
        import openai

        start = time.perf_counter()
        # OpenAI's newer models know only the new name, most servers only the old one.
        hosted = not self.base_url or urlsplit(self.base_url).hostname == "api.openai.com"
        limit = "max_completion_tokens" if hosted else "max_tokens"
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            limit: sampling.max_tokens,
        }
        try:
            # The raw response, since the client's own parsing lets HTML and missing fields through.
            response = await client.chat.completions.with_raw_response.create(**body)
            facts = _read_body(response.text)
            return _Answer(Reply(id=request.id, seconds=time.perf_counter() - start, **facts))
        except openai.APIStatusError as error:
            return self._refused(request, error)
        except openai.APIConnectionError as error:
            return _Answer(Reply(id=request.id, failure=_connection_reason(error)), reached=False)
        except UnicodeEncodeError:
            return _Answer(Reply(id=request.id, failure="the text holds a lone surrogate and cannot be sent"))

    def _refused(self, request: ChatRequest, error: "openai.APIStatusError") -> "_Answer":
        status = error.status_code
        detail = _short(_error_message(error.body)).replace(self._key, "***")
        reply = Reply(id=request.id, failure=f"http {status}" + (f": {detail}" if detail else ""))
        # A router answers 403 for one text that its moderation flagged; that says nothing about the key.
        if status in (401, 403) and "flagged" not in str(error.body):
            return _Answer(
                reply, fatal=f"{self.endpoint} rejects the API key (http {status}): set {KEY_VARIABLE} to a valid one"
            )
        if status == 404:
            return _Answer(
                reply,
                fatal=f"{self.endpoint} does not know the model {self.model!r} (http 404): "
                "check --model, and --base-url, which usually ends in /v1",
            )
        if status == 402 or error.code == "insufficient_quota":
            return _Answer(reply, fatal=f"{self.endpoint} says that the account has no credit left (http {status})")
        # A gateway whose model server is gone.
        return _Answer(reply, reached=status not in (502, 503, 504))


@dataclass(frozen=True, slots=True)
class _Answer:
    """A reply with what it says about the endpoint."""

    reply: Reply
    reached: bool = True
    """Whether the model was reached at all."""
    fatal: str = ""
    """Why no other call can succeed either."""


def _read_body(text: str) -> dict[str, Any]:
    """The facts of a Reply in the body of an HTTP 200."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return {"failure": "HTML instead of JSON" if text.lstrip().startswith("<") else "invalid JSON"}
    try:
        choice = body["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        detail = _short(_error_message(body))
        return {"failure": "no choices" + (f": {detail}" if detail else "")}
    finish_reason = str(choice.get("finish_reason") or "")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    facts: dict[str, Any] = {
        "finish_reason": finish_reason,
        "n_prompt_tokens": _count(usage.get("prompt_tokens")),
        "n_completion_tokens": _count(usage.get("completion_tokens")),
    }
    if finish_reason == "content_filter":
        return facts | {"failure": "content_filter"}
    if not isinstance(content, str) or not content.strip():
        used_up = finish_reason == "length"
        return facts | {"failure": "empty reply" + (": max_tokens ran out before any text" if used_up else "")}
    # JSON can spell half a character (a lone surrogate), which no file can hold.
    return facts | {"text": content.encode("utf-8", "replace").decode("utf-8")}


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _error_message(body: object) -> str:
    """The server's own words in an error body: `{"error": {"message": ...}}` and its variants."""
    if isinstance(body, dict):
        return _error_message(next((body[name] for name in ("error", "message", "detail") if name in body), ""))
    text = body if isinstance(body, str) else ""
    return "" if text.lstrip().startswith("<") else text


def _short(text: str) -> str:
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return text if len(text) <= 120 else text[:119] + "…"


def _connection_reason(error: BaseException) -> str:
    """Why an endpoint was not reached, in a few words."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    cause: BaseException | None = error
    words = ""
    while cause is not None:
        # Both addresses of `localhost` are tried, and their errors come in a group.
        inner = cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause,)
        if any(isinstance(item, ConnectionRefusedError) for item in inner):
            return "connection refused"
        words = str(cause) or words
        cause = cause.__cause__ or cause.__context__
    return _short(f"connection failed: {words}")
