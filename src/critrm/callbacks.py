"""What goes on beside the training: timed checkpoints, a progress bar, advice when memory or disk run out."""

import contextlib
import errno
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from critrm.batching import memory_advice
from critrm.errors import StorageError


class TimedCheckpoints(TrainerCallback):
    """Saves a checkpoint whenever enough time has passed: a kill costs minutes, whatever the model's size."""

    def __init__(self, minutes: float) -> None:
        """Args are the least minutes between two checkpoints."""
        self.seconds, self.saved = minutes * 60, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask the Trainer for a checkpoint when it is time."""
        due = [time.monotonic() - self.saved >= self.seconds and state.global_step < state.max_steps]
        # Writing takes all processes, so one of them decides: their clocks differ.
        if broadcast_object_list(due)[0]:
            control.should_save = True
            self.saved = time.monotonic()


class RichProgress(TrainerCallback):
    """A progress bar with the time left and the running loss."""

    def __init__(self, console: Console, title: str) -> None:
        """Args are where to show it, and its title."""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )
        self.task = self.bar.add_task(title, total=None, loss="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar, from where a resumed run goes on."""
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.bar.update(self.task, loss=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the finished bar on the screen."""
        self.bar.stop()


MEMORY_ADVICE = (
    "In this order: fewer pairs_per_pass, then gradient_checkpointing (neither changes the result), precision bf16 "
    "where the hardware computes in it, a shorter max_length, lora_rank. The same command goes on from the last "
    "complete checkpoint."
)


@contextlib.contextmanager
def failure_advice(out: Path) -> Iterator[None]:
    """Turn a machine that runs out of memory or disk into one line that says what to do about it.

    Raises:
        ModelError: out of memory.
        StorageError: weights or a checkpoint could not be written.
    """
    with memory_advice(MEMORY_ADVICE), full_disk(out):
        yield


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Say in one line that weights or a checkpoint could not be written, and that nothing before is lost."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        # torch's writer has no error class of its own.
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|unexpected pos", str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise StorageError(
            f"{out}: cannot write weights ({reason}). Free space and run the same command again; "
            "it goes on from the last complete checkpoint."
        ) from error
