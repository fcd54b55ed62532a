"""Work side by side on a CPU: threads of which each has some of the cores.

The operations of a small model are too small to be divided among cores; several of them at once use all cores better.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

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


class GradientsInOrder:
    """Gradients of several backward passes at once, added up in the order of the passes' numbers.

    A sum in floating point depends on its order, and whichever thread is the faster one must not decide it: a pass
    waits, parameter by parameter, for what those before it add.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], n_passes: int) -> None:
        """Args are the parameters that learn, and how many passes there will be, numbered from 0."""
        self._parameters = list(parameters)
        self._added: list[set[int]] = [set() for _ in range(n_passes)]
        self._finished = [False] * n_passes
        self._changed = threading.Condition()
        self._this_thread = threading.local()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Backward passes within have their turns: each within `turn`, and started no later than those after it."""
        with ExitStack() as hooks:
            for number, parameter in enumerate(self._parameters):
                leaf: Any = parameter  # its hooks are not typed
                hooks.callback(leaf.register_hook(lambda _, number=number: self._wait(number)).remove)
                tell = leaf.register_post_accumulate_grad_hook(lambda _, number=number: self._tell(number))
                hooks.callback(tell.remove)
            yield

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """The pass of this number runs within, in this thread; nobody waits for it after that, even if it failed."""
        self._this_thread.number = number
        try:
            yield
        finally:
            with self._changed:
                self._finished[number] = True
                self._changed.notify_all()

    def _wait(self, parameter: int) -> None:
        before = range(self._this_thread.number)
        with self._changed:
            self._changed.wait_for(lambda: all(self._finished[n] or parameter in self._added[n] for n in before))

    def _tell(self, parameter: int) -> None:
        with self._changed:
            self._added[self._this_thread.number].add(parameter)
            self._changed.notify_all()
