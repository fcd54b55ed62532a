"""Stage 1: a critic writes point-wise critiques of every completion (section 3.1, Appendix A).

The critic sees the conversation and one completion, never the label or the other completion. Every reply is stored
under a key of all that determines it before it is counted, so that nothing is paid for twice.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from critrm.budget import MAYBE_BILLED, Ledger, Price, Purse, critiques_table, estimates_table
from critrm.calls import Calls, ask_all, estimate_critiques
from critrm.config import CriticConfig, validated
from critrm.critics import (
    check_samples,
    complete_critic,
    load_critics,
    no_price,
    open_chat,
    price_of,
    sampling_of,
)
from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.errors import ConfigError, CriticError
from critrm.llm import Chat, Reply, Sampling
from critrm.preferences import read_pairs
from critrm.prompts import load_template, template_version
from critrm.store import write_manifest, write_records
from critrm.types import SIDES, Critique, PreferencePair

OnReply = Callable[[Critique, bool], None]
"""Is told of each critique, and whether it came from the cache."""


def critique_pairs(
    pairs: Sequence[PreferencePair],
    chat: Chat,
    *,
    critic: str,
    sampling: Sampling,
    cache: CritiqueCache,
    template: str | Path = "critique",
    samples: int = 1,
    retry_failed: bool = False,
    price: Price | None = None,
    purse: Purse | None = None,
    ledger: Ledger | None = None,
    on_reply: OnReply | None = None,
) -> list[Critique]:
    """Have a critic write critiques of both completions of each pair.

    Args:
        pairs: the preference pairs.
        chat: the critic's model.
        critic: the critic's name; the arm is called so.
        sampling: how replies are drawn; part of the key.
        cache: answered calls; those are not made again.
        template: Appendix A's, or a file of your own.
        samples: critiques per completion; sample j is drawn with the seed + j.
        retry_failed: make calls again that failed before.
        price: what the critic's tokens cost.
        purse: the limit on what may be spent; it needs a price.
        ledger: is kept of the calls.
        on_reply: called for every critique as it becomes known; critiques that share a call are cached but for one.

    Returns:
        Two critiques per pair and sample: the pairs in their order, then the samples, then chosen and rejected. A
        failed call is a critique with its `failure` set.

    Raises:
        ConfigError: several samples at temperature 0, or a limit without a price.
        CriticError: the critic cannot be used at all, or the limit is reached; what was answered is stored.
        StorageError: the cache cannot be written.
    """
    check_samples(samples, sampling.temperature)
    if purse and price is None:
        raise no_price(critic)
    calls = Calls(pairs, chat.model, sampling=sampling, samples=samples, template=template)
    found, todo, paid = calls.split(cache, retry_failed=retry_failed)

    def receive(critique: Critique, *, cached: bool) -> None:
        if ledger:
            ledger.add(critique, cached=cached)
        # As the cache has it: with the cost of the failures before it.
        critique = replace(critique, cost=critique.cost + paid.get(critique.key, 0.0))
        found[critique.key] = critique
        if on_reply:
            for n, (index, sample, side) in enumerate(calls.places[critique.key]):
                row = replace(critique, pair_id=pairs[index].id, side=side, sample=sample, critic=critic)
                on_reply(row, cached or n > 0)

    for key, cost in paid.items():
        if purse:
            purse.paid_before(key, cost)
        if ledger:
            ledger.cost_cached += cost
    for critique in list(found.values()):
        if purse:
            purse.paid_before(critique.key, critique.cost)
        receive(critique, cached=True)

    def answered(reply: Reply) -> None:
        critique = calls.critique(reply, critic=critic, price=price)
        cache.put(critique)
        if purse:
            purse.settle(reply.id, critique.cost, unsure=critique.failure.startswith(MAYBE_BILLED))
        receive(critique, cached=False)

    if todo:
        asyncio.run(ask_all(calls, todo, chat, answered=answered, price=price, purse=purse))
    missing = [key for key in todo if key not in found]
    if missing:
        raise CriticError(f"{chat.model} left {len(missing)} calls without a reply. Run the same command again.")
    ordered = {place: key for key, group in calls.places.items() for place in group}
    return [
        replace(found[ordered[index, sample, side]], pair_id=pair.id, side=side, sample=sample, critic=critic)
        for index, pair in enumerate(pairs)
        for sample in range(samples)
        for side in SIDES
    ]


def critique_with_progress(
    pairs: Sequence[PreferencePair],
    settings: CriticConfig,
    *,
    critic: str,
    cache: CritiqueCache,
    console: Console,
    ledger: Ledger,
    purse: Purse | None = None,
    retry_failed: bool = False,
) -> list[Critique]:
    """`critique_pairs` with a complete critic's settings, and a progress bar."""
    chat = open_chat(settings, batch_state=cache.path.with_name(f"{cache.path.name}.batches.json"))
    with _progress(console) as bar:
        task = bar.add_task(f"critic {critic}", total=2 * settings.samples * len(pairs), ledger="")
        return critique_pairs(
            pairs,
            chat,
            critic=critic,
            sampling=sampling_of(settings),
            cache=cache,
            template=settings.template,
            samples=settings.samples,
            retry_failed=retry_failed,
            price=price_of(settings),
            purse=purse,
            ledger=ledger,
            on_reply=lambda critique, cached: bar.update(task, advance=1, ledger=ledger.line()),
        )


def _progress(console: Console) -> Progress:
    """A progress bar that ends in a ledger's line: done, time left, cost, cached, failed, tokens, rate."""
    # No text is read as markup: a critic's name may hold brackets. The bar and the time left keep their 50 places.
    name = Column(max_width=20, no_wrap=True, overflow="ellipsis")
    rest = Column(max_width=max(20, console.width - 50), no_wrap=True, overflow="ellipsis")
    task, ledger = ("{task.description}", name), ("{task.fields[ledger]}", rest)
    first, last = (TextColumn(text, markup=False, table_column=column) for text, column in (task, ledger))
    return Progress(first, BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn(), last, console=console)


