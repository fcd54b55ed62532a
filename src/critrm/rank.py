"""Best of n: the completions of each prompt ordered by a reward model, with critiques where it reads them."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from critrm.batching import Candidates
from critrm.budget import Ledger, Purse, critiques_table, estimates_table
from critrm.calls import estimate_critiques
from critrm.completion_lists import CompletionList, as_pairs, with_critiques
from critrm.completion_lists import read_prompts as read_prompts
from critrm.config import CriticConfig, validated
from critrm.critics import complete_critic, load_critics
from critrm.critique import critique_with_progress
from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.errors import ConfigError, CriticMismatch, DataError
from critrm.rankings import Ranking, rankings_table
from critrm.store import content_hash, read_rows, write_manifest, write_records
from critrm.types import NO_CRITIC, Score

if TYPE_CHECKING:
    from critrm.reward_model import RewardModel

PROMPTS_PER_SAVE = 64
"""Rankings are on disk after so many prompts; a killed run loses at most these."""


def rank_completions(
    model: "RewardModel",
    items: Iterable[CompletionList],
    *,
    max_tokens_per_step: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> list[Ranking]:
    """Order the completions of each prompt by their rewards; a prompt is read once for all its completions.

    A list whose critiques failed is scored without any where the model was trained for that, all its completions
    alike; otherwise it has no scores. It is never half and half.

    Args:
        model: the reward model.
        items: prompts with completions, critiqued by the model's critic where it reads critiques (`check_readable`).
        max_tokens_per_step: how many tokens are computed at once; does not change the order.
        on_progress: called with the number of prompts done.

    Returns:
        One ranking per prompt, in the given order.
    """
    items = list(items)
    scored = [item for item in items if not item.failure or model.scores_without_critiques]
    rewards = model.score_candidates(
        (_candidates(item) for item in scored), max_tokens_per_step=max_tokens_per_step, on_progress=on_progress
    )
    by_id = {item.id: [of_one[0] for of_one in of_list] for item, of_list in zip(scored, rewards, strict=True)}
    if on_progress and len(scored) < len(items):
        on_progress(len(items) - len(scored))
    return [_ranking(item, _spread(item, by_id[item.id]) if item.id in by_id else None) for item in items]


def _readings(item: CompletionList) -> list[tuple[str, str]]:
    return list(itertools.zip_longest(item.completions, item.critiques, fillvalue=""))


def _candidates(item: CompletionList) -> Candidates:
    # Each reading once: equal ones get the same reward to the last bit.
    distinct = list(dict.fromkeys(_readings(item)))
    critiques = tuple((critique,) for _, critique in distinct) if item.critiques else ()
    return Candidates(prompt=item.prompt, completions=tuple(text for text, _ in distinct), critiques=critiques)


def _spread(item: CompletionList, rewards: Sequence[float]) -> list[float]:
    of_reading = dict(zip(dict.fromkeys(_readings(item)), rewards, strict=True))
    return [of_reading[reading] for reading in _readings(item)]


def _ranking(item: CompletionList, rewards: Sequence[float] | None) -> Ranking:
    scores = [math.nan] * len(item.completions) if rewards is None else rewards
    failure = item.failure
    if rewards is not None and not all(map(math.isfinite, rewards)):
        failure = "a reward is not a number"
    known = [i for i, score in enumerate(scores) if math.isfinite(score)]
    order = sorted(known, key=lambda i: -scores[i])  # sorted keeps the order of equals
    groups = (tuple(group) for _, group in itertools.groupby(order, key=lambda i: scores[i]))
    best = order[0] if len(order) == len(scores) else None
    outcome = None
    if item.n_right is not None:
        right, others = scores[: item.n_right], scores[item.n_right :]
        whole = len(known) == len(scores)
        score = Score(item.id, min(right), max(others)) if whole else Score(item.id, math.nan, math.nan)
        outcome = score.outcome.value
    return Ranking(
        id=item.id,
        scores=tuple(score if math.isfinite(score) else None for score in scores),
        order=tuple(order),
        best=best,
        ties=tuple(group for group in groups if len(group) > 1),
        best_completion=None if best is None else item.completions[best],
        critiques=item.critiques,
        critic=(item.critic or "given") if item.critiques else NO_CRITIC,
        failure=failure,
        outcome=outcome,
    )


def check_readable(model: "RewardModel", items: Iterable[CompletionList], *, allow_other_critic: bool = False) -> None:
    """Whether a reward model may read these critiques, or none.

    Raises:
        CriticMismatch: there are none and it needs some, or they are by another critic (section 4.2). Critiques of
            which nobody says who wrote them are taken for its critic's.
    """
    for item in items:
        if not item.critiques and not item.failure and not model.scores_without_critiques:
            raise CriticMismatch(
                f"the reward model reads critiques by {model.critic!r}, and {item.id!r} has none: "
                f"have them written with --critic {model.critic}, or give them as 'critiques'"
            )
        strange = item.critic not in ("", model.critic) or model.critic == NO_CRITIC
        if item.critiques and strange and not allow_other_critic:
            raise CriticMismatch(
                f"the reward model was trained with critiques by {model.critic!r}, those of {item.id!r} are by "
                f"{item.critic or 'somebody'!r}. Allow that with --allow-other-critic (section 4.2)."
            )


def rank_to_file(
    model: "RewardModel",
    items: Sequence[CompletionList],
    *,
    out: str | Path,
    max_tokens_per_step: int = 4096,
    console: Console | None = None,
) -> list[Ranking]:
    """`rank_completions` with a file of one row per prompt; rows of an earlier run on the same are used again.

    Raises:
        StorageError: the disk is full or read-only.
    """
    out, fingerprint = Path(out), model.fingerprint
    keys = {item.id: content_hash(fingerprint, dataclasses.asdict(item)) for item in items}
    saved = _saved_scores(out)
    known = {item.id: _ranking(item, saved[keys[item.id]]) for item in items if keys[item.id] in saved}
    todo = [item for item in items if item.id not in known]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        task = progress.add_task(f"rank {escape(model.critic)}", total=len(items), completed=len(known))
        for start in range(0, max(1, len(todo)), PROMPTS_PER_SAVE):
            new = rank_completions(
                model,
                todo[start : start + PROMPTS_PER_SAVE],
                max_tokens_per_step=max_tokens_per_step,
                on_progress=lambda n: progress.update(task, advance=n),
            )
            known |= {ranking.id: ranking for ranking in new}
            done = (known[item.id] for item in items if item.id in known)
            write_records(out, (dataclasses.asdict(each) | {"key": keys[each.id]} for each in done))
    return [known[item.id] for item in items]


def _saved_scores(path: Path) -> dict[str, list[float]]:
    """Key -> rewards of an earlier run; empty where there is none that can be read, since it is then made anew."""
    try:
        rows = [row for _, row in read_rows(path)]
        return {str(row["key"]): list(row["scores"]) for row in rows if None not in row["scores"]}
    except (DataError, KeyError, TypeError):
        return {}


def _critiqued(
    items: Sequence[CompletionList],
    settings: CriticConfig,
    *,
    critic: str,
    console: Console,
    ledger: Ledger,
    **how: Any,
) -> list[CompletionList]:
    """The lists, with critiques for those that had none, by stage 1."""
    todo = [item for item in items if not item.critiques]
    pairs = [pair for item in todo for pair in as_pairs(item)]
    if not pairs:
        return list(items)
    rows = critique_with_progress(pairs, settings, critic=critic, console=console, ledger=ledger, **how)
    # The last completion of an odd number stands there twice.
    distinct = {row.key: row for row in rows}
    console.print(critiques_table(list(distinct.values()), ledger, n_skipped=0))
    critiqued = {item.id: item for item in with_critiques(todo, rows, critic=critic)}
    return [critiqued.get(item.id, item) for item in items]


def command(
    model: str,
    prompts: Path,
    *,
    out: Path,
    critic: str = "",
    critic_model: str = "",
    critics: Path | None = None,
    base_url: str | None = None,
    key_variable: str | None = None,
    dry_run: bool = False,
    max_cost: float | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
    cache: Path | None = None,
    retry_failed: bool = False,
    allow_other_critic: bool = False,
    max_tokens_per_step: int = 4096,
) -> None:
    """Order the completions of each prompt by a reward model; the same command goes on where it was interrupted.

    Args:
        model: the reward model's folder, the folder of its run, or a hub id.
        prompts: rows of `prompt` and `completions`, with `critiques` where there are some; or best-of-n lists.
        out: where the rankings go, as JSONL.
        critic: the critic that critiques the completions of rows without critiques: one that `critrm critics` lists,
            or, with --critic-model, its name.
        critic_model: a served model's name, `embedded:NAME`, or `local:FOLDER`.
        critics: a file of your own critics.
        base_url: the OpenAI-compatible endpoint of the critic.
        key_variable: the environment variable that holds its key.
        dry_run: print the critic's calls, tokens and cost, and call nobody.
        max_cost: US dollars that these critiques may cost, earlier attempts included; the run stops before.
        price_in: US dollars per million tokens read; the named critic's when not given.
        price_out: US dollars per million tokens written.
        cache: the file of answered calls; one for all runs when not given.
        retry_failed: make calls again that failed before.
        allow_other_critic: read critiques of another critic than the model was trained with.
        max_tokens_per_step: how many tokens are computed at once.
    """
    started, console = time.time(), Console()
    if out.resolve() == prompts.resolve():
        raise ConfigError(f"--out {out} is the input: name another file")
    items = read_prompts(prompts)
    given = {
        "model": critic_model or None,
        "base_url": base_url,
        "key_variable": key_variable,
        "price_in": price_in,
        "price_out": price_out,
    }
    settings, ledger = None, Ledger()
    if critic or critic_model:
        critic = critic or critic_model
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        found = validated(CriticConfig, values, where=f"critic {critic}", what="settings")
        settings = complete_critic(critic, found, critics=load_critics(critics))
    from critrm.reward_model import RewardModel

    loaded = RewardModel.load(model, critic=critic or None)
    if settings:
        # Before anybody is paid.
        asked = (replace(item, critiques=item.completions, critic=critic) for item in items if not item.critiques)
        check_readable(loaded, asked, allow_other_critic=allow_other_critic)
        with CritiqueCache(cache or default_cache_path()) as store:
            if dry_run:
                pairs = [pair for item in items if not item.critiques for pair in as_pairs(item)]
                row = estimate_critiques(pairs, settings, critic=critic, cache=store, retry_failed=retry_failed)
                console.print(estimates_table([row], limit=max_cost))
                return
            purse = None if max_cost is None else Purse(max_cost)
            how: dict[str, Any] = {"cache": store, "console": console, "ledger": ledger, "purse": purse}
            items = _critiqued(items, settings, critic=critic, retry_failed=retry_failed, **how)
    check_readable(loaded, items, allow_other_critic=allow_other_critic)
    rankings = rank_to_file(loaded, items, out=out, max_tokens_per_step=max_tokens_per_step, console=console)
    facts = {"model": loaded.name, "critic": settings.model_dump(mode="json") if settings else None}
    write_manifest(
        out.parent,
        name=f"{out.name}.manifest.json",
        config=facts | {"ledger": ledger.facts()},
        started=started,
        inputs=[prompts],
        cost=ledger.cost + ledger.cost_cached,
    )
    console.print(rankings_table(rankings))
    console.print(f"Rankings: {out}", soft_wrap=True, markup=False)
