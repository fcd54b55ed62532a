"""Stage 1: a critic writes a point-wise critique of every completion (section 3.1, Appendix A).

The critic sees the conversation and one completion, never the label or the other completion. Every reply is stored
under a key of all that determines it before it is counted, so that nothing is paid for twice.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from critrm.errors import ConfigError, CriticError, DataError
from critrm.llm import Chat, ChatRequest, OpenAIChat, Reply, Sampling
from critrm.preferences import read_pairs
from critrm.prompts import Template, critique_messages, load_template
from critrm.store import CritiqueCache, content_hash, read_rows, write_records
from critrm.types import SIDES, Critique, PreferencePair, Side

OnReply = Callable[[Critique, bool], None]
"""Is told of each critique, and whether it came from the cache."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One distinct call, and the completions that it answers (identical ones share it)."""

    request: ChatRequest
    places: tuple[tuple[str, Side], ...]


def critique_pairs(
    pairs: Sequence[PreferencePair],
    chat: Chat,
    *,
    critic: str,
    sampling: Sampling,
    cache: CritiqueCache,
    template: str | Path = "critique",
    retry_failed: bool = False,
    on_reply: OnReply | None = None,
) -> list[Critique]:
    """Have a critic write a critique of both completions of each pair.

    Args:
        pairs: the preference pairs.
        chat: the critic's model.
        critic: the critic's name; the arm is called so.
        sampling: how replies are drawn; part of the key.
        cache: answered calls; those are not made again.
        template: Appendix A's, or a file of your own.
        retry_failed: make calls again that failed before.
        on_reply: called for every critique as it becomes known.

    Returns:
        Two critiques per pair, chosen then rejected, in the order of the pairs. A failed call is a critique with its
        `failure` set.

    Raises:
        CriticError: the critic cannot be used at all; what was answered is stored.
        StorageError: the cache cannot be written.
    """
    loaded = load_template(template, needs=("conversation", "response"))
    calls = _calls(pairs, chat.model, sampling, loaded)
    found: dict[str, Critique] = {}
    todo = []
    for key, call in calls.items():
        stored = cache.get(key)
        if stored is None or (stored.failure and retry_failed):
            todo.append(call)
            continue
        found[key] = stored
        _announce(call, stored, critic, cached=True, on_reply=on_reply)

    async def ask() -> None:
        async for reply in chat.stream((call.request for call in todo), sampling):
            critique = _critique(reply, calls[reply.id], critic, loaded)
            cache.put(critique)
            found[reply.id] = critique
            _announce(calls[reply.id], critique, critic, cached=False, on_reply=on_reply)

    if todo:
        asyncio.run(ask())
    by_place = {
        place: replace(found[key], pair_id=place[0], side=place[1], critic=critic)
        for key, call in calls.items()
        for place in call.places
    }
    return [by_place[pair.id, side] for pair in pairs for side in SIDES]


def _calls(
    pairs: Sequence[PreferencePair], model: str, sampling: Sampling, template: Template
) -> dict[str, _Call]:
    """Key -> call, in the order of keys: a hash's order says nothing of which completion is the chosen one."""
    places: dict[str, list[tuple[str, Side]]] = {}
    requests: dict[str, ChatRequest] = {}
    facts = [sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed]
    for pair in pairs:
        for side in SIDES:
            messages = critique_messages(pair.prompt, pair.completion(side), template=template)
            key = content_hash(model, facts, template.version, [[m.role, m.content] for m in messages])
            places.setdefault(key, []).append((pair.id, side))
            requests[key] = ChatRequest(id=key, messages=messages)
    return {key: _Call(requests[key], tuple(places[key])) for key in sorted(places)}


def _critique(reply: Reply, call: _Call, critic: str, template: Template) -> Critique:
    pair_id, side = call.places[0]
    failure = reply.failure or ("" if reply.text.strip() else "empty reply")
    return Critique(
        key=reply.id,
        pair_id=pair_id,
        side=side,
        text="" if failure else reply.text.strip(),
        critic=critic,
        prompt_version=template.version,
        n_prompt_tokens=reply.n_prompt_tokens,
        n_completion_tokens=reply.n_completion_tokens,
        seconds=round(reply.seconds, 3),
        finish_reason=reply.finish_reason,
        failure=failure,
    )


