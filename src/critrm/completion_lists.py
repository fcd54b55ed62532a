"""Prompts with completions to choose from: one JSON row each, and the pairs as which stage 1 critiques them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from critrm.dialects import Fields, bad_field, checked_text, literal_messages
from critrm.errors import DataError
from critrm.store import read_rows
from critrm.types import Critique, Message, PreferencePair


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionList:
    """A prompt and completions to be ranked."""

    id: str
    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    critiques: tuple[str, ...] = ()
    """One of each completion; empty where nobody has critiqued them."""
    critic: str = ""
    """Who wrote the critiques, where it is known."""
    failure: str = ""
    """Why there are no critiques, where a critic was asked for them."""
    n_right: int | None = None
    """So many completions, the first ones, are the right ones; None where that is not known."""


def read_prompts(path: str | Path) -> list[CompletionList]:
    """Read prompts with completions.

    Rows hold `prompt` (text or messages) and `completions`; optional `id`, `critiques` (one of each completion) and
    `critic`. A row of a best-of-n list (`chosen`, a text or several, and `rejected`) is read too.

    Raises:
        DataError: a row cannot be used; names file, line and field.
    """
    found: dict[str, CompletionList] = {}
    for number, row in read_rows(path):
        try:
            item = _read_row(row, f"{Path(path).name.partition('.')[0]}-{number:05d}")
            if item.id in found:
                raise bad_field("id", f"a second row with this id: {item.id!r:.80}")
        except DataError as error:
            raise DataError(error.reason, path=str(path), line=number, field=error.field) from None
        found[item.id] = item
    return list(found.values())


def _read_row(row: Fields, default_id: str) -> CompletionList:
    own_id = default_id if row.get("id") in (None, "") else row["id"]
    prompt = literal_messages(row.get("prompt"), "prompt")
    if not prompt or prompt[-1].role != "user" or not prompt[-1].content.strip():
        raise bad_field("prompt", "must be text, or messages that end with the user's turn, and not empty")
    n_right = None
    if "completions" not in row and "chosen" in row and "rejected" in row:
        right = _texts([row["chosen"]] if isinstance(row["chosen"], str) else row["chosen"], "chosen")
        rejected = _texts([row["rejected"]] if isinstance(row["rejected"], str) else row["rejected"], "rejected")
        completions, n_right = right + rejected, len(right)
    else:
        completions = _texts(row.get("completions"), "completions")
    critiques: tuple[str, ...] = ()
    if row.get("critiques") is not None:
        critiques = _texts(row["critiques"], "critiques")
        if len(critiques) != len(completions):
            raise bad_field("critiques", f"{len(critiques)} critiques of {len(completions)} completions")
        if not all(critique.strip() for critique in critiques):
            raise bad_field("critiques", "one of them is empty: leave the field out where there are none")
    return CompletionList(
        id=checked_text(str(own_id) if isinstance(own_id, int) and not isinstance(own_id, bool) else own_id, "id"),
        prompt=prompt,
        completions=completions,
        critiques=critiques,
        critic=checked_text(row.get("critic") or "", "critic"),
        n_right=n_right,
    )


def _texts(value: object, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise bad_field(field, "missing: it must be a list of texts" if value is None else "must be a list of texts")
    return tuple(checked_text(each, field) for each in value)


def as_pairs(item: CompletionList) -> list[PreferencePair]:
    """The completions two by two, as stage 1 takes them; the last of an odd number stands beside itself.

    Which of them is called chosen says nothing: a critic sees one completion at a time, and equal ones share a call.
    """
    texts = item.completions + item.completions[-1:] * (len(item.completions) % 2)
    return [
        PreferencePair(id=f"{item.id}#{n}", prompt=item.prompt, chosen=texts[2 * n], rejected=texts[2 * n + 1])
        for n in range(len(texts) // 2)
    ]


def with_critiques(items: Sequence[CompletionList], rows: Iterable[Critique], *, critic: str) -> list[CompletionList]:
    """Lists with the critiques of their `as_pairs`; where one failed, the list has none and says why."""
    found = {(row.pair_id, row.side): row for row in rows}
    critiqued = []
    for item in items:
        own = [found[pair.id, side] for pair in as_pairs(item) for side in ("chosen", "rejected")]
        own = own[: len(item.completions)]
        failure = next((row.failure for row in own if row.failure), "")
        texts = () if failure else tuple(row.text for row in own)
        critiqued.append(replace(item, critiques=texts, critic=critic, failure=failure))
    return critiqued
