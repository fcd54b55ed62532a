"""A `Chat` over OpenAI's Batch API: half the price, an answer within a day, and no call paid for twice after a kill.

    requests -> files of at most 50,000 -> uploaded -> noted in `state` -> batches -> polled -> replies -> struck out

A kill at any point leaves a note of what was sent: the same command then only waits for it.
"""

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from critrm.answers import connection_reason, error_message, fatal_reason, read_completion
from critrm.endpoints import Access
from critrm.errors import ConfigError, CriticError, StorageError
from critrm.llm import ChatRequest, Reply, Sampling, request_body
from critrm.store import content_hash, from_json, to_json, write_text

if TYPE_CHECKING:
    import openai

MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000
"""Of one batch; OpenAI takes 200 MB."""
MAX_FAILED_POLLS = 20
RESULTS_KEPT = 14 * 86_400
"""Seconds; OpenAI deletes them after 30 days, others earlier."""
ENDED = ("completed", "failed", "expired", "cancelled")
PATH: Literal["/v1/chat/completions"] = "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """A batch under way, as `state` keeps it."""

    endpoint: str
    input_file: str
    """The uploaded file's id at the provider."""
    sha256: str
    """Of what was sent."""
    submitted: float
    """Seconds since 1970."""
    requests: tuple[str, ...]
    """Content hashes of the calls not yet handed over; they are the `custom_id` of the lines sent."""
    id: str = ""
    """Empty while nobody knows whether the provider has made it."""


