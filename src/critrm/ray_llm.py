"""Chat over many workers of a Ray cluster: `--engine ray`.

Each worker holds one `Chat` (a client of an endpoint, or a model of its own) and answers a block of requests at a time.
Replies come back one by one; whoever called `stream`, and nobody else, stores them. So the cache, resuming and the
limit on cost are those of any other `Chat`.

Why Ray's actors and not the layer above them, Ray Data: it has to have its whole input before it starts (or the workers
and their models are loaded anew for each part), while requests are drawn here as capacity frees up, which is what the
limit on cost relies on; it hands back whole blocks, not replies; and it repeats a lost block from its beginning, the
calls that were answered and paid for included.
"""

import asyncio
import itertools
import logging
import math
import os
import pickle
import re
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from critrm.errors import ConfigError, CriticError, CritrmError
from critrm.llm import Chat, ChatRequest, Reply, Sampling

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that is started here: only requests and replies under way lie in it."""
SECONDS_TO_FIRST_WORKER = 300.0
"""A cluster that grows on demand takes minutes to add a machine."""
MAX_DEATHS = 3
"""So often a worker may die of a request before that counts as the request's failure."""
MAX_DEATHS_IN_A_ROW = 20
"""Without a reply in between; a request that kills workers is found in fewer, by halving its block."""
SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)


class RayChat:
    """A `Chat` that has the workers of a Ray cluster answer."""

    def __init__(
        self,
        make_chat: Callable[[], Chat],
        *,
        model: str,
        n_workers: int,
        block_size: int = 64,
        address: str | None = None,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
    ) -> None:
        """Describe the workers; Ray is started, or joined, by the first request.

        Args:
            make_chat: makes a worker's chat, on the worker. It is sent there, so it must hold no key: the chat finds
                its key in the worker's own environment.
            model: the model's name, as the local engine has it.
            n_workers: how many chats answer at once. Limits on the rate are each worker's own.
            block_size: requests given to a worker at a time; best several times what it answers at once.
            address: a running cluster that this machine is part of, as HOST:PORT or `auto`; by default RAY_ADDRESS,
                else one is started here. A cluster that this process has joined already is used as it is.
            cpus_per_worker: cores that a worker takes up.
            gpus_per_worker: GPUs that a worker takes up.

        Raises:
            ConfigError: a number cannot be used, or a key would be sent along.
        """
        from ray import cloudpickle

        if n_workers < 1 or block_size < 1:
            raise ConfigError("the ray engine needs at least 1 worker and blocks of at least 1 request")
        self.model, self.n_workers, self.block_size = model, n_workers, block_size
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._resources = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        self._recipe: bytes = cloudpickle.dumps(make_chat)  # type: ignore[no-untyped-call]
        _refuse_secrets(self._recipe)
        self._idle: list[Any] = []

    async def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
        """Yield one reply per request, as they finish; a block is drawn when a worker is free.

        The requests that a worker had not answered when it died are given to another one. Workers stay, with the
        models that they have loaded, for the next call of `stream`; they end with this object, and a cluster that was
        started for them with the process.

        Raises:
            ConfigError: there is no such cluster.
            CriticError: a worker's chat cannot be used at all, no worker can be started, or all of them die.
        """
        import ray

        blocks = _Blocks(requests, self.block_size)
        if blocks.done():
            return
        if not ray.is_initialized():
            self._join()
        run = _Run(blocks, self._idle, self._start_worker, sampling)
        try:
            async for reply in run.replies(self.n_workers):
                yield reply
        finally:
            await run.close()

    def _start_worker(self) -> Any:
        import ray

        worker: Any = ray.remote(_Worker)
        # Not restarted by Ray: a new one is started here, for the requests that are still open.
        return worker.options(max_restarts=0, max_concurrency=1, **self._resources).remote(self._recipe)

    def _join(self) -> None:
        import ray

        if self._address:
            _find_cluster(self._address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's coming default, which it warns about otherwise: a worker without GPUs is not blinded to them.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        n_cpus = max(os.cpu_count() or 1, math.ceil(self.n_workers * self._resources["num_cpus"]))
        own = {"num_cpus": n_cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        settings: dict[str, Any] = {"address": self._address} if self._address else {"address": "local"} | own
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"no Ray cluster ({self._address or 'started here'}): {error}") from error


def _find_cluster(address: str) -> None:
    """Ray would look for many minutes for a cluster that is not there."""
    if "://" in address:
        raise ConfigError(f"{address}: Ray's client cannot be used; run the command on a machine of the cluster")
    host, colon, port = address.rpartition(":")
    if colon:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise ConfigError(f"no Ray cluster answers at {address} ({error}); `ray status` finds one") from error


def _refuse_secrets(recipe: bytes) -> None:
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value.strip()) >= 8 and value.strip().encode() in recipe:
            raise ConfigError(f"{name} would be sent through Ray: set it in the environment of every machine instead")