def _announce(call: _Call, critique: Critique, critic: str, *, cached: bool, on_reply: OnReply | None) -> None:
    if on_reply is not None:
        for place in call.places:
            on_reply(replace(critique, pair_id=place[0], side=place[1], critic=critic), cached)


def critique_with_progress(
    pairs: Sequence[PreferencePair], chat: Chat, *, critic: str, console: Console, **settings: Any
) -> list[Critique]:
    """`critique_pairs` with a progress bar: done, cached, failed, tokens per second, time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[ledger]}"),
    )
    counts: Counter[str] = Counter()
    started = time.monotonic()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"critique {critic}", total=2 * len(pairs), ledger="")

        def on_reply(critique: Critique, cached: bool) -> None:
            counts["cached" if cached else "failed" if critique.failure else "written"] += 1
            counts["tokens"] += 0 if cached else critique.n_completion_tokens
            rate = counts["tokens"] / max(time.monotonic() - started, 1e-9)
            ledger = f"{counts['cached']} cached, {counts['failed']} failed, {rate:.0f} tokens/s"
            progress.update(task, advance=1, ledger=ledger)

        return critique_pairs(pairs, chat, critic=critic, on_reply=on_reply, **settings)


def read_critiques(path: str | Path, *, critic: str | None = None) -> list[Critique]:
    """Read critiques that critrm wrote, or existing ones by pair id and side.

    Args:
        path: rows with `pair_id`, `side` and `critique` (or `text`); optional `score` and `critic`.
        critic: the critic's name; else the rows' own, else the file's.

    Raises:
        DataError: a row lacks a field, names an unknown side, is empty or repeated; names file, line and field.
    """
    name = critic or Path(path).name.partition(".")[0]
    rows, seen = [], set()
    for number, row in read_rows(path):
        critique = _read_row(row, critic, name, str(path), number)
        place = (critique.pair_id, critique.side)
        if place in seen:
            raise DataError(f"a second critique of {place[0]!r}, {place[1]}", path=str(path), line=number, field="pair_id")
        seen.add(place)
        rows.append(critique)
    return rows


def _read_row(row: dict[str, Any], critic: str | None, name: str, path: str, number: int) -> Critique:
    def bad(field: str, reason: str) -> DataError:
        return DataError(reason, path=path, line=number, field=field)

    pair_id, side = row.get("pair_id"), row.get("side")
    if not isinstance(pair_id, (str, int)) or pair_id == "":
        raise bad("pair_id", "missing: which pair is it about?")
    if side not in SIDES:
        raise bad("side", f"must be 'chosen' or 'rejected', not {side!r}")
    text, failure = row.get("critique", row.get("text")), str(row.get("failure") or "")
    if not isinstance(text, str):
        raise bad("critique", "missing: it must be text")
    if not text.strip() and not failure:
        raise bad("critique", "empty: a critique that failed carries its reason in 'failure'")
    score = row.get("score")
    if score is not None and not isinstance(score, (int, float)):
        raise bad("score", f"must be a number, not {score!r}")
    return Critique(
        key=str(row.get("key") or content_hash(path, pair_id, side, text)),
        pair_id=str(pair_id),
        side=side,
        text=text.strip(),
        critic=critic or str(row.get("critic") or name),
        prompt_version=str(row.get("prompt_version") or ""),
        n_prompt_tokens=int(row.get("n_prompt_tokens") or 0),
        n_completion_tokens=int(row.get("n_completion_tokens") or 0),
        cost=float(row.get("cost") or 0.0),
        seconds=float(row.get("seconds") or 0.0),
        finish_reason=str(row.get("finish_reason") or ""),
        score=score,
        failure=failure,
    )


def open_chat(model: str, *, base_url: str | None = None, concurrency: int = 16, timeout: float = 60.0) -> Chat:
    """The chat behind a critic's model name.

    Args:
        model: `embedded:NAME` or `local:FOLDER-OR-HUB-ID` for a model in this process, else a served model's name.
        base_url: the OpenAI-compatible endpoint of a served model.
        concurrency: calls under way at once at an endpoint.
        timeout: seconds to wait for an answer of an endpoint.
    """
    if model.startswith(("embedded:", "local:")):
        if base_url:
            raise ConfigError(f"{model} runs in this process: leave out the base URL {base_url!r}")
        from critrm.local_llm import LocalChat

        return LocalChat(model.removeprefix("local:"))
    return OpenAIChat(model, base_url=base_url, concurrency=concurrency, timeout=timeout)


def default_cache_path() -> Path:
    """The cache of all critiques of this user, so that no run pays for what another has paid for."""
    return Path(os.environ.get("CRITRM_CACHE") or "~/.cache/critrm").expanduser() / "critiques.sqlite"


def command(
    pairs: str,
    *,
    model: str,
    out: Path,
    base_url: str | None = None,
    critic: str = "",
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
    concurrency: int = 16,
    timeout: float = 60.0,
    template: str = "critique",
    cache: Path | None = None,
    retry_failed: bool = False,
    split: str = "",
    source: str = "",
    subset: str = "",
    limit: int | None = None,
    skip_bad: bool = False,
) -> None:
    """Have a critic write a critique of every completion; the same command goes on where it was interrupted.

    Args:
        pairs: the preference pairs: a file or a hub id.
        model: a served model's name, `embedded:NAME`, or `local:FOLDER`.
        out: where the critiques go, as JSONL.
        base_url: the OpenAI-compatible endpoint; the key comes from OPENAI_API_KEY.
        critic: the critic's name in the results; the model's when not given.
        temperature: 0 is greedy.
        top_p: share of the probability that is sampled from.
        max_tokens: length of a critique.
        seed: of the sampling.
        concurrency: calls under way at once.
        timeout: seconds to wait for an answer.
        template: Appendix A's `critique`, or a file of your own.
        cache: the file of answered calls; one for all runs when not given.
        retry_failed: make calls again that failed before.
        split: only pairs of this split.
        source: only pairs of these sources, comma separated.
        subset: only pairs of these subsets, comma separated.
        limit: only so many pairs.
        skip_bad: leave out rows that cannot be read instead of stopping at the first.
    """
    found = read_pairs(pairs, split=split, source=source, subset=subset, limit=limit, skip_bad=skip_bad).pairs
    chat = open_chat(model, base_url=base_url, concurrency=concurrency, timeout=timeout)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    console = Console()
    with CritiqueCache(cache or default_cache_path()) as store:
        rows = critique_with_progress(
            found,
            chat,
            critic=critic or model,
            console=console,
            sampling=sampling,
            cache=store,
            template=template,
            retry_failed=retry_failed,
        )
    write_records(out, rows)
    console.print(_summary(rows))
    if all(row.failure for row in rows):
        raise CriticError(f"no call succeeded: {rows[0].failure}. Mend the cause and add --retry-failed.")
    console.print(f"Critiques: {out}", soft_wrap=True)


def _summary(rows: Sequence[Critique]) -> Table:
    table = Table(title="Critiques")
    table.add_column("")
    table.add_column("critiques", justify="right")
    for line in _summary_lines(rows):
        table.add_row(*line)
    return table


def _summary_lines(rows: Sequence[Critique]) -> Iterator[tuple[str, str]]:
    good = [row for row in rows if not row.failure]
    yield "written", str(len(good))
    cut = sum(row.finish_reason == "length" for row in good)
    if cut:
        yield "  of them cut at --max-tokens", str(cut)
    for reason, count in Counter(row.failure for row in rows if row.failure).most_common():
        yield f"failed: {reason} (--retry-failed asks again)", str(count)
    yield "tokens read", f"{sum(row.n_prompt_tokens for row in rows):,}"
    yield "tokens written", f"{sum(row.n_completion_tokens for row in rows):,}"
