"""Preference pairs in: hub ids, local files, and the field's column dialects -> PreferencePair (section 4.1, Appendix B).

A dialect is a plain function from a row to the fields of a pair; which one a file is written in shows in its columns.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from critrm.errors import ConfigError, DataError
from critrm.store import read_rows, write_records
from critrm.types import RATINGS, Message, PreferencePair

Fields = dict[str, Any]
TIE = "tie"
ROLES = {"Human": "user", "User": "user", "Assistant": "assistant", "Chatbot": "assistant"}
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRow:
    """A row that became no pair, and why."""

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


class _Tie(Exception):
    """Neither completion is preferred; counted, and never an error."""


def _bad(field: str, reason: str) -> DataError:
    return DataError(reason, field=field)


def _text(row: Fields, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise _bad(field, "missing" if value is None else f"must be text, not {type(value).__name__}")
    return value


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    """A conversation: message lists as they are, `Human:` / `Assistant:` transcripts by turns, other text as one turn."""
    if isinstance(value, str):
        return _transcript(value) or ((Message("user", value),) if value.strip() else ())
    if not isinstance(value, (list, tuple)):
        raise _bad(field, "missing" if value is None else "must be text or a list of messages")
    found = []
    for item in value:
        if not isinstance(item, dict) or item.get("role") not in ("system", "user", "assistant"):
            raise _bad(field, "each message needs a role (system, user or assistant) and a content")
        if not isinstance(item.get("content"), str):
            raise _bad(field, "each message needs a content that is text")
        found.append(Message(item["role"], item["content"]))
    return tuple(found)


def _transcript(text: str) -> tuple[Message, ...]:
    parts = TURN.split(text.lstrip("\n"))
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        return ()
    return tuple(Message(ROLES[role], said.strip()) for role, said in zip(parts[1::2], parts[2::2], strict=True))  # type: ignore[arg-type]


def _split_transcript(text: str, field: str) -> tuple[str, str]:
    """A whole dialogue -> what comes before its last answer, and that answer."""
    for mark in ("\n\nAssistant:", "## Assistant:"):
        before, found, answer = text.rpartition(mark)
        if found:
            return before.replace("## Human:", "\n\nHuman:").strip("\n"), answer.strip()
    raise _bad(field, "has no 'Assistant:' turn")


def _own(row: Fields) -> Fields:
    completions = {side: _completion(row.get(side), side) for side in ("chosen", "rejected")}
    return {"prompt": row.get("prompt"), **completions}


def _completion(value: Any, field: str) -> str:
    """Text, or a list of one assistant message."""
    if isinstance(value, str):
        return value
    messages = _messages(value, field)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise _bad(field, "must be text or a list of one assistant message")
    return messages[0].content


def _implicit(row: Fields) -> Fields:
    """TRL's implicit prompt: both conversations whole; what they share is the prompt."""
    chosen, rejected = (_messages(row.get(side), side) for side in ("chosen", "rejected"))
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise _bad(field, "must end with the assistant's message")
    if chosen[:-1] != rejected[:-1]:
        raise _bad("rejected", "its conversation differs from the chosen one's before the last message")
    prompt = [dataclasses.asdict(message) for message in chosen[:-1]]
    return {"prompt": prompt, "chosen": chosen[-1].content, "rejected": rejected[-1].content}


def _hh(row: Fields) -> Fields:
    """HH-RLHF: two transcripts with one prompt."""
    (prompt, chosen), (other, rejected) = (_split_transcript(_text(row, side), side) for side in ("chosen", "rejected"))
    if prompt != other:
        raise _bad("rejected", "its transcript differs from the chosen one's before the last answer")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _dsp(row: Fields) -> Fields:
    texts, scores = row.get("text"), row.get("score")
    if not isinstance(texts, list) or len(texts) != 2:
        raise _bad("text", "must be a list of two transcripts")
    if not isinstance(scores, list) or len(scores) != 2 or not all(isinstance(s, (int, float)) for s in scores):
        raise _bad("score", "must be a list of two numbers")
    if scores[0] == scores[1]:
        raise _Tie
    order = (0, 1) if scores[0] > scores[1] else (1, 0)
    return _hh({"chosen": texts[order[0]], "rejected": texts[order[1]]})


def _by_label(prompt: str, first: str, second: str, label: Any, field: str) -> Fields:
    if label in (1, "1"):
        return {"prompt": prompt, "chosen": first, "rejected": second}
    if label in (2, "2"):
        return {"prompt": prompt, "chosen": second, "rejected": first}
    raise _bad(field, f"must be 1 or 2, not {label!r}")