class _Worker:
    """What runs in a worker's process: one chat."""

    def __init__(self, recipe: bytes) -> None:
        self._recipe = recipe
        self._chat: Chat | None = None

    async def ready(self) -> None:
        """Return once the process runs."""

    async def answer(self, requests: list[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply | CritrmError]:
        """Yield the replies; an error as a value, since Ray would wrap a raised one and write it to its logs."""
        try:
            if self._chat is None:
                self._chat = pickle.loads(self._recipe)()
            async for reply in self._chat.stream(requests, sampling):
                yield reply
        except CritrmError as error:
            yield CriticError(str(error))


@dataclass(frozen=True, slots=True)
class _Block:
    """Requests for one worker, and how many workers have died of some of them."""

    requests: list[ChatRequest]
    n_deaths: int = 0


@dataclass(frozen=True, slots=True)
class _Ended:
    """A worker has started or is done with its block, or it has died (of what) and left some of it."""

    worker: Any
    death: str = ""
    left: _Block | None = None


class _Blocks:
    """The requests in blocks, drawn as they are needed; what dead workers left comes first."""

    def __init__(self, requests: Iterable[ChatRequest], size: int) -> None:
        self._source, self._size = iter(requests), size
        self._returned: deque[_Block] = deque()

    def take(self) -> _Block | None:
        if self._returned:
            return self._returned.popleft()
        requests = list(itertools.islice(self._source, self._size))
        return _Block(requests) if requests else None

    def done(self) -> bool:
        """Whether nothing is left; draws the next block when that cannot be told otherwise."""
        if not self._returned and (block := self.take()):
            self._returned.append(block)
        return not self._returned

    def give_back(self, block: _Block) -> list[Reply]:
        """Take back what a dead worker left, in halves; gives the failure of a request found to kill its workers."""
        half = (len(block.requests) + 1) // 2
        if len(block.requests) == 1 and block.n_deaths >= MAX_DEATHS:
            failure = f"the worker died, {block.n_deaths} times (out of memory?)"
            return [Reply(id=block.requests[0].id, failure=failure)]
        for part in (block.requests[half:], block.requests[:half]):
            if part:
                self._returned.appendleft(_Block(part, block.n_deaths))
        return []


class _Run:
    """One call of `stream`: who is busy, and what the workers report, in order."""

    def __init__(self, blocks: _Blocks, idle: list[Any], start_worker: Callable[[], Any], sampling: Sampling) -> None:
        self._blocks, self._idle, self._start_worker, self._sampling = blocks, idle, start_worker, sampling
        self._events: asyncio.Queue[Reply | _Ended | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: set[Any] = set()

    async def replies(self, n_workers: int) -> AsyncIterator[Reply]:
        """Give blocks to free workers until all is answered.

        A worker's end of block is reported behind its replies: no more than one block per worker is ever drawn whose
        replies have not been taken.
        """
        n_deaths = 0
        for _ in range(n_workers - len(self._idle)):
            self._do(self._start())
        while True:
            while self._idle and (block := self._blocks.take()):
                self._busy.add(worker := self._idle.pop())
                self._do(self._ask(worker, block))
            if not self._busy and self._blocks.done():
                return
            event = await self._next_event()
            if isinstance(event, Reply):
                n_deaths = 0
                yield event
            elif isinstance(event, BaseException):
                # What is answered is handed over first: it has been paid for.
                while not self._events.empty():
                    if isinstance(other := self._events.get_nowait(), Reply):
                        yield other
                raise event
            else:
                self._busy.discard(event.worker)
                n_deaths += bool(event.death)
                if n_deaths > max(MAX_DEATHS_IN_A_ROW, 3 * n_workers):
                    raise CriticError(f"{n_deaths} workers died in a row ({event.death}); see Ray's logs (/tmp/ray)")
                for reply in self._blocks.give_back(event.left) if event.left else ():
                    yield reply
                if event.death:
                    self._do(self._start())
                else:
                    self._idle.append(event.worker)

    async def _next_event(self) -> "Reply | _Ended | BaseException":
        try:
            async with asyncio.timeout(None if self._busy else SECONDS_TO_FIRST_WORKER):
                return await self._events.get()
        except TimeoutError:
            waited = f"{SECONDS_TO_FIRST_WORKER:.0f} seconds"
            raise CriticError(f"the Ray cluster started no worker in {waited}. Has it the CPUs or GPUs?") from None

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self) -> None:
        from ray.exceptions import RayError

        worker = self._start_worker()
        try:
            # A block that is given to a worker for which there is no room would wait, though others are free.
            await worker.ready.remote()
        except RayError as error:
            self._events.put_nowait(_Ended(worker, _reason(error)))
        else:
            self._events.put_nowait(_Ended(worker))

    async def _ask(self, worker: Any, block: _Block) -> None:
        from ray.exceptions import RayError, RayTaskError

        left = {request.id: request for request in block.requests}
        try:
            async for reference in worker.answer.remote(block.requests, self._sampling):
                item = await reference
                self._events.put_nowait(item)
                if isinstance(item, Reply):
                    left.pop(item.id, None)
        except RayTaskError as error:
            self._events.put_nowait(error)
        except RayError as error:  # its process, or its machine, is gone
            open_ones = _Block(list(left.values()), block.n_deaths + 1)
            self._events.put_nowait(_Ended(worker, _reason(error), open_ones))
        else:
            self._events.put_nowait(_Ended(worker))

    async def close(self) -> None:
        """Stop what is under way."""
        import ray

        for worker in self._busy:
            ray.kill(worker)  # first: whatever it answers from now on is lost
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _reason(error: Exception) -> str:
    """The last of Ray's many lines."""
    lines = str(error).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)[:200]
