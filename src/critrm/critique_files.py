"""Critiques in: files that critrm wrote, existing critiques by pair id and side, and files with pairs and critiques."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from critrm.critique_dialects import CRITIQUE_DIALECTS, Group, pairs_of
from critrm.dialects import Fields, NoPreference, checked_text
from critrm.errors import ConfigError, DataError
from critrm.store import read_rows
from critrm.types import SIDES, Critique, PreferencePair, Side

OWN = "critrm"
"""The dialect of critiques by pair id and side."""


def read_critiques(path: str | Path, *, critic: str | None = None, dialect: str = "auto") -> list[Critique]:
    """Read critiques that critrm wrote, existing ones by pair id and side, or those of a file with pairs.

    Args:
        path: rows with `pair_id`, `side` and `critique` (or `text`); optional `sample`, `score` and `critic`. Or a
            judge's verdicts with critiques; or a file of a dialect that holds the pairs too, see `critiqued_pairs`.
        critic: the critic's name; else the rows' own, else the file's.
        dialect: `critrm`, or one of `CRITIQUE_DIALECTS`; `auto` goes by the columns of the first row.

    Raises:
        DataError: a row lacks a field, names an unknown side, is empty or repeated; names file, line and field.
        ConfigError: no such dialect.
    """
    if _dialect(path, dialect) != OWN:
        return critiqued_pairs(path, critic=critic, dialect=dialect)[1]
    rows: list[Critique] = []
    # By few keys with many ids, which the rows hold anyway: a tuple for each row would be a tenth of the memory.
    seen: dict[tuple[str, Side, int], set[str]] = {}
    for number, row in read_rows(path):
        try:
            critique = _read_row(row, critic or _critic_of(row) or _stem(path))
        except DataError as error:
            raise DataError(error.reason, path=str(path), line=number, field=error.field) from None
        ids = seen.setdefault((critique.critic, critique.side, critique.sample), set())
        if critique.pair_id in ids:
            which = f"{critique.pair_id!r}, {critique.side}, sample {critique.sample}"
            reason = f"a second critique of {which}: keep one, or number them in 'sample'"
            raise DataError(reason, path=str(path), line=number, field="pair_id")
        ids.add(critique.pair_id)
        rows.append(critique)
    return rows


def critiques_by_one(path: str | Path, *, critic: str | None = None) -> tuple[str, list[Critique]]:
    """`read_critiques` of a file that holds those of one critic, and the critic's name.

    Raises:
        DataError: as `read_critiques`, or there are several critics.
    """
    rows = read_critiques(path, critic=critic)
    names = sorted({row.critic for row in rows})
    if len(names) > 1:
        raise DataError(
            f"critiques by {names}: make a file of each, or call them all one with --critic",
            path=str(path),
            field="critic",
        )
    return names[0], rows


def _stem(path: str | Path) -> str:
    """`gpt-4.1.jsonl.gz` is by gpt-4.1."""
    return Path(Path(path).name.removesuffix(".gz")).stem


def _dialect(path: str | Path, dialect: str) -> str:
    if dialect == "auto":
        row = next(iter(read_rows(path)))[1]
        own = "pair_id" in row or "side" in row
        return OWN if own else next((name for name, (matches, _) in CRITIQUE_DIALECTS.items() if matches(row)), OWN)
    if dialect != OWN and dialect not in CRITIQUE_DIALECTS:
        raise ConfigError(f"no dialect {dialect!r} of critiques; there is auto, {OWN}, {', '.join(CRITIQUE_DIALECTS)}")
    return dialect


def _read_row(row: dict[str, Any], critic: str) -> Critique:
    pair_id, side, sample = row.get("pair_id"), row.get("side"), row.get("sample", 0)
    # A judge's verdicts are read as well: its rating is the score of the critique that it wrote, or was given.
    grade = "likert" if _is_verdict(row) else "score"
    score = row.get(grade)
    if not isinstance(pair_id, (str, int)) or isinstance(pair_id, bool) or pair_id == "":
        raise DataError("missing: which pair is it about?", field="pair_id")
    if side not in SIDES:
        raise DataError(f"must be 'chosen' or 'rejected', not {side!r}", field="side")
    name = "critique" if "critique" in row else "text" if "text" in row else "critique"
    text, failure = row.get(name), str(row.get("failure") or "")
    if _is_verdict(row) and text == "":
        failure = str(row.get("unscored") or "")
        if not failure:
            raise DataError("a rating alone: run `critrm judge --with-critique` for critiques with ratings", field=name)
    if not isinstance(text, str):
        raise DataError("missing: it must be text", field=name)
    if not text.strip() and not failure:
        raise DataError("empty: leave the row out, or give the reason of a failed call in 'failure'", field=name)
    if score is not None and not _is_finite(score):
        raise DataError(f"must be a finite number, not {score!r:.60}", field=grade)
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 0:
        raise DataError(f"must be a whole number from 0, not {sample!r}", field="sample")
    return Critique(
        key=str(row.get("key") or ""),
        pair_id=str(pair_id),
        side=SIDES[SIDES.index(side)],  # one string for all rows, not one per row
        text=text.strip(),
        critic=critic,
        prompt_version=str(row.get("prompt_version") or ""),
        sample=sample,
        n_prompt_tokens=int(_number(row, "n_prompt_tokens")),
        n_completion_tokens=int(_number(row, "n_completion_tokens")),
        cost=_number(row, "cost"),
        seconds=_number(row, "seconds"),
        finish_reason=str(row.get("finish_reason") or ""),
        score=score,
        failure=failure,
    )


def _is_verdict(row: dict[str, Any]) -> bool:
    return "likert" in row and "score" not in row


def _critic_of(row: dict[str, Any]) -> str:
    return str(row.get("critic") or (row.get("judge") if _is_verdict(row) else "") or "")


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of 400 digits
        return False


def _number(row: dict[str, Any], name: str) -> float:
    try:
        return float(row[name]) if row.get(name) else 0.0
    except (TypeError, ValueError):
        raise DataError(f"must be a number, not {row[name]!r}", field=name) from None


def critiqued_pairs(
    path: str | Path, *, critic: str | None = None, dialect: str = "auto"
) -> tuple[tuple[PreferencePair, ...], list[Critique]]:
    """Read a file that holds preference pairs, or graded responses, together with their critiques.

    Of several graded responses to one prompt each two with unequal grades become a pair. Several critiques of a
    response by the same critic become samples.

    Args:
        path: a file of one of `CRITIQUE_DIALECTS`.
        critic: the critic's name; else the rows' own, else the file's.
        dialect: which of them; `auto` goes by the columns of the first row.

    Raises:
        DataError: a row cannot be used (names file, line and field), or the file holds no pair.
        ConfigError: no such dialect.
    """
    dialect = _dialect(path, dialect)
    if dialect == OWN:
        raise DataError(
            f"its columns are those of no file with pairs and critiques ({', '.join(CRITIQUE_DIALECTS)})",
            path=str(path),
        )
    pairs: dict[str, PreferencePair] = {}
    critiques: list[Critique] = []
    for number, row, group in _groups(path, dialect):
        name = critic or group.critic or _stem(path)
        for better, worse in pairs_of(group.responses):
            base = _row_id(row, path, number)
            pair_id = base if group.is_pair else f"{base}-{min(better, worse)}-{max(better, worse)}"
            if pair_id in pairs and not group.is_pair:
                pair_id = f"{pair_id}-{name}"  # another critic of the same responses
            if pair_id in pairs:
                raise DataError(f"a second pair with this id: {pair_id!r:.80}", path=str(path), line=number, field="id")
            pairs[pair_id] = _pair(pair_id, row, group, better, worse)
            critiques += _critiques(pair_id, group, name, better, worse)
    if not pairs:
        raise DataError("no two responses to one prompt have unequal grades, so there is no pair in it", path=str(path))
    return tuple(pairs.values()), critiques


def _groups(path: str | Path, dialect: str) -> Iterator[tuple[int, Fields, Group]]:
    """The groups of a file with their first rows and line numbers; rows with one response each are put together."""
    together: dict[tuple[object, str], tuple[int, Fields, Group]] = {}
    for number, row in read_rows(path):
        try:
            group = CRITIQUE_DIALECTS[dialect][1](row)
            if any(not response.text.strip() for response in group.responses):
                raise DataError("an empty response", field="response")
            if not group.prompt or not group.prompt[-1].content.strip():
                raise DataError("empty", field="prompt")
        except NoPreference:
            continue
        except (DataError, KeyError) as error:
            reason, field = (
                (error.reason, error.field) if isinstance(error, DataError) else ("missing", str(error.args[0]))
            )
            raise DataError(reason, path=str(path), line=number, field=field) from None
        if not group.key:
            yield number, row, group
            continue
        place = (group.prompt, group.key)
        if place in together:
            start, first, found = together[place]
            together[place] = start, first, replace(found, responses=found.responses + group.responses)
        else:
            together[place] = number, row, group
    yield from together.values()


def _row_id(row: Fields, path: str | Path, number: int) -> str:
    """The row's own id, else file and line: the same that `read_pairs` gives."""
    own = next((row[name] for name in ("id", "pair_uid", "idx") if row.get(name) not in (None, "")), None)
    return str(own) if isinstance(own, (str, int)) else f"{Path(path).name.partition('.')[0]}-{number:05d}"


def _pair(pair_id: str, row: Fields, group: Group, better: int, worse: int) -> PreferencePair:
    labels = {name: row[name] for name in ("source", "subset", "split") if isinstance(row.get(name), str)}
    return PreferencePair(
        id=checked_text(pair_id, "id"),
        prompt=group.prompt,
        chosen=group.responses[better].text,
        rejected=group.responses[worse].text,
        **labels,
    )


def _critiques(pair_id: str, group: Group, critic: str, better: int, worse: int) -> Iterator[Critique]:
    for side, position in zip(SIDES, (better, worse), strict=True):
        response = group.responses[position]
        for sample, (text, score) in enumerate(zip(response.critiques, response.scores, strict=True)):
            yield Critique(
                key="",
                pair_id=pair_id,
                side=side,
                text=text.strip(),
                critic=critic,
                prompt_version="",
                sample=sample,
                score=score,
            )
