"""What an attribution writes and reads again: the effect of each sentence of each critique, one row per critique."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from critrm.errors import DataError
from critrm.store import from_json, read_rows, write_records
from critrm.types import Side


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceEffect:
    """A sentence of a critique, and what it did to the reward."""

    text: str
    """As it stands there, with the space after it: a critique's sentences put together are the critique."""
    aspect: str
    """One of `sentences.ASPECTS`, or `other`."""
    effect: float
    """The reward with the whole critique minus the reward without this sentence; a logit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """One critique, sentence by sentence."""

    pair_id: str
    side: Side
    critic: str
    reward: float
    """Of the completion with the whole critique."""
    reward_without: float
    """Of the completion with no critique at all."""
    sentences: tuple[SentenceEffect, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AspectTotal:
    """The effects of all sentences of one aspect, on one side."""

    aspect: str
    side: Side
    n_sentences: int
    n_pairs: int
    mean: float
    """Mean effect of a sentence."""
    low: float | None
    high: float | None
    """Ends of the mean's 95 % interval; None for a single pair."""
    mean_size: float
    """Mean of the effects' absolute values: how much such sentences matter, in whichever direction."""


def write_attributions(path: str | Path, attributions: Iterable[Attribution], *, keys: dict[str, str]) -> None:
    """Write one row per critique.

    Args:
        path: the file.
        attributions: the critiques' effects.
        keys: pair id -> what they were computed from.
    """
    rows = (dataclasses.asdict(each) | {"key": keys[each.pair_id]} for each in attributions)
    write_records(path, (_with_nulls(row) for row in rows))


def _with_nulls(value: Any) -> Any:
    """Numbers that JSON does not have as null."""
    if isinstance(value, dict):
        return {name: _with_nulls(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def saved_attributions(path: Path) -> dict[str, list[Attribution]]:
    """Key -> attributions of an earlier run; empty where there is none that can be read, since it is then made anew."""
    saved: dict[str, list[Attribution]] = {}
    try:
        for _, row in read_rows(path):
            saved.setdefault(str(row["key"]), []).append(_record(row))
    except (DataError, KeyError, TypeError, AttributeError):
        return {}
    return saved


def _record(row: dict[str, Any]) -> Attribution:
    """An attribution from its row, where null stands for not-a-number."""
    for values, names in ((row, ("reward", "reward_without")), *((each, ("effect",)) for each in row["sentences"])):
        for name in names:
            values[name] = math.nan if values[name] is None else values[name]
    return from_json(Attribution, row)


def read_attributions(path: str | Path) -> list[Attribution]:
    """Read `attribution.jsonl`.

    Raises:
        DataError: a row lacks a field; names file and line.
    """
    found = []
    for number, row in read_rows(path):
        try:
            found.append(_record(row))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not an attribution ({error})", path=str(path), line=number) from None
    return found
