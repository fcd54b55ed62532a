"""Preference pairs in: hub ids, local files, the field's column dialects -> PreferencePair (section 4.1, Appendix B).

Which dialect a file is written in shows in its columns; `dialects.py` reads each of them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from critrm.critique_files import critiqued_pairs
from critrm.dialects import DIALECTS, Fields, NoPreference, bad_field, checked_text, text_field
from critrm.errors import ConfigError, DataError
from critrm.list_dialects import LIST_DIALECTS, RMB_LISTS, rmb_lists
from critrm.store import Rows, read_rows, write_records
from critrm.types import RATINGS, SIDES, PreferencePair, Rating

LABELS = ("source", "subset", "split")


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRow:
    """A row that became no pair, and why: a short reason, then perhaps `: detail`."""

    path: str
    line: int | None
    field: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """The pairs of a file, and the rows that became none."""

    pairs: tuple[PreferencePair, ...]
    skipped: tuple[SkippedRow, ...]
    dialect: str
    n_filtered: int = 0
    """Rows of another split, source or subset than asked for."""


def read_pairs(
    path: str | Path,
    *,
    dialect: str = "auto",
    split: str = "",
    source: str = "",
    subset: str = "",
    limit: int | None = None,
    skip_bad: bool = False,
    allow_empty: bool = False,
) -> PairSet:
    """Read preference pairs in any of the field's dialects.

    Args:
        path: a JSONL, JSON or Parquet file (`.gz` too), or a hub id `owner/name`.
        dialect: one of `DIALECTS` or `LIST_DIALECTS`, or `rmb-lists`, which makes lists of RMB's pairs; `auto` goes by
            the columns of the first row.
        split: only rows of these splits, comma separated; of a hub id, the splits to load (`train` by default).
        source: only rows of these sources, comma separated.
        subset: only rows of these subsets, comma separated.
        limit: stop after so many pairs; a list of completions is not split.
        skip_bad: collect rows that cannot be used in `skipped` instead of raising at the first. Ties are always there.
        allow_empty: keep empty completions and identical pairs. For test sets, whose published counts hold them: an
            empty completion is an answer that can be scored, and an identical pair is a tie.

    Raises:
        DataError: a row cannot be used; names file, line and field. Or no pair is left.
        ConfigError: no such dialect, or a limit below 1.
    """
    if dialect not in (known := ("auto", *DIALECTS, *LIST_DIALECTS, RMB_LISTS)):
        raise ConfigError(f"no dialect {dialect!r}; there is {', '.join(known)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit must be at least 1, not {limit}")
    skipped: list[SkippedRow] = []

    def on_bad(error: DataError) -> None:
        if not skip_bad:
            reason = f"{error.reason}. Correct the row, or leave such rows out with skip_bad (--skip-bad)."
            raise DataError(reason, path=error.path, line=error.line, field=error.field)
        skipped.append(SkippedRow(path=error.path, line=error.line, field=error.field, reason=error.reason))

    pairs: dict[str, PreferencePair] = {}
    n_filtered = 0
    rows = _rows(str(path), _names(split), on_bad)
    if dialect == RMB_LISTS:
        rows, dialect = rmb_lists(rows), "rmb-best-of-n"
    filters = {"split": _names(split), "source": _names(source), "subset": _names(subset)}
    for number, row in rows:
        if dialect == "auto":
            dialect = _recognise(row, str(path), number)
        try:
            parts = _fields(row, dialect, f"{Path(path).name.partition('.')[0]}-{number:05d}")
            asked = [
                each for each in parts if all(not want or each.get(name) in want for name, want in filters.items())
            ]
            n_filtered += len(parts) - len(asked)
            found = {pair.id: pair for pair in (_pair(fields, allow_empty=allow_empty) for fields in asked)}
            if repeated := found.keys() & pairs.keys():
                raise bad_field("id", f"a second pair with this id: {min(repeated)!r:.80}")
            pairs |= found  # all pairs of a list, or none
        except NoPreference as tie:
            skipped.append(SkippedRow(path=str(path), line=number, field="", reason=str(tie)))
        except DataError as error:
            on_bad(DataError(error.reason, path=str(path), line=number, field=error.field))
        if limit is not None and len(pairs) >= limit:
            break
    if not pairs:
        filtered = " and ".join(f"{name} {', '.join(wanted)}" for name, wanted in filters.items() if wanted)
        why = f"{n_filtered} rows are not of {filtered}; " if n_filtered else ""
        raise DataError(f"no pair is left; {why}{len(skipped)} rows skipped{_reasons(skipped)}", path=str(path))
    return PairSet(pairs=tuple(pairs.values()), skipped=tuple(skipped), dialect=dialect, n_filtered=n_filtered)


def _reasons(skipped: list[SkippedRow]) -> str:
    counts = Counter(_kind(row) for row in skipped).most_common(3)
    return f" ({'; '.join(f'{count} {kind}' for kind, count in counts)})" if counts else ""


def _kind(row: SkippedRow) -> str:
    """What skipped rows are counted by: the field, and the reason without its detail."""
    return ": ".join(part for part in (row.field, row.reason.partition(": ")[0]) if part)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _rows(path: str, splits: tuple[str, ...], on_bad: Callable[[DataError], None]) -> Rows:
    is_data_file = path.endswith((".gz", ".jsonl", ".json", ".parquet")) or Path(path).is_file()
    if is_data_file or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        return read_rows(path, on_bad=on_bad)
    return _hub_rows(path, splits or ("train",))


def _hub_rows(name: str, splits: tuple[str, ...]) -> Rows:
    import datasets

    number = 0
    for split in splits:
        try:
            loaded = datasets.load_dataset(name, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = f"no such file, and no data set of the hub whose split {split!r} can be loaded"
            raise DataError(f"{reason} ({error.__cause__ or error})", path=name) from error
        for row in loaded:
            number += 1
            yield number, {"split": split} | row  # a `split` column of its own counts


def _recognise(row: Fields, path: str, number: int) -> str:
    for name, (matches, _) in (LIST_DIALECTS | DIALECTS).items():
        if matches(row):
            return name
    known = ", ".join([*LIST_DIALECTS, *DIALECTS])
    raise DataError(f"columns {sorted(row)} are those of no dialect ({known})", path=path, line=number)


def _fields(row: Fields, dialect: str, default_id: str) -> list[Fields]:
    """The fields of each pair of a row, with its id."""
    if dialect not in LIST_DIALECTS:
        fields = row | DIALECTS[dialect][1](row)
        return [fields | {"id": _own_id(fields, default_id)}]
    parts = [row | part for part in LIST_DIALECTS[dialect][1](row)]
    return [part | {"id": f"{checked_text(_own_id(part, default_id), 'id')}#{n}"} for n, part in enumerate(parts)]


def _own_id(fields: Fields, default_id: str) -> object:
    """The row's id as it stands there; numbers as text."""
    ids = [fields[name] for name in ("id", "pair_uid", "idx") if fields.get(name) not in (None, "")]
    own_id = ids[0] if ids else default_id
    return str(own_id) if isinstance(own_id, int) and not isinstance(own_id, bool) else own_id


