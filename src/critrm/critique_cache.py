"""The critique cache: every answered call is stored once, in one file for all runs of a user."""

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from critrm.errors import ConfigError, StorageError
from critrm.store import disk_errors, from_json, to_json
from critrm.types import Critique

SECONDS_TO_DISK = 5.0
"""The most that a power cut can take: SQLite's log is forced onto the disk this often."""


PUT = """
INSERT INTO critiques VALUES (?, ?)
ON CONFLICT (key) DO UPDATE SET record = better_with_both_costs(critiques.record, excluded.record)
"""

MERGE = """
INSERT INTO main.critiques SELECT key, record FROM other.critiques WHERE true
ON CONFLICT (key) DO UPDATE SET record = excluded.record
WHERE is_answer(excluded.record) AND NOT is_answer(critiques.record)
"""


class CritiqueCache:
    """Every answered call, stored once by its key: an SQLite file that survives kill -9 and several processes.

    A call is on disk before it is reported as done, so nothing paid for is lost.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the cache, making the file when it is missing.

        Raises:
            StorageError: the file cannot be opened or written, or is not a cache.
        """
        self.path = Path(path)
        self._forced_to_disk = time.monotonic()
        with self._errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Replies may arrive on a worker thread; one process still writes one row at a time.
            uri = self.path.absolute().as_uri()
            self._db = sqlite3.connect(uri, uri=True, timeout=60, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute("CREATE TABLE IF NOT EXISTS critiques (key TEXT PRIMARY KEY, record TEXT NOT NULL)")
                self._db.execute("PRAGMA journal_mode=WAL")
                # A committed row is with the operating system, so kill -9 cannot take it. FULL would wait for the disk
                # at every row (some hundred a second); against power cuts `put` does so every few seconds instead.
                self._db.execute("PRAGMA synchronous=NORMAL")
                # A write: a disk that is read-only or full has to show before a call is paid for.
                self._db.execute("PRAGMA user_version=1")
                self._db.create_function("is_answer", 1, _is_answer, deterministic=True)
                self._db.create_function("better_with_both_costs", 2, _better_with_both_costs, deterministic=True)
            except BaseException:
                self._db.close()
                raise

    @contextlib.contextmanager
    def _errors(self, read: Path) -> Iterator[None]:
        """Blame the file that is read for being no cache, and this cache's disk for the rest."""
        try:
            with disk_errors(self.path):
                yield
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, sqlite3.OperationalError) and cause.sqlite_errorcode == sqlite3.SQLITE_ERROR:
                raise self._no_cache(read, cause) from cause  # it lacks the table
            raise
        except sqlite3.DatabaseError as error:
            raise self._no_cache(read, error) from error

    def _no_cache(self, path: Path, error: sqlite3.Error) -> StorageError:
        return StorageError(f"{path}: not a critique cache ({error}). Move the file away.")

    def get(self, key: str) -> Critique | None:
        """The stored critique of a call, or None."""
        row = self._db.execute("SELECT record FROM critiques WHERE key = ?", (key,)).fetchone()
        return from_json(Critique, json.loads(row[0])) if row else None

    def put(self, critique: Critique) -> None:
        """Store a critique; a failure replaces nothing.

        A key's row costs what all calls for the key have cost, failures that were billed included.

        Raises:
            StorageError: the disk is full or read-only.
        """
        with self._errors(self.path):
            # One statement, so that no process can pay between the reading and the writing of a row.
            self._db.execute(PUT, (critique.key, to_json(critique)))
            if time.monotonic() - self._forced_to_disk > SECONDS_TO_DISK:
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
                self._forced_to_disk = time.monotonic()

    def merge(self, other: str | Path) -> int:
        """Take over the calls of another cache: an answer replaces a failure, and never the reverse.

        Rows keep their own costs: those of a copied cache are mostly the same payments.

        Args:
            other: another cache, perhaps copied from another machine; it is only read. A `-wal` file beside it holds
                its latest answers, so copy both.

        Returns:
            How many rows are new, or were failures before.

        Raises:
            StorageError: one of the files cannot be used; this cache is then as it was.
        """
        other = Path(other)
        if not other.is_file():
            raise StorageError(f"{other}: no such file. Name the critiques.sqlite of another cache.")
        if self.path.exists() and other.samefile(self.path):
            raise StorageError(f"{other}: this is the cache itself. Name another one.")
        with self._errors(other):
            try:
                return self._merge(other, read_from=other)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                    raise
            # SQLite has to write beside a file even to read it: in a read-only folder, read a copy.
            with tempfile.TemporaryDirectory() as folder:
                for name in (other.name, f"{other.name}-wal"):
                    if (other.parent / name).exists():
                        shutil.copyfile(other.parent / name, Path(folder) / name)
                return self._merge(other, read_from=Path(folder) / other.name)

    def _merge(self, other: Path, *, read_from: Path) -> int:
        self._db.execute("ATTACH ? AS other", (read_from.absolute().as_uri() + "?mode=ro",))
        try:
            count = "SELECT count(*) FROM other.critiques WHERE is_answer(record) IS NULL"
            if n_damaged := self._db.execute(count).fetchone()[0]:
                raise StorageError(f"{other}: {n_damaged} rows are damaged. Copy the file again.")
            return self._db.execute(MERGE).rowcount
        finally:
            self._db.execute("DETACH other")

    def by_critic(self) -> dict[str, dict[str, float]]:
        """Of each critic: its calls, answers, tokens and cost."""
        found: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        for (record,) in self._db.execute("SELECT record FROM critiques ORDER BY key"):
            critique = from_json(Critique, json.loads(record))
            counts = found[critique.critic]
            counts["calls"] += 1
            counts["failures" if critique.failure else "answers"] += 1
            counts["tokens read"] += critique.n_prompt_tokens
            counts["tokens written"] += critique.n_completion_tokens
            counts["cost"] += critique.cost
        return {critic: dict(counts) for critic, counts in sorted(found.items())}

    def mean_written(self, critic: str, *, prompt_version: str) -> float | None:
        """Tokens that a critic's answers to one template have on average; None where it has given none."""
        name, version, written, failure = (
            f"json_extract(record, '$.{field}')"
            for field in ("critic", "prompt_version", "n_completion_tokens", "failure")
        )
        query = f"SELECT avg({written}) FROM critiques WHERE {name} = ? AND {version} = ? AND {failure} = ''"
        mean: float | None = self._db.execute(query, (critic, prompt_version)).fetchone()[0]
        return mean

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


