"""A critic that answers while somebody waits: each call once, from the cache where it can be, within a deadline."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from critrm.budget import MAYBE_BILLED, Price, Purse, most_tokens
from critrm.calls import call_key, reply_record
from critrm.config import CriticConfig
from critrm.critics import no_price, open_chat, price_of, sampling_of
from critrm.critique_cache import CritiqueCache
from critrm.endpoints import delay_before_retry
from critrm.errors import CritrmError, StorageError
from critrm.llm import Chat, ChatRequest, Reply, Sampling
from critrm.prompts import critique_messages, load_template
from critrm.types import Critique, Message

_log = logging.getLogger(__name__)

UNAVAILABLE = "critic unavailable"
"""The failure of a call to a critic that cannot be used at all; the log says why."""
PASSING = ("timeout", "connection", "http 408", "http 429", "http 5", "invalid JSON", "HTML", "no choices", UNAVAILABLE)
"""How failures begin that another call may not have. A refusal or an empty reply would come again."""
LIMIT = "spending limit reached"
"""The failure of a call that might have cost more than is left of `max_cost`; it is not made."""
LOCAL_BATCH = 128
"""A model in this process writes so many critiques at once."""


@dataclass(slots=True)
class CriticStats:
    """What has become of the critiques that were asked for."""

    n_answered: int = 0
    n_cached: int = 0
    n_shared: int = 0
    """Asked for while the same call was under way."""
    n_failed: int = 0
    n_retried: int = 0
    n_under_way: int = 0
    cost: float = 0.0
    """US dollars."""
    seconds: float = 0.0
    """Of all calls that were answered."""


@dataclass(slots=True)
class _Call:
    key: str
    messages: tuple[Message, ...]
    until: float
    """The loop's time after which nobody waits any more."""
    done: "asyncio.Future[Critique]"
    expiry: asyncio.TimerHandle | None = None
    n_tries: int = 0


@dataclass(slots=True)
class _LoopState:
    """What belongs to one event loop; another one (a second `asyncio.run`) starts afresh."""

    loop: asyncio.AbstractEventLoop
    calls: dict[str, _Call] = field(default_factory=dict)
    queue: deque[_Call] = field(default_factory=deque)
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    n_free: int = 0
    n_streams: int = 0