def _pair(fields: Fields, *, allow_empty: bool) -> PreferencePair:
    prompt = fields["prompt"]
    if not prompt or not prompt[-1].content.strip():
        raise bad_field("prompt", "empty")
    if prompt[-1].role != "user":
        raise bad_field("prompt", "must end with the user's turn")
    for side in SIDES:
        if not allow_empty and not fields[side].strip():
            raise bad_field(side, "empty")
    if not allow_empty and fields["chosen"].strip() == fields["rejected"].strip():
        raise bad_field("rejected", "identical to the chosen completion")
    labels = {name: "" if fields.get(name) is None else text_field(fields, name) for name in LABELS}
    return PreferencePair(
        id=checked_text(fields["id"], "id"),
        prompt=prompt,
        chosen=fields["chosen"],
        rejected=fields["rejected"],
        rating=_rating(fields.get("rating")),
        margin=_margin(fields.get("margin")),
        **labels,
    )


def _rating(value: object) -> Rating | None:
    if value is None or value == "" or value != value:  # not-a-number is how pandas writes null
        return None
    if isinstance(value, str):
        value = " ".join(value.lower().replace("_", " ").split())
    if isinstance(value, bool) or value not in (*RATINGS, 1, 2, 3):
        raise bad_field("rating", f"must be {', '.join(RATINGS)} or 1 to 3: {value!r:.60}")
    return RATINGS[(*RATINGS, 1, 2, 3).index(value) % 3]


def _margin(value: object) -> float | None:
    if value is None:
        return None
    # Compared, not converted: JSON's integers may be too long for a float. Not-a-number is in no interval.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        raise bad_field("margin", f"must be a finite number: {value!r:.60}")
    return float(value)


