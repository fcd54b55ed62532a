"""What an evaluation writes and reads again: rewards, one row per pair, and results."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from critrm.errors import DataError
from critrm.store import from_json, read_rows
from critrm.types import SIDES, EvalResult, Score


def score_row(score: Score, subset: str, key: str) -> dict[str, object]:
    """A pair's rewards as a row; `key` says what they were computed from."""
    # JSON has no not-a-number: null, which read_scores takes for it, keeps the file readable by other tools.
    chosen, rejected = (None if math.isnan(reward) else reward for reward in (score.chosen, score.rejected))
    rewards = {"chosen": chosen, "rejected": rejected}
    return {"pair_id": score.pair_id, "subset": subset, **rewards, "outcome": score.outcome.value, "key": key}


def saved_scores(path: Path) -> dict[str, Score]:
    """Key -> rewards of an earlier run; empty where there is none that can be read, since it is then made anew."""
    try:
        return {str(row.get("key")): _score(row) for _, row in read_rows(path)}
    except (DataError, KeyError, TypeError, ValueError):
        return {}


def _score(row: Mapping[str, Any]) -> Score:
    chosen, rejected = (math.nan if row[side] is None else float(row[side]) for side in SIDES)
    return Score(str(row["pair_id"]), chosen, rejected)


def read_scores(path: str | Path) -> list[Score]:
    """Read the rewards that `evaluate` wrote.

    Raises:
        DataError: a row lacks a field; names file and line.
    """
    scores = []
    for number, row in read_rows(path):
        try:
            scores.append(_score(row))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a score ({error})", path=str(path), line=number) from None
    return scores


def read_result(path: str | Path) -> EvalResult:
    """Read the result that `evaluate` wrote.

    Raises:
        DataError: the file is missing, or no result.
    """
    rows = list(read_rows(path))
    try:
        return from_json(EvalResult, rows[0][1])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a result of an evaluation ({error})", path=str(path)) from None