class LiveCritic:
    """Writes a critique of one completion at a time, for many callers at once."""

    def __init__(
        self,
        chat: Chat,
        *,
        critic: str,
        sampling: Sampling,
        cache: CritiqueCache,
        template: str | Path = "critique",
        price: Price | None = None,
        concurrency: int = 16,
        n_streams: int | None = None,
        deadline: float = 120.0,
        retries: int = 1,
        max_cost: float | None = None,
    ) -> None:
        """Nothing is called yet.

        Args:
            chat: the critic's model.
            critic: its name.
            sampling: how critiques are drawn; part of a call's key.
            cache: answered calls, those of `critrm critique` too; they are not made again.
            template: Appendix A's, or a file of your own.
            price: what tokens cost.
            concurrency: calls under way at once.
            n_streams: streams of the chat under way at once; any number when None, 1 for a model in this process.
            deadline: seconds after which a critique is given up, waiting for a free place included.
            retries: how often a call that failed is made again, beyond what the chat does by itself; only failures
                that may pass, and within the deadline.
            max_cost: US dollars that its calls may cost as long as it lives; no limit when None.

        Raises:
            ConfigError: the template cannot be used, or there is a limit and no price.
        """
        if max_cost is not None and price is None:
            raise no_price(critic)
        self.chat, self.critic, self.sampling, self.cache, self.price = chat, critic, sampling, cache, price
        self.concurrency, self.n_streams = concurrency, n_streams
        self.deadline, self.retries = deadline, retries
        self.purse = None if max_cost is None else Purse(max_cost)
        self.stats = CriticStats()
        self._template = load_template(template, needs=("conversation", "response"))
        self._of_loop: _LoopState | None = None

    @classmethod
    def open(
        cls,
        settings: CriticConfig,
        *,
        critic: str,
        cache: CritiqueCache,
        deadline: float = 120.0,
        retries: int = 1,
        max_cost: float | None = None,
    ) -> "LiveCritic":
        """A critic from its complete settings (`critics.complete_critic`).

        Raises:
            ConfigError: the settings do not fit together, or there is a limit and no price.
            CriticError: a key is needed, and the environment holds none.
        """
        return cls(
            open_chat(settings),
            critic=critic,
            sampling=sampling_of(settings),
            cache=cache,
            template=settings.template,
            price=price_of(settings),
            concurrency=LOCAL_BATCH if settings.in_process else settings.concurrency,
            n_streams=1 if settings.in_process else None,
            deadline=deadline,
            retries=retries,
            max_cost=max_cost,
        )

    async def critique(self, prompt: Sequence[Message], completion: str) -> tuple[Critique, bool]:
        """The critique of a completion and whether it was known; one with its `failure` set where there is none."""
        messages = critique_messages(tuple(prompt), completion, template=self._template)
        key = call_key(self.chat.model, messages, sampling=self.sampling, prompt_version=self._template.version)
        stored = self.cache.get(key)
        if stored and not stored.failure:
            self.stats.n_cached += 1
            return replace(stored, critic=self.critic), True
        state = self._state()
        if call := state.calls.get(key):
            self.stats.n_shared += 1
        elif not self._set_aside(key, messages):
            self.stats.n_failed += 1
            return self._record(messages, Reply(id=key, failure=LIMIT)), False
        else:
            until = state.loop.time() + self.deadline
            call = state.calls[key] = _Call(key, messages, until, state.loop.create_future())
            call.expiry = state.loop.call_at(until, self._finish, state, call, self._failed(call, "timeout"))
            self._enqueue(state, call)
        # Whoever goes away does not take the answer from the others.
        return await asyncio.shield(call.done), False

    def _set_aside(self, key: str, messages: tuple[Message, ...]) -> bool:
        """Keep back the most that a call can cost; False where the limit does not leave that."""
        if self.purse is None or self.price is None:
            return True
        return self.purse.set_aside(key, self.price.cost(most_tokens(messages), self.sampling.max_tokens))

    def _settle(self, critique: Critique) -> None:
        if self.purse:
            unsure = critique.failure.startswith(MAYBE_BILLED)
            self.purse.settle(critique.key, critique.cost, unsure=unsure)

    def _state(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        if self._of_loop is None or self._of_loop.loop is not loop:
            self._of_loop = _LoopState(loop, n_free=self.concurrency)
        return self._of_loop

    def _enqueue(self, state: _LoopState, call: _Call) -> None:
        state.queue.append(call)
        if len(state.queue) == 1:
            # In the next round of the loop, so that what comes together shares a stream and its connections.
            state.loop.call_soon(self._pump, state)

    def _pump(self, state: _LoopState) -> None:
        """Give waiting calls to the chat, as far as there is room."""
        while state.queue and state.n_free and (self.n_streams is None or state.n_streams < self.n_streams):
            batch: list[_Call] = []
            while state.queue and state.n_free > len(batch):
                call = state.queue.popleft()
                if not call.done.done():
                    batch.append(call)
                elif self.purse:
                    # Nobody waited long enough for it to be made.
                    self.purse.settle(call.key, 0.0)
            if batch:
                state.n_free -= len(batch)
                state.n_streams += 1
                self.stats.n_under_way += len(batch)
                task = state.loop.create_task(self._ask(state, batch))
                state.tasks.add(task)
                task.add_done_callback(state.tasks.discard)

    async def _ask(self, state: _LoopState, batch: Sequence[_Call]) -> None:
        left = {call.key: call for call in batch}
        failure = UNAVAILABLE
        try:
            async with asyncio.timeout_at(max(call.until for call in batch)):
                requests = (ChatRequest(id=call.key, messages=call.messages) for call in batch)
                async for reply in self.chat.stream(requests, self.sampling):
                    self._answered(state, left.pop(reply.id), reply)
        except TimeoutError:
            failure = "timeout"
        except CritrmError as error:
            _log.warning("critic unavailable", extra={"facts": {"critic": self.critic, "reason": str(error)}})
        # Whatever it was, the callers wait for an answer.
        except Exception:
            _log.exception("critic failed", extra={"facts": {"critic": self.critic}})
        finally:
            state.n_streams -= 1
            for call in left.values():
                self._free_place(state)
                failed = self._failed(call, failure)
                self._settle(failed)
                self._failed_try(state, call, failed)
            self._pump(state)

    def _free_place(self, state: _LoopState) -> None:
        state.n_free += 1
        self.stats.n_under_way -= 1

    def _answered(self, state: _LoopState, call: _Call, reply: Reply) -> None:
        self._free_place(state)
        critique = self._record(call.messages, reply)
        self._settle(critique)
        self.stats.cost += critique.cost
        # A failure that cost nothing is not kept: it says more about this minute than about the call.
        if not critique.failure or critique.cost:
            try:
                self.cache.put(critique)
            except StorageError as error:
                # It has been paid for and somebody waits for it.
                _log.error("critique not stored", extra={"facts": {"reason": str(error)}})
        if critique.failure:
            self._failed_try(state, call, critique)
        else:
            self.stats.n_answered += 1
            self.stats.seconds += critique.seconds
            self._finish(state, call, critique)
        self._pump(state)

    def _failed_try(self, state: _LoopState, call: _Call, critique: Critique) -> None:
        call.n_tries += 1
        wait = delay_before_retry(call.n_tries - 1)
        in_time = state.loop.time() + wait < call.until
        again = critique.failure.startswith(PASSING) and call.n_tries <= self.retries and in_time
        if again and self._set_aside(call.key, call.messages):
            self.stats.n_retried += 1
            state.loop.call_later(wait, self._enqueue, state, call)
        else:
            self._finish(state, call, critique)

    def _finish(self, state: _LoopState, call: _Call, critique: Critique) -> None:
        if call.done.done():
            return
        if call.expiry:
            call.expiry.cancel()
        if critique.failure:
            self.stats.n_failed += 1
        del state.calls[call.key]
        call.done.set_result(critique)

    def _failed(self, call: _Call, failure: str) -> Critique:
        return self._record(call.messages, Reply(id=call.key, failure=failure))

    def _record(self, messages: tuple[Message, ...], reply: Reply) -> Critique:
        return reply_record(
            reply,
            messages,
            pair_id="",
            side="chosen",
            critic=self.critic,
            prompt_version=self._template.version,
            price=self.price,
        )
