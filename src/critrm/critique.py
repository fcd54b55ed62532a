"""Stage 1: a critic writes a point-wise critique of every completion (section 3.1, Appendix A).

The critic sees the conversation and one completion, never the label or the other completion. Every reply is stored
under a key of all that determines it before it is counted, so that nothing is paid for twice.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.errors import ConfigError, CriticError
from critrm.llm import Chat, ChatRequest, OpenAIChat, Reply, Sampling
from critrm.preferences import read_pairs
from critrm.prompts import Template, critique_messages, load_template, template_version
from critrm.store import content_hash, write_manifest, write_records
from critrm.types import SIDES, Critique, PreferencePair, Side

OnReply = Callable[[Critique, bool], None]
"""Is told of each critique, and whether it came from the cache."""


_Place = tuple[int, Side]
"""A completion: the pair's position, and the side."""


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
    places = _places_by_key(pairs, chat.model, sampling=sampling, template=loaded)
    found: dict[str, Critique] = {}

    def receive(critique: Critique, *, cached: bool) -> None:
        found[critique.key] = critique
        if on_reply is None:
            return
        for index, side in places[critique.key]:
            on_reply(replace(critique, pair_id=pairs[index].id, side=side, critic=critic), cached)

    todo = []
    for key in places:
        stored = cache.get(key)
        if stored is None or (stored.failure and retry_failed):
            todo.append(key)
        else:
            receive(stored, cached=True)

    def ask(key: str) -> ChatRequest:
        index, side = places[key][0]
        messages = critique_messages(pairs[index].prompt, pairs[index].completion(side), template=loaded)
        return ChatRequest(id=key, messages=messages)

    async def answer() -> None:
        # Rendered one by one as calls end, so that the prompts are not all in memory.
        replies = chat.stream((ask(key) for key in todo), sampling)
        try:
            async for reply in replies:
                index, side = places[reply.id][0]
                critique = _critique(reply, pairs[index].id, side, critic=critic, prompt_version=loaded.version)
                cache.put(critique)
                receive(critique, cached=False)
        finally:
            if isinstance(replies, AsyncGenerator):
                await replies.aclose()

    if todo:
        asyncio.run(answer())
    missing = [key for key in todo if key not in found]
    if missing:
        raise CriticError(f"{chat.model} left {len(missing)} calls without a reply. Run the same command again.")
    ordered = {place: key for key, group in places.items() for place in group}
    return [
        replace(found[ordered[index, side]], pair_id=pair.id, side=side, critic=critic)
        for index, pair in enumerate(pairs)
        for side in SIDES
    ]


def _places_by_key(
    pairs: Sequence[PreferencePair], model: str, *, sampling: Sampling, template: Template
) -> dict[str, list[_Place]]:
    """Key of each distinct call -> the completions it answers: identical ones share a call.

    In the order of keys: a hash's order says nothing of which completion is the chosen one.
    """
    places: dict[str, list[_Place]] = {}
    facts = [sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed]
    for index, pair in enumerate(pairs):
        for side in SIDES:
            messages = critique_messages(pair.prompt, pair.completion(side), template=template)
            key = content_hash(model, facts, template.version, [[m.role, m.content] for m in messages])
            places.setdefault(key, []).append((index, side))
    return dict(sorted(places.items()))


def _critique(reply: Reply, pair_id: str, side: Side, *, critic: str, prompt_version: str) -> Critique:
    failure = reply.failure or ("" if reply.text.strip() else "empty reply")
    return Critique(
        key=reply.id,
        pair_id=pair_id,
        side=side,
        text="" if failure else reply.text.strip(),
        critic=critic,
        prompt_version=prompt_version,
        n_prompt_tokens=reply.n_prompt_tokens,
        n_completion_tokens=reply.n_completion_tokens,
        seconds=round(reply.seconds, 3),
        finish_reason=reply.finish_reason,
        failure=failure,
    )


