"""The critique cache: every answered call is stored once, in one file for all runs of a user."""

import json
import os
import sqlite3
from pathlib import Path
from typing import Self

from critrm.errors import StorageError
from critrm.store import disk_errors, from_json, to_json
from critrm.types import Critique


class CritiqueCache:
    """Every answered call, stored once by its key: an SQLite file that survives kill -9 and several processes.

    A call is on disk before it is reported as done, so nothing paid for is lost.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the cache, making the file when it is missing.

        Raises:
            StorageError: the file cannot be opened or is not a cache.
        """
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Replies may arrive on a worker thread; one process still writes one row at a time.
                self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("CREATE TABLE IF NOT EXISTS critiques (key TEXT PRIMARY KEY, record TEXT NOT NULL)")
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                raise StorageError(f"{self.path}: not a critique cache ({error}). Move the file away.") from error

    def get(self, key: str) -> Critique | None:
        """The stored critique of a call, or None."""
        row = self._db.execute("SELECT record FROM critiques WHERE key = ?", (key,)).fetchone()
        return from_json(Critique, json.loads(row[0])) if row else None

    def put(self, critique: Critique) -> None:
        """Store a critique; an answer is never replaced by a failure.

        Raises:
            StorageError: the disk is full or read-only.
        """
        verb = "INSERT OR IGNORE" if critique.failure else "INSERT OR REPLACE"
        with disk_errors(self.path):
            self._db.execute(f"{verb} INTO critiques VALUES (?, ?)", (critique.key, to_json(critique)))

    def __len__(self) -> int:
        """How many calls are stored."""
        return int(self._db.execute("SELECT COUNT(*) FROM critiques").fetchone()[0])

    def close(self) -> None:
        """Close the file; everything is already on disk."""
        self._db.close()

    def __enter__(self) -> Self:
        """Use as a context manager to close the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


def default_cache_path() -> Path:
    """The cache of all critiques of this user, so that no run pays for what another has paid for."""
    return Path(os.environ.get("CRITRM_CACHE") or "~/.cache/critrm").expanduser() / "critiques.sqlite"
