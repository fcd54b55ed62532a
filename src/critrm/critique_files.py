"""Critiques in: files that critrm wrote, and existing critiques by pair id and side -> Critique."""

from pathlib import Path
from typing import Any

from critrm.errors import DataError
from critrm.store import content_hash, read_rows
from critrm.types import SIDES, Critique, Side


def read_critiques(path: str | Path, *, critic: str | None = None) -> list[Critique]:
    """Read critiques that critrm wrote, or existing ones by pair id and side.

    Args:
        path: rows with `pair_id`, `side` and `critique` (or `text`); optional `score` and `critic`.
        critic: the critic's name; else the rows' own, else the file's.

    Raises:
        DataError: a row lacks a field, names an unknown side, is empty or repeated; names file, line and field.
    """
    # `gpt-4.1.jsonl.gz` is by gpt-4.1.
    stem = Path(Path(path).name.removesuffix(".gz")).stem
    rows: list[Critique] = []
    seen: set[tuple[str, str, Side]] = set()
    for number, row in read_rows(path):
        try:
            critique = _read_row(row, critic or str(row.get("critic") or stem))
        except DataError as error:
            raise DataError(error.reason, path=str(path), line=number, field=error.field) from None
        place = (critique.critic, critique.pair_id, critique.side)
        if place in seen:
            reason = f"a second critique of {place[1]!r}, {place[2]}: keep one"
            raise DataError(reason, path=str(path), line=number, field="pair_id")
        seen.add(place)
        rows.append(critique)
    return rows


def _read_row(row: dict[str, Any], critic: str) -> Critique:
    pair_id, side, score = row.get("pair_id"), row.get("side"), row.get("score")
    if not isinstance(pair_id, (str, int)) or isinstance(pair_id, bool) or pair_id == "":
        raise DataError("missing: which pair is it about?", field="pair_id")
    if side not in SIDES:
        raise DataError(f"must be 'chosen' or 'rejected', not {side!r}", field="side")
    name = "critique" if "critique" in row else "text" if "text" in row else "critique"
    text, failure = row.get(name), str(row.get("failure") or "")
    if not isinstance(text, str):
        raise DataError("missing: it must be text", field=name)
    if not text.strip() and not failure:
        raise DataError("empty: leave the row out, or give the reason of a failed call in 'failure'", field=name)
    if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
        raise DataError(f"must be a number, not {score!r}", field="score")
    return Critique(
        key=str(row.get("key") or content_hash("imported", critic, pair_id, side, text)),
        pair_id=str(pair_id),
        side=side,
        text=text.strip(),
        critic=critic,
        prompt_version=str(row.get("prompt_version") or ""),
        n_prompt_tokens=int(_number(row, "n_prompt_tokens")),
        n_completion_tokens=int(_number(row, "n_completion_tokens")),
        cost=_number(row, "cost"),
        seconds=_number(row, "seconds"),
        finish_reason=str(row.get("finish_reason") or ""),
        score=score,
        failure=failure,
    )


def _number(row: dict[str, Any], name: str) -> float:
    try:
        return float(row.get(name) or 0)
    except (TypeError, ValueError):
        raise DataError(f"must be a number, not {row[name]!r}", field=name) from None
