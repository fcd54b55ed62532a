"""Work side by side on a CPU: threads of which each has some of the cores.

The operations of a small model are too small to be divided among cores; several of them at once use all cores better.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

MAX_THREADS = 4
"""So many are worth it at once: between their operations Python lets only one of them go on."""

Item = TypeVar("Item")
Result = TypeVar("Result")
_SETTING_THREADS = threading.Lock()


def n_side_by_side(device: torch.device) -> int:
    """How many threads are worth it on a device: one on anything but a CPU."""
    return min(torch.get_num_threads(), MAX_THREADS) if device.type == "cpu" else 1


@contextmanager
def sharing_cores(n: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of n threads, each with its share of torch's threads; on leaving, what runs is waited for."""
    started = threading.Barrier(n + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first look sets the number to everybody's: it must not come after ours
        torch.set_num_threads(max(1, n_threads // n))

    with ThreadPoolExecutor(n, thread_name_prefix="critrm-core", initializer=begin) as pool:
        # The number is each thread's own, and what threads to come begin with: that is as before when all have started.
        with _SETTING_THREADS:
            n_threads = torch.get_num_threads()
            try:
                for _ in range(n):
                    pool.submit(started.wait)
                started.wait()
            except BaseException:  # no thread could be started, or Ctrl-C: those that wait must not do so for ever
                started.abort()
                raise
            torch.set_num_threads(n_threads)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def computed(compute: Callable[[Item], Result], items: Iterable[Item], *, n: int) -> Iterator[tuple[Item, Result]]:
    """Each item, in order, with what it comes to; n are computed at once, and n more items are held at most.

    A single item is computed here, with all cores.
    """
    stream = iter(items)
    first = list(itertools.islice(stream, 2))
    if n == 1 or len(first) < 2:
        for item in itertools.chain(first, stream):
            yield item, compute(item)
        return
    with sharing_cores(n) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in itertools.chain(first, stream):
            waiting.append((item, pool.submit(compute, item)))
            if len(waiting) > 2 * n - 1:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
