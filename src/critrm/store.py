"""Records in and out, and what marks a stage as done.

Files are replaced atomically (written beside, then renamed), so that a killed run leaves the old file or the new one.
JSONL is split on newline bytes only: texts may hold U+2028 and its like.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sqlite3
import sys
import time
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from critrm.errors import ConfigError, DataError, StorageError
from critrm.types import NO_CRITIC, RunManifest

R = TypeVar("R")


Rows = Iterator[tuple[int, dict[str, Any]]]
OnBad = Callable[[DataError], None]


def _raise(error: DataError) -> None:
    raise error


def read_rows(path: str | Path, *, on_bad: OnBad = _raise) -> Rows:
    """Yield (1-based line or row number, row) of a JSONL, JSON or Parquet file; `.gz` is read as it stands.

    Args:
        path: the file; its name says the format.
        on_bad: is given the error of each line that is not a JSON object; when it returns, reading goes on.

    Raises:
        DataError: the file is missing, empty or malformed; names the file and line.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError("this is a folder; name a file in it", path=str(path))
    if not path.is_file():
        raise DataError("no such file", path=str(path))
    if path.stat().st_size == 0:
        raise DataError("the file is empty", path=str(path))
    name = path.name.removesuffix(".gz")
    rows = _parquet_rows(path) if name.endswith(".parquet") else _json_rows(path, name, on_bad)
    empty = True
    for item in rows:
        empty = False
        yield item
    if empty:
        raise DataError("the file holds no rows", path=str(path))


def _json_rows(path: Path, name: str, on_bad: OnBad) -> Rows:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            if name.endswith(".json"):
                yield from _json_array(file.read(), path, on_bad)
            else:
                yield from _json_lines(file, path, on_bad)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"not a readable gzip file ({error})", path=str(path)) from None


def _json_array(data: bytes, path: Path, on_bad: OnBad) -> Rows:
    try:
        rows = json.loads(data)
    except json.JSONDecodeError as error:
        # A .json file that is really JSONL is common in the field.
        if error.msg != "Extra data":
            raise DataError(f"malformed JSON: {error.msg}", path=str(path), line=error.lineno) from None
        yield from _json_lines(data.split(b"\n"), path, on_bad)
        return
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON text ({error})", path=str(path)) from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if isinstance(row, dict):
            yield number, row
        else:
            on_bad(DataError("each row must be a JSON object", path=str(path), line=number))


def _json_lines(lines: Iterable[bytes], path: Path, on_bad: OnBad) -> Rows:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            reason = "" if isinstance(row, dict) else "each line must be a JSON object"
        except json.JSONDecodeError as error:
            reason = f"malformed JSON: {error.msg} at column {error.colno}"
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 text: {error.reason} at byte {error.start}"
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            reason = f"malformed JSON: {error}"
        if reason:
            on_bad(DataError(reason, path=str(path), line=number))
        else:
            yield number, row


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a readable Parquet file ({error})", path=str(path)) from None


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn a full or read-only disk into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write ({error.strerror or error}). Free space or choose another folder."
        ) from error
    except sqlite3.OperationalError as error:
        raise StorageError(f"{path}: cannot write ({error}). Free space or choose another folder.") from error