def _llmbar(row: Fields) -> Fields:
    return _by_label(_text(row, "input"), _text(row, "output_1"), _text(row, "output_2"), row.get("label"), "label")


def _pandalm(row: Fields) -> Fields:
    """PandaLM: the majority of three annotators; 0 is a tie, and so is no majority."""
    votes = [row.get(f"annotator{n}") for n in (1, 2, 3)]
    if any(vote not in (0, 1, 2) for vote in votes):
        raise _bad("annotator1", f"the annotators' votes must be 0, 1 or 2, not {votes}")
    label, count = Counter(votes).most_common(1)[0]
    if count < 2 or label == 0:
        raise _Tie
    given = row.get("input") or ""
    prompt = _text(row, "instruction") + (f"\n\n{given}" if given else "")
    return _by_label(prompt, _text(row, "response1"), _text(row, "response2"), label, "annotator1")


def _ultrafeedback(row: Fields) -> Fields:
    scores = row["metadata"]
    if scores.get("score_chosen") == scores.get("score_rejected"):
        raise _Tie
    return _own(row)


def _rmb(row: Fields) -> Fields:
    answers = {}
    for side, column in (("chosen", "chosen"), ("rejected", "reject")):
        value = row.get(column)
        if not isinstance(value, dict):
            raise _bad(column, "must be an object with an answer")
        answers[side] = _text(value, "answer")
    return {"prompt": row.get("conversation_input"), "subset": row.get("category_path", ""), **answers}


DIALECTS: dict[str, tuple[Callable[[Fields], bool], Callable[[Fields], Fields]]] = {
    "llmbar": (lambda row: "output_1" in row and "label" in row, _llmbar),
    "pandalm": (lambda row: "response1" in row and "annotator1" in row, _pandalm),
    "dsp": (lambda row: "text" in row and "score" in row, _dsp),
    "rmb": (lambda row: "conversation_input" in row and "reject" in row, _rmb),
    "ultrafeedback": (
        lambda row: "prompt" in row and isinstance(row.get("metadata"), dict) and "score_chosen" in row["metadata"],
        _ultrafeedback,
    ),
    "critrm": (lambda row: "prompt" in row and "chosen" in row and "rejected" in row, _own),
    "trl-implicit": (lambda row: isinstance(row.get("chosen"), list) and "prompt" not in row, _implicit),
    "hh": (lambda row: isinstance(row.get("chosen"), str) and "prompt" not in row and "rejected" in row, _hh),
}
"""Name -> how a row of it is recognised, and how it is read. `critrm` also reads RewardBench's and TRL's columns."""


def read_pairs(
    path: str | Path,
    *,
    dialect: str = "auto",
    split: str = "",
    source: str = "",
    subset: str = "",
    limit: int | None = None,
    skip_bad: bool = False,
) -> PairSet:
    """Read preference pairs in any of the field's dialects.

    Args:
        path: a JSONL, JSON or Parquet file (`.gz` too), or a hub id `owner/name`.
        dialect: one of `DIALECTS`; `auto` goes by the columns of the first row.
        split: only rows of this split; of a hub id, the split that is loaded (`train` by default).
        source: only rows of these sources, comma separated.
        subset: only rows of these subsets, comma separated.
        limit: at most so many pairs.
        skip_bad: collect rows that cannot be used in `skipped` instead of raising at the first. Ties are always there.

    Raises:
        DataError: a row cannot be used; names file, line and field. Or no pair is left.
        ConfigError: no such dialect.
    """
    if dialect != "auto" and dialect not in DIALECTS:
        raise ConfigError(f"no dialect {dialect!r}; there is auto, {', '.join(DIALECTS)}")
    skipped: list[SkippedRow] = []

    def on_bad(error: DataError) -> None:
        if not skip_bad:
            raise error
        skipped.append(SkippedRow(path=error.path, line=error.line, field=error.field, reason=error.reason))

    pairs: dict[str, PreferencePair] = {}
    filters = [("split", _names(split)), ("source", _names(source)), ("subset", _names(subset))]
    for number, row in _rows(str(path), split, on_bad):
        if dialect == "auto":
            dialect = _recognise(row, str(path), number)
        if any(wanted and str(row.get(name) or "") not in wanted for name, wanted in filters if name in row):
            continue
        try:
            pair = _pair(row, dialect, f"{Path(path).name.partition('.')[0]}-{number:05d}")
            if pair.id in pairs:
                raise _bad("id", f"a second pair with the id {pair.id!r}")
            pairs[pair.id] = pair
        except _Tie:
            skipped.append(SkippedRow(path=str(path), line=number, field="", reason=TIE))
        except DataError as error:
            on_bad(DataError(error.reason, path=str(path), line=number, field=error.field))
        if limit is not None and len(pairs) == limit:
            break
    if not pairs:
        chosen = ", ".join(f"{name} {sorted(wanted)}" for name, wanted in filters if wanted)
        raise DataError(
            f"no pair is left{f' with {chosen}' if chosen else ''}; {len(skipped)} rows skipped", path=str(path)
        )
    return PairSet(pairs=tuple(pairs.values()), skipped=tuple(skipped), dialect=dialect)


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",") if name.strip()}


