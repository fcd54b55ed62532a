"""Requests that come one by one, scored together: what waits while the model computes is the next batch."""

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from critrm.errors import ModelError

if TYPE_CHECKING:
    from critrm.batching import Candidates
    from critrm.reward_model import RewardModel

Rewards = list[list[float]]
"""By completion, by critique."""

MAX_PROMPTS = 64
"""Prompts in a batch at most; as many as `RewardModel.score_candidates` sorts by length at once."""
STEPS_PER_BATCH = 4
"""A batch is about so many steps of the model: enough to fill each, few enough that new requests need not wait long."""
CHARACTERS_PER_TOKEN = 4


@dataclass(slots=True)
class BatchStats:
    """What the model has done so far."""

    n_batches: int = 0
    n_prompts: int = 0
    n_completions: int = 0
    seconds: float = 0.0
    """Of computing."""
    n_waiting: int = 0
    """Prompts that are not rewarded yet."""


@dataclass(frozen=True, slots=True)
class _Job:
    candidates: "Candidates"
    size: int
    """Tokens, estimated."""
    done: "Future[Rewards]" = field(default_factory=Future)


class MicroBatcher:
    """One reward model and one thread that computes with it; callers wait for their own rewards only."""

    def __init__(self, model: "RewardModel", *, max_tokens_per_step: int = 4096, wait: float = 0.002) -> None:
        """The thread is started by the first request.

        Args:
            model: the reward model; nobody else should compute with it meanwhile.
            max_tokens_per_step: how many tokens are computed at once; does not change the rewards.
            wait: seconds that a request waits for others when the model is idle.
        """
        self.model, self.max_tokens_per_step, self.wait = model, max_tokens_per_step, wait
        self.stats = BatchStats()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def score(self, candidates: "Candidates") -> Rewards:
        """The rewards of one prompt's completions.

        Raises:
            DataError: there are critiques, but not for every completion.
            ModelError: memory does not suffice, or the batcher is closed.
        """
        texts = [message.content for message in candidates.prompt] + list(candidates.completions)
        texts += [critique for each in candidates.critiques for critique in each]
        job = _Job(candidates, sum(map(len, texts)) // CHARACTERS_PER_TOKEN + 1)
        with self._lock:
            if self._closed:
                raise ModelError("the reward model is shut down")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="critrm-model", daemon=True)
                self._thread.start()
            self.stats.n_waiting += 1
            self._jobs.put(job)
        return await asyncio.wrap_future(job.done)

    def close(self) -> None:
        """Reward what is waiting, then end the thread."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._jobs.put(None)
        if thread:
            thread.join()

    def _run(self) -> None:
        last = False
        while not last and (job := self._jobs.get()) is not None:
            batch, last = self._gather(job)
            started = time.perf_counter()
            # Whoever has gone away meanwhile needs no reward.
            wanted = [each for each in batch if each.done.set_running_or_notify_cancel()]
            self._compute(wanted)
            with self._lock:
                self.stats.n_waiting -= len(batch)
            self.stats.seconds += time.perf_counter() - started
            self.stats.n_batches += 1
            self.stats.n_prompts += len(wanted)
            self.stats.n_completions += sum(len(each.candidates.completions) for each in wanted)

    def _gather(self, first: _Job) -> tuple[list[_Job], bool]:
        """A batch, and whether it is the last one."""
        batch, size = [first], first.size
        until = time.monotonic() + self.wait
        while len(batch) < MAX_PROMPTS and size < STEPS_PER_BATCH * self.max_tokens_per_step:
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
            size += job.size
        return batch, False

    def _compute(self, batch: Sequence[_Job]) -> None:
        rewards = self.model.score_candidates(
            (job.candidates for job in batch), max_tokens_per_step=self.max_tokens_per_step
        )
        try:
            for job, found in zip(batch, list(rewards), strict=True):
                job.done.set_result(found)
        # Whatever it was, somebody waits for an answer; and the other requests of the batch are not to blame.
        except Exception as error:
            if len(batch) == 1:
                batch[0].done.set_exception(error)
                return
            for job in batch:
                self._compute([job])