def write_text(path: str | Path, text: str | Iterable[str]) -> None:
    """Replace a file atomically, by a text or by its parts as they come.

    Raises:
        StorageError: the disk is full or read-only; the old file is untouched.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(beside, "w", encoding="utf-8", newline="\n") as file:
                file.writelines([text] if isinstance(text, str) else text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def to_json(record: object) -> str:
    """One record or mapping as one line of JSON."""
    plain = dataclasses.asdict(record) if dataclasses.is_dataclass(record) and not isinstance(record, type) else record
    line = json.dumps(plain, ensure_ascii=False, allow_nan=True)
    # A reply may be cut inside an emoji; half of one has no UTF-8 form, its JSON escape has.
    return line if _is_utf8(line) else json.dumps(plain, allow_nan=True)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_records(path: str | Path, records: Iterable[object]) -> int:
    """Write records (or mappings) as JSONL and return how many.

    Raises:
        StorageError: the disk is full or read-only; the old file is untouched.
    """
    n_records = 0

    def lines() -> Iterator[str]:
        nonlocal n_records
        for record in records:
            n_records += 1
            yield to_json(record) + "\n"

    # Line by line: all lines together would take more memory than the records do.
    write_text(path, lines())
    return n_records


def from_json(record_type: type[R], value: Any) -> R:
    """Rebuild a record from its JSON form, nested records and tuples included."""
    return typing.cast(R, _build(record_type, value))


@functools.cache
def _hints(record_type: type) -> dict[str, Any]:
    return typing.get_type_hints(record_type)


def _build(annotation: Any, value: Any) -> Any:
    if annotation in (str, float, int):  # most fields by far
        return value
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        hints = _hints(annotation)
        return annotation(**{name: _build(hints[name], item) for name, item in value.items() if name in hints})
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        return None if value is None else _build(inner[0], value)
    if origin is tuple:
        return tuple(_build(args[0], item) for item in value)
    if origin is dict:
        return {name: _build(args[1], item) for name, item in value.items()}
    return value


def read_records(path: str | Path, record_type: type[R]) -> list[R]:
    """Read a JSONL file that `write_records` wrote.

    Raises:
        DataError: a row lacks a field or is malformed; names file and line.
    """
    records = []
    for number, row in read_rows(path):
        try:
            records.append(from_json(record_type, row))
        except (TypeError, AttributeError, KeyError) as error:
            raise DataError(f"not a {record_type.__name__} ({error})", path=str(path), line=number) from None
    return records


def file_name(critic: str) -> str:
    """A critic's name as a file or folder name: model names hold slashes and colons."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in critic).strip(".") or "critic"


def refuse_same_folders(names: Iterable[str]) -> None:
    """Each critic's files lie in a folder called like it, as far as folders can be.

    Raises:
        ConfigError: two critics would share one, or a critic that of the No-Critiques arm.
    """
    taken = {NO_CRITIC: NO_CRITIC}
    for name in names:
        folder = file_name(name).lower()
        if folder in taken:
            raise ConfigError(f"critics {taken[folder]!r} and {name!r} would share the folder {folder!r}: rename one")
        taken[folder] = name


def content_hash(*parts: object) -> str:
    """A short stable hash of JSON-able parts."""
    data = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_is_done(folder: str | Path, fingerprint: str) -> bool:
    """Whether a stage with this fingerprint (config and inputs) finished in this folder."""
    marker = Path(folder) / "done.json"
    try:
        return bool(json.loads(marker.read_text(encoding="utf-8"))["fingerprint"] == fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def mark_stage_done(folder: str | Path, fingerprint: str, **facts: object) -> None:
    """Write the marker that `stage_is_done` reads; the last thing a stage does."""
    write_text(Path(folder) / "done.json", json.dumps({"fingerprint": fingerprint, **facts}, indent=2) + "\n")


def write_manifest(
    folder: str | Path,
    *,
    config: Mapping[str, object],
    started: float,
    inputs: Iterable[str | Path] = (),
    seeds: Iterable[int] = (),
    cost: float = 0.0,
    notes: Iterable[str] = (),
    name: str = "manifest.json",
) -> RunManifest:
    """Write `manifest.json`: what produced this folder (or one file), so that somebody else can produce it again."""
    packages = ("critrm", "torch", "transformers", "accelerate", "peft", "datasets", "openai", "numpy", "scipy")
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    manifest = RunManifest(
        command=_without_secrets(" ".join(["critrm", *sys.argv[1:]])),
        config=dict(config),
        versions=versions,
        seeds=tuple(seeds),
        inputs={str(path): file_hash(path) for path in inputs if Path(path).is_file()},
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 1),
        cost=cost,
        notes=tuple(notes),
    )
    write_text(Path(folder) / name, json.dumps(dataclasses.asdict(manifest), indent=2, default=str) + "\n")
    return manifest


def _without_secrets(command: str) -> str:
    """A command without what may be keys: the user names, passwords and queries of URLs."""
    return re.sub(r"(https?://)(?:[^\s/,@]*@)?([^\s,?]*)(?:\?[^\s,]*)?", r"\1\2", command)