def command(
    pairs: str,
    *,
    out: Path,
    critic: str = "",
    model: str = "",
    self_critique: str = "",
    critics: Path | None = None,
    base_url: str | None = None,
    key_variable: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    samples: int | None = None,
    template: str | None = None,
    dry_run: bool = False,
    max_cost: float | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
    batch: bool = False,
    concurrency: int | None = None,
    timeout: float | None = None,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    engine: Literal["local", "ray"] | None = None,
    workers: int | None = None,
    cache: Path | None = None,
    retry_failed: bool = False,
    split: str = "",
    source: str = "",
    subset: str = "",
    limit: int | None = None,
    skip_bad: bool = False,
    allow_empty: bool = False,
) -> None:
    """Have a critic write a critique of every completion; the same command goes on where it was interrupted.

    Args:
        pairs: the preference pairs: a file or a hub id.
        out: where the critiques go, as JSONL.
        critic: a critic that `critrm critics` lists; or, with --model, the critic's name in the results.
        model: a served model's name, `embedded:NAME`, or `local:FOLDER`; the named critic's when not given.
        self_critique: the backbone that the reward model starts from is the critic: its folder, hub id or
            `embedded:NAME`, run in this process, or at --base-url.
        critics: a file of your own critics.
        base_url: the OpenAI-compatible endpoint, or several of the same model with commas between.
        key_variable: the environment variable that holds the key; OPENAI_API_KEY when not given.
        temperature: 0 is greedy; the named critic's, else 0, when not given.
        top_p: share of the probability that is sampled from; the named critic's, else 1.
        max_tokens: length of a critique; the named critic's, else 256.
        seed: of the sampling; 0 when not given.
        samples: critiques per completion; more than one needs a temperature above 0.
        template: Appendix A's `critique`, or a file of your own.
        dry_run: print calls, tokens and cost, and call nobody.
        max_cost: US dollars that these critiques may cost, earlier attempts included; the run stops before.
        price_in: US dollars per million tokens read; the named critic's when not given.
        price_out: US dollars per million tokens written.
        batch: send the calls to the endpoint's Batch API: cheaper, and answered within a day.
        concurrency: calls under way at once; 16 when not given.
        timeout: seconds to wait for an answer; 60 when not given.
        requests_per_minute: calls sent per minute at most.
        tokens_per_minute: tokens read and written per minute at most.
        engine: `ray` makes the calls on the workers of a Ray cluster (RAY_ADDRESS, else one on this machine).
        workers: of the ray engine; 2 when not given.
        cache: the file of answered calls; one for all runs when not given.
        retry_failed: make calls again that failed before.
        split: only pairs of this split.
        source: only pairs of these sources, comma separated.
        subset: only pairs of these subsets, comma separated.
        limit: only so many pairs.
        skip_bad: leave out rows that cannot be read instead of stopping at the first.
        allow_empty: keep empty completions and identical pairs, as the published counts of benchmarks do.
    """
    started = time.time()
    if not (critic or model or self_critique):
        raise ConfigError("which critic? Give --critic (`critrm critics` lists them), --model or --self-critique")
    given = _given(
        model=model or None,
        self_critique=bool(self_critique) or None,
        base_url=base_url,
        key_variable=key_variable,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        samples=samples,
        template=template,
        price_in=price_in,
        price_out=price_out,
        batch=batch or None,
        concurrency=concurrency,
        timeout=timeout,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        engine=engine,
        workers=workers,
    )
    name = critic or model or self_critique
    settings = validated(CriticConfig, given, where=f"critic {name}", what="settings")
    settings = complete_critic(name, settings, critics=load_critics(critics), backbone=self_critique)
    if max_cost is not None and not max_cost >= 0:
        raise ConfigError("--max-cost must be an amount of US dollars")
    load_template(settings.template, needs=("conversation", "response"))
    found = read_pairs(
        pairs,
        split=split,
        source=source,
        subset=subset,
        limit=limit,
        skip_bad=skip_bad,
        allow_empty=allow_empty,
    )
    console, ledger = Console(), Ledger()
    with CritiqueCache(cache or default_cache_path()) as store:
        if dry_run:
            row = estimate_critiques(found.pairs, settings, critic=name, cache=store, retry_failed=retry_failed)
            console.print(estimates_table([row], limit=max_cost))
            return
        rows = critique_with_progress(
            found.pairs,
            settings,
            critic=name,
            cache=store,
            console=console,
            ledger=ledger,
            purse=None if max_cost is None else Purse(max_cost),
            retry_failed=retry_failed,
        )
    write_records(out, rows)
    facts = settings.model_dump(mode="json") | {"pairs": pairs, "critic": name, "ledger": ledger.facts()}
    write_manifest(
        out.parent,
        name=f"{out.name}.manifest.json",
        config=facts | {"prompt_version": template_version(settings.template)},
        started=started,
        inputs=[pairs],
        seeds=[settings.seed + sample for sample in range(settings.samples)],
        cost=ledger.cost + ledger.cost_cached,
    )
    console.print(critiques_table(rows, ledger, n_skipped=len(found.skipped)))
    if all(row.failure for row in rows):
        raise CriticError(f"no call succeeded: {rows[0].failure}. Mend the cause and add --retry-failed.")
    console.print(f"Critiques: {out}", soft_wrap=True, markup=False)


def _given(**flags: object) -> dict[str, object]:
    return {name: value for name, value in flags.items() if value is not None}