def command(
    pairs: str,
    *,
    out: Path | None = None,
    dialect: str = "auto",
    split: str = "",
    source: str = "",
    subset: str = "",
    limit: int | None = None,
    skip_bad: bool = False,
    allow_empty: bool = False,
    critiques_out: Path | None = None,
) -> None:
    """Read preference pairs in any of the field's formats, check them and show what they are.

    Args:
        pairs: a JSONL, JSON or Parquet file, or a hub id.
        out: write the pairs in critrm's columns here (.jsonl), and the skipped rows beside it (.skipped.jsonl).
        dialect: the format; told from the columns when not given.
        split: only rows of these splits, comma separated; of a hub id, the splits to load.
        source: only rows of these sources, comma separated.
        subset: only rows of these subsets, comma separated.
        limit: stop after so many pairs.
        skip_bad: leave out rows that cannot be used instead of stopping at the first.
        allow_empty: keep empty completions and identical pairs, as the published counts of benchmarks do.
        critiques_out: of a file that holds responses with critiques: write the critiques here, the pairs to --out.
    """
    if out is not None and (out.suffix != ".jsonl" or out.resolve() == Path(pairs).resolve()):
        raise ConfigError(f"--out {out}: name a .jsonl file that is not the input")
    console = Console()
    if critiques_out is not None:
        if out is None or split or source or subset or limit or skip_bad:
            raise ConfigError("--critiques-out needs --out, and takes the whole file: no filter, limit or --skip-bad")
        made, critiques = critiqued_pairs(pairs, dialect=dialect)
        write_records(out, made)
        write_records(critiques_out, critiques)
        counts = f"{len(made)} pairs: {out}\n{len(critiques)} critiques: {critiques_out}"
        console.print(counts, soft_wrap=True, markup=False)
        return
    found = read_pairs(
        pairs,
        dialect=dialect,
        split=split,
        source=source,
        subset=subset,
        limit=limit,
        skip_bad=skip_bad,
        allow_empty=allow_empty,
    )
    console.print(_counts(found))
    console.print(_lengths(found.pairs))
    if out is not None:
        ledger = out.with_suffix(".skipped.jsonl")
        write_records(out, found.pairs)
        write_records(ledger, found.skipped)
        console.print(f"Pairs: {out}\nSkipped rows: {ledger}", soft_wrap=True, markup=False)


def _counts(found: PairSet) -> Table:
    """Everything a reader wants to see before money is spent; names of the user's data are `Text`, never markup."""
    table = Table(title=f"{len(found.pairs)} pairs, dialect {found.dialect}")
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_row("read", str(len(found.pairs) + len(found.skipped) + found.n_filtered))
    if found.n_filtered:
        table.add_row("of another split, source or subset", str(found.n_filtered))
    for title, counts in (
        ("skipped", Counter(_kind(row) for row in found.skipped)),
        ("split", Counter(pair.split for pair in found.pairs if pair.split)),
        ("source", Counter(pair.source for pair in found.pairs if pair.source)),
        ("subset", Counter(pair.subset for pair in found.pairs if pair.subset)),
        ("rating", Counter(pair.rating for pair in found.pairs if pair.rating)),
    ):
        for name, count in counts.most_common(30):
            table.add_row(Text(f"{title}: {name}"), str(count))
        if len(counts) > 30:
            table.add_row(f"{title}: {len(counts) - 30} more", str(sum(sorted(counts.values())[:-30])))
    n_longer = sum(len(pair.chosen.split()) > len(pair.rejected.split()) for pair in found.pairs)
    table.add_row("chosen is the longer one, in words", f"{n_longer / len(found.pairs):.1%}")
    return table


def _lengths(pairs: Sequence[PreferencePair]) -> Table:
    texts = {"prompt": [" ".join(message.content for message in pair.prompt) for pair in pairs]}
    texts |= {side: [pair.completion(side) for pair in pairs] for side in SIDES}
    words = {name: [len(text.split()) for text in column] for name, column in texts.items()}
    table = Table(title="lengths in words")
    for title in ("", "median", "90 %", "longest"):
        table.add_column(title, justify="right" if title else "left")
    for name, column in words.items():
        ordered = sorted(column)
        table.add_row(name, *(str(ordered[math.ceil(share * len(ordered)) - 1]) for share in (0.5, 0.9, 1.0)))
    return table