class BatchChat:
    """Any endpoint with OpenAI's Batch API."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        state: Path,
        poll_seconds: float = 30.0,
    ) -> None:
        """Say where the model is; nothing is sent before `stream`.

        Args:
            model: the model's name at the endpoint.
            base_url: the endpoint; by default OPENAI_BASE_URL, else OpenAI.
            api_key: by default the environment's.
            key_variable: the environment variable that holds the key.
            state: the file that notes the batches under way.
            poll_seconds: how often to ask whether a batch is ready.

        Raises:
            ConfigError: a setting cannot be used.
            CriticError: there is no key, and no base URL that might do without one.
        """
        self.model, self.state, self.poll_seconds = model, Path(state), poll_seconds
        self._access = Access.find(base_url, api_key=api_key, variable=key_variable)
        if len(self._access.urls) > 1:
            raise ConfigError("batches go to one endpoint: give one base URL")

    def __repr__(self) -> str:
        """The model and where it is; never the key."""
        return f"BatchChat({self.model!r}, endpoint={self._access.names()!r})"

    async def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
        """Submit all requests, then yield a reply to each as the batches end; identical requests are sent once.

        Raises:
            CriticError: the endpoint takes no batches, rejects the key or is down. What is under way goes on there.
            StorageError: `state` cannot be read or written.
        """
        wanted: dict[str, list[str]] = {}
        """Hash of each call -> the requests that it answers."""
        unsendable: list[str] = []
        async with self._access.client(self._access.urls[0], max_retries=4, timeout=120.0) as client:
            await self._submit_all(client, requests, sampling, wanted=wanted, unsendable=unsendable)
            for request_id in unsendable:
                yield Reply(id=request_id, failure="the text holds a lone surrogate and cannot be sent")
            asked = set(wanted)
            waiting = [batch for batch in self._noted() if not wanted.keys().isdisjoint(batch.requests)]
            async for batch, ended in self._as_they_end(client, waiting):
                handed_over: set[str] = set()
                try:
                    async for call, facts in self._results(client, batch, ended):
                        for request_id in wanted.pop(call, ()):
                            yield Reply(id=request_id, **facts)
                        # Only now: whoever took a reply has stored it before asking for another.
                        handed_over.add(call)
                finally:
                    if struck := handed_over & asked:
                        self._strike_out(batch, struck)

    async def _submit_all(
        self,
        client: "openai.AsyncOpenAI",
        requests: Iterable[ChatRequest],
        sampling: Sampling,
        *,
        wanted: dict[str, list[str]],
        unsendable: list[str],
    ) -> None:
        """Send every call that is not under way already; fills `wanted` and `unsendable`."""
        for batch in self._noted():
            if not batch.id:
                await self._make(client, batch, look_first=True)
        under_way = {call for batch in self._noted() for call in batch.requests}
        lines: list[bytes] = []
        calls: list[str] = []
        size = 0
        for request in requests:
            call, line = self._line(request, sampling)
            if not line:
                unsendable.append(request.id)
                continue
            wanted.setdefault(call, []).append(request.id)
            if call in under_way:
                continue
            if lines and (len(lines) >= MAX_REQUESTS or size + len(line) > MAX_BYTES):
                await self._send(client, lines, calls)
                lines, calls, size = [], [], 0
            under_way.add(call)
            lines.append(line)
            calls.append(call)
            size += len(line)
        if lines:
            await self._send(client, lines, calls)

    def _line(self, request: ChatRequest, sampling: Sampling) -> tuple[str, bytes]:
        """A call's hash and its line of the file; an empty line when the text has no UTF-8 form."""
        is_openai = self._access.names() == "OpenAI"
        body = request_body(self.model, request, sampling, is_openai=is_openai)
        call = content_hash(body)
        line = {"custom_id": call, "method": "POST", "url": PATH, "body": body}
        try:
            return call, json.dumps(line, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:
            return call, b""

    async def _send(self, client: "openai.AsyncOpenAI", lines: list[bytes], calls: list[str]) -> None:
        """Upload a file of calls, note it, and have a batch made of it."""
        data = b"".join(lines)
        sha256 = hashlib.sha256(data).hexdigest()
        with self._errors():
            name = f"critrm-{sha256[:16]}.jsonl"
            uploaded = await client.files.create(file=(name, data, "application/jsonl"), purpose="batch")
        batch = _Batch(
            endpoint=self._access.names(),
            input_file=uploaded.id,
            sha256=sha256,
            submitted=time.time(),
            requests=tuple(calls),
        )
        # Before the batch is made: after a kill in between, the next run looks for it at the provider.
        self._note(batch)
        await self._make(client, batch, look_first=False)

    async def _make(self, client: "openai.AsyncOpenAI", batch: _Batch, *, look_first: bool) -> None:
        """Have the provider make a batch of an uploaded file, unless it has done so already; notes its id."""
        import openai

        with self._errors():
            if look_first:
                async for made in client.batches.list(limit=100):
                    if made.input_file_id == batch.input_file:
                        self._note(replace(batch, id=made.id))
                        return
                    if made.created_at < batch.submitted - 86_400:
                        break
            try:
                # One try: a second one could make a second batch.
                made = await client.with_options(max_retries=0).batches.create(
                    completion_window="24h", endpoint=PATH, input_file_id=batch.input_file
                )
            except openai.APIStatusError as error:
                if error.status_code < 500:
                    self._note(batch, over=True)  # refused: there is no batch
                raise
        self._note(replace(batch, id=made.id))

    async def _as_they_end(
        self, client: "openai.AsyncOpenAI", waiting: list[_Batch]
    ) -> AsyncIterator[tuple[_Batch, "openai.types.Batch | None"]]:
        """Poll until all have ended; None stands for a batch that the provider does not know any more."""
        import openai

        n_failed = 0
        while waiting:
            for batch in list(waiting):
                try:
                    found = await client.batches.retrieve(batch.id)
                except openai.NotFoundError:
                    found = None
                except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
                    n_failed += 1
                    if n_failed >= MAX_FAILED_POLLS:
                        raise self._refusal(error) from None
                    continue
                except openai.APIStatusError as error:
                    raise self._refusal(error) from None
                n_failed = 0
                if found is None or found.status in ENDED:
                    waiting.remove(batch)
                    yield batch, found
            if waiting:
                await asyncio.sleep(self.poll_seconds)

    async def _results(
        self, client: "openai.AsyncOpenAI", batch: _Batch, ended: "openai.types.Batch | None"
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The facts of a Reply to each call of a batch that has ended."""
        import openai

        for file_id in (ended.output_file_id, ended.error_file_id) if ended else ():
            if file_id:
                with self._errors():
                    try:
                        content = (await client.files.content(file_id)).content
                    except openai.NotFoundError:
                        if time.time() - batch.submitted < RESULTS_KEPT:
                            raise
                        continue
                for line in content.split(b"\n"):
                    call, facts = self._read_line(line)
                    yield call, facts
        # Whoever asked for one of these has had no answer above.
        failure = self._access.words(_why_unanswered(ended))
        for call in batch.requests:
            yield call, {"failure": failure}

    def _read_line(self, line: bytes) -> tuple[str, dict[str, Any]]:
        words = self._access.words
        try:
            row = json.loads(line)
            call, response, error = str(row["custom_id"]), row.get("response"), row.get("error")
            if error or not response:
                return call, {"failure": words(f"batch: {error_message(error) or 'no answer'}")}
            if response["status_code"] != 200:
                detail = error_message(response.get("body"))
                failure = f"http {response['status_code']}" + (f": {detail}" if detail else "")
                return call, {"failure": words(failure)}
            return call, read_completion(response["body"], words)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return "", {"failure": "not a result"}  # its call is then one without an answer

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import openai

        try:
            yield
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            raise self._refusal(error) from None  # whose text may hold the key

    def _refusal(self, error: "openai.APIStatusError | openai.APIConnectionError") -> CriticError:
        """What an endpoint's error means, and what to do."""
        import openai

        where, words = self._access.names(), self._access.words
        if isinstance(error, openai.APIConnectionError):
            reason = f"{where} was not reached ({words(connection_reason(error)[0])}). Run the same command again"
        elif isinstance(error, openai.NotFoundError):
            reason = f"{where} has no Batch API (http 404): leave out --batch"
        else:
            detail = words(error_message(error.body) or "no reason given")
            reason = fatal_reason(error, model=self.model, access=self._access)
            reason = reason or f"{where} refuses the batch (http {error.status_code}: {detail})"
        return CriticError(f"{reason}. Batches under way go on there, and are noted in {self.state}.")

    def _noted(self) -> list[_Batch]:
        """The batches under way at this endpoint."""
        return [batch for batch in self._read() if batch.endpoint == self._access.names()]

    def _note(self, batch: _Batch, *, over: bool = False) -> None:
        """Write down a batch, or strike it out."""
        others = [other for other in self._read() if other.input_file != batch.input_file]
        batches = [json.loads(to_json(item)) for item in (others if over else [*others, batch])]
        write_text(self.state, json.dumps({"batches": batches}, indent=1) + "\n")

    def _strike_out(self, batch: _Batch, calls: Set[str]) -> None:
        """Take these calls out of a batch's note; what nobody has asked for stays, for a later run."""
        # As it is noted now: another run may have taken some of its calls, or all.
        for noted in self._noted():
            if noted.input_file == batch.input_file:
                left = tuple(call for call in noted.requests if call not in calls)
                self._note(replace(noted, requests=left), over=not left)

    def _read(self) -> list[_Batch]:
        if not self.state.exists():
            return []
        try:
            rows = json.loads(self.state.read_text(encoding="utf-8"))["batches"]
            return [from_json(_Batch, row) for row in rows]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{self.state}: cannot be read ({error}). It notes which batches are under way: mend it, or move it "
                "away and look for the batches at the provider."
            ) from None


def _why_unanswered(ended: "openai.types.Batch | None") -> str:
    if ended is None:
        return "batch: the endpoint does not know it any more"
    if ended.errors and ended.errors.data:
        return f"batch {ended.status}: {ended.errors.data[0].message}"
    return f"batch {ended.status} without an answer to this call"
