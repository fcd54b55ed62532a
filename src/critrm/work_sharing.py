"""Several processes, or machines with one file system, share a run: each does what no other is doing.

A process claims a folder by a lock on a file in it. The lock goes with the process, however that ends, so that work of
a killed process is taken up by another, or by the next attempt.
"""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from critrm.store import disk_errors

T = TypeVar("T")

POLL_SECONDS = 2.0
"""Between two looks at what others are doing."""


@contextlib.contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process has the folder to itself for as long as the block lasts.

    Args:
        folder: made if it is not there.
        wait: until the process that has it is done.

    Raises:
        StorageError: the folder cannot be written to.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".claim").open("w")
    with file:  # whose end is the end of the claim
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def share_out(tasks: Mapping[Path, Callable[[], T]], *, wait: bool = True) -> dict[Path, T]:
    """Do the tasks, those first that nobody else is doing, and return what each returned.

    A task that another process did is called as well: it has to see that there is nothing left to do.

    Args:
        tasks: the folder that a task writes into -> the task.
        wait: for the tasks that others are doing; otherwise those are missing from what is returned.
    """
    results: dict[Path, T] = {}
    while pending := [folder for folder in tasks if folder not in results]:
        before = len(results)
        for folder in pending:
            with claim(folder) as is_mine:
                if is_mine:
                    results[folder] = tasks[folder]()
        if len(results) < len(tasks) and not wait:
            return results
        if len(results) == before:
            time.sleep(POLL_SECONDS)
    return {folder: results[folder] for folder in tasks}