def critique_with_progress(
    pairs: Sequence[PreferencePair], chat: Chat, *, critic: str, console: Console, **settings: Any
) -> list[Critique]:
    """`critique_pairs` with a progress bar: done, cached, failed, tokens read and written, rate, time left."""
    # No text is read as markup: a critic's name may hold brackets. The bar and the time left keep their 50 places.
    name = Column(max_width=20, no_wrap=True, overflow="ellipsis")
    rest = Column(max_width=max(20, console.width - 50), no_wrap=True, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[ledger]}", markup=False, table_column=rest),
    )
    counts: Counter[str] = Counter()
    started = time.monotonic()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"critic {critic}", total=2 * len(pairs), ledger="")

        def on_reply(critique: Critique, cached: bool) -> None:
            counts["cached"] += cached
            counts["failed"] += bool(critique.failure)
            counts["read"] += 0 if cached else critique.n_prompt_tokens
            counts["written"] += 0 if cached else critique.n_completion_tokens
            rate = counts["written"] / max(time.monotonic() - started, 1e-9)
            tokens = f"{rate:.0f} tokens/s, {counts['read']:,} in, {counts['written']:,} out"
            ledger = f"{counts['cached']} cached, {counts['failed']} failed, {tokens}"
            progress.update(task, advance=1, ledger=ledger)

        return critique_pairs(pairs, chat, critic=critic, on_reply=on_reply, **settings)


def open_chat(model: str, *, base_url: str | None = None, concurrency: int = 16, timeout: float = 60.0) -> Chat:
    """The chat behind a critic's model name.

    Args:
        model: `embedded:NAME` or `local:FOLDER-OR-HUB-ID` for a model in this process, else a served model's name.
        base_url: the OpenAI-compatible endpoint of a served model.
        concurrency: calls under way at once at an endpoint.
        timeout: seconds to wait for an answer of an endpoint.

    Raises:
        ConfigError: the settings do not fit together.
        CriticError: a hosted model is named and there is no key.
    """
    if model.startswith(("embedded:", "local:")):
        if base_url:
            raise ConfigError(f"{model} runs in this process: leave out --base-url")
        from critrm.local_llm import LocalChat

        return LocalChat(model.removeprefix("local:"))
    return OpenAIChat(model, base_url=base_url, concurrency=concurrency, timeout=timeout)


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
    started = time.time()
    load_template(template, needs=("conversation", "response"))
    chat = open_chat(model, base_url=base_url, concurrency=concurrency, timeout=timeout)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    found = read_pairs(pairs, split=split, source=source, subset=subset, limit=limit, skip_bad=skip_bad)
    console = Console()
    with CritiqueCache(cache or default_cache_path()) as store:
        rows = critique_with_progress(
            found.pairs,
            chat,
            critic=critic or model,
            console=console,
            sampling=sampling,
            cache=store,
            template=template,
            retry_failed=retry_failed,
        )
    write_records(out, rows)
    facts = {"pairs": pairs, "critic": critic or model, "model": model, "prompt_version": template_version(template)}
    name = f"{out.name}.manifest.json"
    write_manifest(
        out.parent, name=name, config=facts | asdict(sampling), started=started, inputs=[pairs], seeds=[seed]
    )
    console.print(_summary(rows, n_skipped=len(found.skipped)))
    if all(row.failure for row in rows):
        raise CriticError(f"no call succeeded: {rows[0].failure}. Mend the cause and add --retry-failed.")
    console.print(f"Critiques: {out}", soft_wrap=True, markup=False)


def _summary(rows: Sequence[Critique], *, n_skipped: int) -> Table:
    good = [row for row in rows if not row.failure]
    n_cut = sum(row.finish_reason == "length" for row in good)
    failures: dict[str, list[str]] = {}
    for row in rows:
        if row.failure:
            # "http 400: 9000 tokens are too many" and its like differ from row to row.
            failures.setdefault(row.failure.partition(":")[0], []).append(row.failure)
    table = Table("", Column("critiques", justify="right"), title="Critiques")
    table.add_row("written", f"{len(good):,}")
    if n_cut:
        table.add_row("  of them cut at --max-tokens", f"{n_cut:,}")
    for texts in sorted(failures.values(), key=len, reverse=True):
        table.add_row(escape(f"failed: {texts[0]} (--retry-failed asks again)"), f"{len(texts):,}")
    if n_skipped:
        table.add_row("pairs left out by --skip-bad", f"{n_skipped:,}")
    table.add_row("tokens read", f"{sum(row.n_prompt_tokens for row in rows):,}")
    table.add_row("tokens written", f"{sum(row.n_completion_tokens for row in rows):,}")
    return table
