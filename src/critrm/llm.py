"""The one seam to any LLM.

A `Chat` takes a stream of requests and yields a reply to each, in whatever order they finish. Hosted and served
models answer through `OpenAIChat`, a model in this process through `local_llm.LocalChat`, tests through `ScriptedChat`.
A call that fails is a `Reply` with its `failure` set: it never ends the run.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from critrm.answers import connection_reason, error_message, fatal_reason, read_body, retry_after
from critrm.endpoints import Access, Endpoint, Endpoints, Pace, delay_before_retry
from critrm.errors import ConfigError, CriticError
from critrm.types import Message, TokenChoice

if TYPE_CHECKING:
    import openai

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_RETRY_AFTER = 120.0
"""Seconds; a server that asks for more (a daily quota, say) is not worth waiting for."""
MAX_CONNECTION_FAILURES = 20
"""So many calls in a row without reaching the model mean that the endpoint is down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a reply is drawn; part of a critique's key."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    top_logprobs: int = 0
    """How many of each token's likeliest alternatives come with the reply (`Reply.choices`), at most 20."""


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
    choices: tuple[TokenChoice, ...] = ()
    """The reply's tokens with their alternatives; empty unless asked for, and where the model does not say."""


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
    """Any OpenAI-compatible endpoint, or several that serve the same model: OpenAI, vLLM, SGLang, llama.cpp, Ollama."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 4,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        """Say where the model is; nothing is sent before `stream`.

        Args:
            model: the model's name at the endpoint.
            base_url: the endpoint, usually ending in `/v1`; several (a sequence, or with commas between) share the
                calls. By default OPENAI_BASE_URL, else OpenAI.
            api_key: by default the environment's; a base URL needs none.
            key_variable: the environment variable that holds the key.
            concurrency: how many calls may be under way at once, over all endpoints.
            timeout: seconds to wait for an answer.
            max_retries: how often a call is sent again after 408, 409, 429, 5xx, a timeout or a lost connection,
                minding Retry-After.
            requests_per_minute: calls sent per minute at most, retries included.
            tokens_per_minute: tokens per minute at most; a call counts a quarter of its characters plus `max_tokens`
                until its usage is known.

        Raises:
            ConfigError: a setting cannot be used.
            CriticError: there is no key, and no base URL that might do without one.
        """
        if concurrency < 1 or timeout <= 0 or max_retries < 0:
            raise ConfigError("concurrency must be at least 1, timeout above 0 and max_retries at least 0")
        if not all(limit is None or limit > 0 for limit in (requests_per_minute, tokens_per_minute)):
            raise ConfigError("requests and tokens per minute must be above 0")
        self.model = model
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self._access = Access.find(base_url, api_key=api_key, variable=key_variable)
        self._requests, self._tokens = Pace(requests_per_minute), Pace(tokens_per_minute)

    def __repr__(self) -> str:
        """The model and where it is; never the key."""
        return f"OpenAIChat({self.model!r}, endpoint={self.endpoint!r})"

    @property
    def endpoint(self) -> str:
        """The endpoint for messages: without user names, passwords and queries, which may hold keys."""
        return self._access.names()

    async def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
        """Yield a reply to each request as they finish; a request is drawn when a reply has been taken.

        So no more than `concurrency` requests are ever drawn whose reply the caller has not stored.

        Raises:
            CriticError: an endpoint rejects the key or does not know the model, or all are down. Replies to calls that
                could not reach one are then not yielded, so that the caller asks them again next time.
        """
        endpoints = Endpoints(self._access)
        under_way: set[asyncio.Task[_Answer]] = set()
        finished: asyncio.Queue[asyncio.Task[_Answer]] = asyncio.Queue()
        unreachable: list[Reply] = []
        source = iter(requests)

        def start() -> None:
            if request := next(source, None):
                task = asyncio.create_task(self._ask(endpoints, request, sampling))
                task.add_done_callback(finished.put_nowait)
                under_way.add(task)

        try:
            for _ in range(self.concurrency):
                start()
            while under_way:
                tasks = [await finished.get()]
                while not finished.empty():
                    tasks.append(finished.get_nowait())
                under_way.difference_update(tasks)
                # What is answered is handed over before anything is raised: it has been paid for.
                for answer in sorted((task.result() for task in tasks), key=lambda answer: bool(answer.fatal)):
                    if answer.fatal:
                        raise CriticError(answer.fatal)
                    unreachable.append(answer.reply)
                    if answer.reached:
                        for reply in unreachable:
                            yield reply
                        unreachable.clear()
                    elif len(unreachable) >= MAX_CONNECTION_FAILURES:
                        raise CriticError(self._down(answer.reply.failure))
                    start()
            for reply in unreachable:
                yield reply
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            await endpoints.close()

    def _down(self, reason: str) -> str:
        return (
            f"endpoint down: {MAX_CONNECTION_FAILURES} calls in a row did not reach {self.endpoint} ({reason}). "
            "Every answer so far is stored: check the endpoint and run the same command again."
        )

    async def _ask(self, endpoints: Endpoints, request: ChatRequest, sampling: Sampling) -> "_Answer":
        """Call until there is an answer or a reason to stop; a call that found nobody goes to another endpoint."""
        n_retries, n_answered = 0, endpoints.n_answered()
        missed: set[Endpoint] = set()
        n_tokens = sum(len(message.content) for message in request.messages) / 4 + sampling.max_tokens
        while True:
            await self._requests.take(1)
            await self._tokens.take(n_tokens)
            endpoint = endpoints.choose(missed)
            await endpoint.wait_out_pause()
            answer = await self._call(endpoint, request, sampling)
            if used := answer.reply.n_prompt_tokens + answer.reply.n_completion_tokens:
                self._tokens.correct(used - n_tokens)
            if not answer.retry:
                return answer
            if answer.lost:
                missed.add(endpoint)
                if endpoints.up(missed):
                    continue
                missed.clear()
            # Refused for its rate while others were answered: it will have its turn.
            n_before, n_answered = n_answered, endpoints.n_answered()
            its_turn_comes = answer.busy and n_answered > n_before and self.max_retries > 0
            if n_retries >= self.max_retries and not its_turn_comes:
                return answer
            if answer.retry_after:
                endpoint.pause(answer.retry_after)
            else:
                await asyncio.sleep(delay_before_retry(n_retries))
            n_retries += not its_turn_comes

    async def _call(self, endpoint: Endpoint, request: ChatRequest, sampling: Sampling) -> "_Answer":
        import openai

        body = request_body(self.model, request, sampling, is_openai=endpoint.is_openai)
        start = time.perf_counter()
        try:
            with endpoint.client() as client:
                async with asyncio.timeout(self.timeout):
                    # As text, since the client's own parsing takes time and lets HTML and missing fields through.
                    text = await client.post("/chat/completions", cast_to=str, body=body)
        except openai.APIStatusError as error:
            return self._refused(request, error, endpoint)
        except (TimeoutError, openai.APIConnectionError) as error:
            endpoint.failed()
            failure, reached = connection_reason(error)
            reply = Reply(id=request.id, failure=self._access.words(failure))
            return _Answer(reply, reached=reached, retry=True, lost=True)
        except UnicodeEncodeError:
            return _Answer(Reply(id=request.id, failure="the text holds a lone surrogate and cannot be sent"))
        endpoint.answered()
        seconds = time.perf_counter() - start
        return _Answer(Reply(id=request.id, seconds=seconds, **read_body(text, self._access.words)))

    def _refused(self, request: ChatRequest, error: "openai.APIStatusError", endpoint: Endpoint) -> "_Answer":
        status = error.status_code
        if fatal := fatal_reason(error, model=self.model, access=self._access):
            return _Answer(Reply(id=request.id), fatal=fatal)
        wait = retry_after(error)
        # A gateway whose model server is gone.
        gone = status in (502, 503, 504)
        if gone:
            endpoint.failed()
        failure = f"http {status}" + (f": {detail}" if (detail := error_message(error.body)) else "")
        if wait > MAX_RETRY_AFTER:
            failure = f"http {status} (come back in {wait:.0f} seconds)"
        verdict = error.response.headers.get("x-should-retry")
        retry = verdict == "true" or (verdict != "false" and (status in (408, 409, 429) or status >= 500))
        return _Answer(
            Reply(id=request.id, failure=self._access.words(failure)),
            reached=not gone,
            retry=retry and wait <= MAX_RETRY_AFTER,
            retry_after=wait,
            lost=gone,
            busy=status == 429,
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """A reply with what it says about the endpoint."""

    reply: Reply
    reached: bool = True
    """Whether the model was reached at all."""
    fatal: str = ""
    """Why no other call can succeed either."""
    retry: bool = False
    """Whether the same call may succeed later."""
    retry_after: float = 0.0
    """Seconds until then, where the server says so."""
    lost: bool = False
    """Whether another endpoint may do better."""
    busy: bool = False
    """Whether only the rate of calls was too high."""


def request_body(model: str, request: ChatRequest, sampling: Sampling, *, is_openai: bool) -> dict[str, Any]:
    """The body of `POST /chat/completions`."""
    wanted = {"logprobs": True, "top_logprobs": sampling.top_logprobs} if sampling.top_logprobs else {}
    return wanted | {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in request.messages],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        # OpenAI's newer models know only the new name, most servers only the old one.
        "max_completion_tokens" if is_openai else "max_tokens": sampling.max_tokens,
    }
