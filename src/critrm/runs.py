"""The folder of a recipe's run."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from critrm.budget import Ledger
from critrm.config import Recipe
from critrm.store import write_text
from critrm.types import PreferencePair
from critrm.work_sharing import claim

Sets = dict[str, tuple[PreferencePair, ...]]
"""The training pairs and the test sets, by name."""

LEARNING_RATES = "learning-rates.json"
"""In a run's folder: arm -> learning rate, as soon as they are chosen."""
TRAIN = "train"
"""The training pairs' name among the sets; the others are test sets."""


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe, the folder of its run, and where progress is shown."""

    recipe: Recipe
    out: Path
    console: Console
    study: Path | None = None
    """The folder of the study that the run is a cell of."""
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    """What each critic's calls came to in this attempt."""

    @property
    def readings(self) -> Path:
        """Where what a frozen backbone reads is kept: the cells of a study share it, and read no pair twice."""
        return (self.study or self.out) / "readings"

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent to the stage's seconds, which survive an interruption."""
        started = time.monotonic()
        try:
            yield
        finally:
            with claim(self.out / ".seconds", wait=True):
                seconds = self.seconds()
                seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 1)
                write_text(self.out / "seconds.json", json.dumps(seconds, indent=2) + "\n")

    def seconds(self) -> dict[str, float]:
        """Seconds spent per stage so far, over all attempts."""
        path = self.out / "seconds.json"
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found
