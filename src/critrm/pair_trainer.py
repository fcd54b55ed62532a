"""transformers' Trainer over packed rows: the ranking loss, timed checkpoints, a progress bar (sections 3.2, 4.4)."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from critrm.batching import EncodedPair, pack
from critrm.errors import StorageError


def ranking_loss(rewards: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2 per pair: -log sigmoid(chosen - rejected - margin).

    Args:
        rewards: (n_pairs, 2), chosen first.
        margins: (n_pairs,).

    Returns:
        (n_pairs,) losses.
    """
    return -functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins)


def collate(pairs: list[EncodedPair]) -> dict[str, Any]:
    """One packed row of several pairs, as the Trainer passes it to the model."""
    batch = pack(pairs)
    return {
        name: getattr(batch, name) for name in ("input_ids", "position_ids", "score_positions", "groups", "margins")
    }


class EncodedPairs(torch.utils.data.Dataset[EncodedPair]):
    """Encoded pairs as the data set that a Trainer draws from."""

    def __init__(self, pairs: list[EncodedPair]) -> None:
        """Args are the pairs."""
        self.pairs = pairs

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> EncodedPair:
        """One pair."""
        return self.pairs[index]


class PairTrainer(Trainer):
    """transformers' Trainer with the ranking loss over packed rows; everything else is the Trainer's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what Trainer takes."""
        super().__init__(*args, **kwargs)
        # The loss below divides by the pairs of the whole optimiser step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        n_pairs = torch.tensor(sum(len(batch["margins"]) for batch in batch_samples), device=device)
        gathered: torch.Tensor = self.accelerator.gather(n_pairs)
        mean: torch.Tensor = gathered.sum() / self.accelerator.num_processes
        return mean

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean ranking loss over the pairs of the optimiser step, whatever the passes it is split into."""
        margins = inputs.pop("margins")
        rewards = model(**inputs)
        losses = ranking_loss(rewards, margins)
        loss = losses.sum() / (len(margins) if num_items_in_batch is None else num_items_in_batch)
        return (loss, rewards) if return_outputs else loss


class TimedCheckpoints(TrainerCallback):
    """Saves a checkpoint whenever enough time has passed: a kill costs minutes, whatever the model's size."""

    def __init__(self, minutes: float) -> None:
        """Args are the least minutes between two checkpoints."""
        self.seconds, self.saved = minutes * 60, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask the Trainer for a checkpoint when it is time."""
        if time.monotonic() - self.saved >= self.seconds and state.global_step < state.max_steps:
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


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Say in one line that weights or a checkpoint could not be written, and that nothing before is lost."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer has no error class of its own.
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|unexpected pos", str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise StorageError(
            f"{out}: cannot write weights ({reason}). Free space and run the same command again; "
            "it goes on from the last complete checkpoint."
        ) from error