def _rows(path: str, split: str, on_bad: Callable[[DataError], None]) -> Iterator[tuple[int, Fields]]:
    if (
        Path(path).exists()
        or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path)
        or path.endswith((".gz", ".jsonl", ".json", ".parquet"))
    ):
        yield from read_rows(path, on_bad=on_bad)
        return
    import datasets

    try:
        loaded = datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(f"neither a file nor a data set of the hub that can be loaded ({error})", path=path) from error
    yield from ((number, dict(row)) for number, row in enumerate(loaded, 1))


def _recognise(row: Fields, path: str, number: int) -> str:
    for name, (matches, _) in DIALECTS.items():
        if matches(row):
            return name
    raise DataError(f"columns {sorted(row)} are those of no dialect ({', '.join(DIALECTS)})", path=path, line=number)


def _pair(row: Fields, dialect: str, default_id: str) -> PreferencePair:
    fields = DIALECTS[dialect][1](row)
    prompt = _messages(fields["prompt"], "prompt")
    if not prompt or not prompt[-1].content.strip():
        raise _bad("prompt", "empty")
    for side in ("chosen", "rejected"):
        if not fields[side].strip():
            raise _bad(side, "empty")
    if fields["chosen"].strip() == fields["rejected"].strip():
        raise _bad("rejected", "identical to the chosen completion")
    own_id = next(
        (row[name] for name in ("id", "pair_uid", "idx", "prompt_id") if row.get(name) not in (None, "")), default_id
    )
    return PreferencePair(
        id=str(own_id),
        prompt=prompt,
        chosen=fields["chosen"],
        rejected=fields["rejected"],
        rating=_rating(row.get("rating")),  # type: ignore[arg-type]
        margin=_margin(row.get("margin")),
        source=str(row.get("source") or ""),
        subset=str(fields.get("subset") or row.get("subset") or ""),
        split=str(row.get("split") or ""),
    )


def _rating(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 3:
        return RATINGS[value - 1]
    name = str(value).strip().lower().replace("_", " ")
    if name not in RATINGS:
        raise _bad("rating", f"must be one of {', '.join(RATINGS)} or 1 to 3, not {value!r}")
    return name


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _bad("margin", f"must be a finite number, not {value!r}")
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
) -> None:
    """Read preference pairs in any of the field's formats, check them and show what they are.

    Args:
        pairs: a JSONL, JSON or Parquet file, or a hub id.
        out: write the pairs in critrm's columns here, and skipped rows beside it.
        dialect: the format; told from the columns when not given.
        split: only rows of this split.
        source: only rows of these sources, comma separated.
        subset: only rows of these subsets, comma separated.
        limit: at most so many pairs.
        skip_bad: leave out rows that cannot be used instead of stopping at the first.
    """
    found = read_pairs(
        pairs, dialect=dialect, split=split, source=source, subset=subset, limit=limit, skip_bad=skip_bad
    )
    console = Console()
    console.print(_table(found))
    if out is not None:
        write_records(out, found.pairs)
        if found.skipped:
            write_records(out.with_suffix(".skipped.jsonl"), found.skipped)
        console.print(f"Pairs: {out}", soft_wrap=True)


def _table(found: PairSet) -> Table:
    table = Table(title=f"{len(found.pairs)} pairs, dialect {found.dialect}")
    table.add_column("")
    table.add_column("rows", justify="right")
    for title, counts in (
        ("skipped", Counter(row.reason for row in found.skipped)),
        ("source", Counter(pair.source for pair in found.pairs if pair.source)),
        ("subset", Counter(pair.subset for pair in found.pairs if pair.subset)),
        ("rating", Counter(pair.rating for pair in found.pairs if pair.rating)),
    ):
        for name, count in counts.most_common(12):
            table.add_row(f"{title}: {name}", str(count))
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in found.pairs)
    table.add_row("chosen is the longer", f"{longer / len(found.pairs):.0%}")
    for side in ("chosen", "rejected"):
        words = sorted(len((pair.chosen if side == "chosen" else pair.rejected).split()) for pair in found.pairs)
        table.add_row(f"{side}, median words", str(words[len(words) // 2]))
    return table