def _is_answer(record: str) -> bool | None:
    """Whether a stored record is an answer; None when it is no record."""
    # SQLite has JSON functions of its own, but they know no infinity.
    try:
        return not from_json(Critique, json.loads(record)).failure
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _better_with_both_costs(stored: str, new: str) -> str:
    """The new record, or the stored one when the new one is a failure, with the cost of both."""
    old, critique = (from_json(Critique, json.loads(record)) for record in (stored, new))
    return to_json(replace(old if critique.failure else critique, cost=old.cost + critique.cost))


def default_cache_path() -> Path:
    """The cache of all critiques of this user, so that no run pays for what another has paid for."""
    return Path(os.environ.get("CRITRM_CACHE") or "~/.cache/critrm").expanduser() / "critiques.sqlite"


def command_merge(files: tuple[Path, ...], *, cache: Path | None = None) -> None:
    """Take over the answers of other caches, for example of other machines.

    Args:
        files: the other caches; they stay as they are. Copy a `-wal` file along with its cache.
        cache: the cache that is added to; this user's when not given.
    """
    if not files:
        raise ConfigError("name at least one cache to take over")
    console = Console()
    with CritiqueCache(cache or default_cache_path()) as store:
        for path in files:
            n_added = store.merge(path)
            console.print(f"{path}: {n_added:,} calls added", soft_wrap=True, markup=False, highlight=False)
        console.print(f"{store.path}: {len(store):,} calls", soft_wrap=True, markup=False, highlight=False)


def command_info(*, cache: Path | None = None) -> None:
    """Say what a cache holds: answers, failures, tokens and cost by critic.

    Args:
        cache: the file of answered calls; this user's when not given.
    """
    path, console = cache or default_cache_path(), Console()
    if not path.exists():
        console.print(f"{path}: no calls stored yet", soft_wrap=True, markup=False, highlight=False)
        return
    names = ("calls", "answers", "failures", "tokens read", "tokens written")
    table = Table("critic", *(Column(name, justify="right") for name in (*names, "US$")), title="Critique cache")
    with CritiqueCache(path) as store:
        for critic, counts in store.by_critic().items():
            table.add_row(escape(critic), *(f"{counts.get(name, 0):,.0f}" for name in names), f"{counts['cost']:.2f}")
        # The log beside it holds what is not yet in the file.
        files = [path.with_name(path.name + suffix) for suffix in ("", "-wal")]
        size = sum(file.stat().st_size for file in files if file.exists())
        console.print(table)
        console.print(f"{path}: {len(store):,} calls, {size / 2**20:,.1f} MiB", soft_wrap=True, markup=False)
