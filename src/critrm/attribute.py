"""Which sentence of a critique moved the reward: each is left out once, and the reward looked at again.

The effect of a sentence is the reward with the whole critique minus the reward without that sentence. Prompt and
completion are read once for all of a critique's variants.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from critrm.arm_files import only_critic, read_arm
from critrm.attribution_files import AspectTotal, Attribution, SentenceEffect, saved_attributions, write_attributions
from critrm.attribution_files import read_attributions as read_attributions
from critrm.attribution_page import attribution_page, totals_table
from critrm.augment import augment_pairs
from critrm.batching import Candidates
from critrm.critique_files import critiques_by_one
from critrm.errors import ConfigError, CriticMismatch, DataError
from critrm.preferences import read_pairs
from critrm.sentences import ASPECTS, OTHER, aspect_of, split_sentences
from critrm.store import content_hash, write_text
from critrm.types import NO_CRITIC, SIDES, CritiquedPair, Side

if TYPE_CHECKING:
    from critrm.reward_model import RewardModel

PAIRS_PER_SAVE = 64
"""Effects are on disk after so many pairs; a killed run loses at most these."""


def attribute_sentences(
    model: "RewardModel",
    items: Iterable[CritiquedPair],
    *,
    max_tokens_per_step: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> list[Attribution]:
    """The leave-one-sentence-out effect of every sentence of every critique.

    Args:
        model: a reward model that reads critiques.
        items: pairs with their critiques.
        max_tokens_per_step: how many tokens are computed at once; does not change the effects.
        on_progress: called with the number of pairs done.

    Returns:
        Two attributions per pair, chosen first, in the given order.

    Raises:
        DataError: a pair lacks a critique.
        ModelError: memory does not suffice for so many tokens at once.
    """
    items = list(items)
    for item in items:
        if not (item.chosen_critique.strip() and item.rejected_critique.strip()):
            raise DataError("no critique to take apart", field=f"id {item.pair.id}")
    rewards = model.score_candidates(
        (_variants(item) for item in items), max_tokens_per_step=max_tokens_per_step, on_progress=on_progress
    )
    return [
        _attribution(item, side, of_side)
        for item, of_pair in zip(items, rewards, strict=True)
        for side, of_side in zip(SIDES, of_pair, strict=True)
    ]


def _variants(item: CritiquedPair) -> Candidates:
    """Each side's critique as it is, not at all, and without each of its sentences."""
    critiques = []
    for side in SIDES:
        parts = split_sentences(item.critique(side))
        without = ["".join(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
        critiques.append((item.critique(side), "", *without))
    completions = (item.pair.chosen, item.pair.rejected)
    return Candidates(prompt=item.pair.prompt, completions=completions, critiques=tuple(critiques))


def _attribution(item: CritiquedPair, side: Side, rewards: Sequence[float]) -> Attribution:
    reward, reward_without, *others = rewards
    parts = split_sentences(item.critique(side))
    return Attribution(
        pair_id=item.pair.id,
        side=side,
        critic=item.critic,
        reward=reward,
        reward_without=reward_without,
        sentences=tuple(
            SentenceEffect(text=text, aspect=aspect_of(text), effect=reward - other)
            for text, other in zip(parts, others, strict=True)
        ),
    )


def total_by_aspect(attributions: Iterable[Attribution]) -> list[AspectTotal]:
    """Mean effects by aspect and side, in the order of `ASPECTS`; effects that are not numbers are left out.

    The interval takes a pair's sentences as one draw, since they are not independent of each other: it is that of a
    ratio (effects over sentences) of sums over pairs, with Student's t.
    """
    found: dict[tuple[str, Side], dict[str, list[float]]] = {}
    for each in attributions:
        for sentence in each.sentences:
            if math.isfinite(sentence.effect):
                by_pair = found.setdefault((sentence.aspect, each.side), {})
                by_pair.setdefault(each.pair_id, []).append(sentence.effect)
    places = ((aspect, side) for aspect in (*ASPECTS, OTHER) for side in SIDES)
    return [_total(*place, list(found[place].values())) for place in places if place in found]


def _total(aspect: str, side: Side, by_pair: Sequence[Sequence[float]]) -> AspectTotal:
    effects = [effect for of_pair in by_pair for effect in of_pair]
    mean = math.fsum(effects) / len(effects)
    low = high = None
    if len(by_pair) > 1:
        from scipy.stats import t

        n = len(by_pair)
        residuals = math.fsum((math.fsum(of_pair) - mean * len(of_pair)) ** 2 for of_pair in by_pair)
        half = float(t.ppf(0.975, n - 1)) * math.sqrt(n / (n - 1) * residuals) / len(effects)
        low, high = mean - half, mean + half
    return AspectTotal(
        aspect=aspect,
        side=side,
        n_sentences=len(effects),
        n_pairs=len(by_pair),
        mean=mean,
        low=low,
        high=high,
        mean_size=math.fsum(map(abs, effects)) / len(effects),
    )


def attribute_to_folder(
    model: "RewardModel",
    items: Sequence[CritiquedPair],
    *,
    out: str | Path,
    allow_other_critic: bool = False,
    max_tokens_per_step: int = 4096,
    n_shown: int = 50,
    console: Console | None = None,
) -> list[AspectTotal]:
    """`attribute_sentences` with files: `attribution.jsonl`, `attribution.json` and `attribution.html`.

    What an earlier run has written for the same model, pair and critiques is used again.

    Args:
        model: a reward model that reads critiques.
        items: pairs with their critiques.
        out: the folder.
        allow_other_critic: read critiques of another critic than the model was trained with.
        max_tokens_per_step: how many tokens are computed at once.
        n_shown: so many pairs are on the page: those whose sentences moved the reward most.
        console: gets the progress bar; none is shown when None.

    Raises:
        CriticMismatch: the critics differ, or the model reads no critiques (section 4.2).
        DataError: two pairs have one id, or one lacks a critique.
        StorageError: the disk is full or read-only.
    """
    critics = {item.critic for item in items}
    if not critics:
        raise DataError("no pairs to take apart")
    if critics != {model.critic} and not allow_other_critic:
        raise CriticMismatch(
            f"the reward model was trained with critiques by {model.critic!r}, these are by {sorted(critics)}. "
            "Take the same critic's, or allow it with --allow-other-critic (section 4.2)."
        )
    out = Path(out)
    found = _resumed(model, items, out / "attribution.jsonl", max_tokens_per_step, console)
    totals = total_by_aspect(found)
    facts = {"model": model.name, "critic": items[0].critic, "n_pairs": len(items)}
    content = facts | {"totals": [dataclasses.asdict(total) for total in totals]}
    write_text(out / "attribution.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    page = attribution_page(items, found, totals, model=model.name, n_shown=n_shown)
    write_text(out / "attribution.html", page)
    return totals


def _resumed(
    model: "RewardModel", items: Sequence[CritiquedPair], path: Path, max_tokens_per_step: int, console: Console | None
) -> list[Attribution]:
    """The attributions of all pairs, in their order; those on disk are used again and new ones saved as they come."""
    facts = [model.fingerprint, ASPECTS]
    keys: dict[str, str] = {}
    for item in items:
        if item.pair.id in keys:
            raise DataError("two pairs have this id; ids must be unique", field=f"id {item.pair.id}")
        parts = [split_sentences(item.critique(side)) for side in SIDES]
        keys[item.pair.id] = content_hash(*facts, item.content(), parts)
    saved = saved_attributions(path)
    known = {pair_id: saved[key] for pair_id, key in keys.items() if len(saved.get(key, ())) == len(SIDES)}
    todo = [item for item in items if item.pair.id not in known]

    def save() -> None:
        done = (each for pair_id in keys for each in known.get(pair_id, ()))
        write_attributions(path, done, keys=keys)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        task = progress.add_task(f"attribute {escape(model.critic)}", total=len(items), completed=len(known))
        for start in range(0, len(todo), PAIRS_PER_SAVE):
            new = attribute_sentences(
                model,
                todo[start : start + PAIRS_PER_SAVE],
                max_tokens_per_step=max_tokens_per_step,
                on_progress=lambda n: progress.update(task, advance=n),
            )
            for chosen, rejected in zip(new[::2], new[1::2], strict=True):
                known[chosen.pair_id] = [chosen, rejected]
            save()
    if not todo and len(saved) != len(keys):
        save()
    return [each for pair_id in keys for each in known[pair_id]]


def command(
    model: str,
    pairs: str,
    *,
    out: Path,
    critiques: Path | None = None,
    critic: str | None = None,
    dialect: str = "auto",
    split: str = "",
    source: str = "",
    subset: str = "",
    limit: int | None = None,
    allow_other_critic: bool = False,
    n_shown: int = 50,
    max_tokens_per_step: int = 4096,
    skip_bad: bool = False,
) -> None:
    """Find out which sentences of critiques moved the reward; the same command goes on where it was interrupted.

    Args:
        model: the reward model's folder, the folder of its run, or a hub id.
        pairs: the pairs: a file, a hub id, or an arm that `critrm augment` wrote.
        out: folder for the effects of each sentence, the totals by aspect, and the page.
        critiques: critiques of the pairs' completions; an arm has them.
        critic: the critic's name; the file's unless its rows say otherwise.
        dialect: the format of the pairs; told from the columns when not given.
        split: only pairs of this split.
        source: only pairs of these sources, comma separated.
        subset: only pairs of these subsets, comma separated.
        limit: only so many pairs.
        allow_other_critic: read critiques of another critic than the model was trained with.
        n_shown: so many pairs are on the page: those whose sentences moved the reward most.
        max_tokens_per_step: how many tokens are computed at once.
        skip_bad: leave out rows that cannot be read instead of stopping at the first.
    """
    console = Console()
    if critiques is None:
        if critic or split or source or subset or dialect != "auto":
            raise ConfigError("an arm is read as it is; for other pairs, name their critiques with --critiques")
        items = _arm(pairs)[:limit]
    else:
        filters: dict[str, Any] = {"split": split, "source": source, "subset": subset, "limit": limit}
        found = read_pairs(pairs, dialect=dialect, skip_bad=skip_bad, **filters)
        name, rows = critiques_by_one(critiques, critic=critic)
        augmented = augment_pairs(found.pairs, {name: rows})
        if augmented.dropped:
            console.print(f"{len(augmented.dropped)} pairs left out: no critique of both sides", style="yellow")
        items = augmented.arms[name]
    from critrm.reward_model import RewardModel

    totals = attribute_to_folder(
        RewardModel.load(model),
        items,
        out=out,
        allow_other_critic=allow_other_critic,
        max_tokens_per_step=max_tokens_per_step,
        n_shown=n_shown,
        console=console,
    )
    console.print(totals_table(totals, critic=items[0].critic))
    console.print(f"Page: {out / 'attribution.html'}", soft_wrap=True, markup=False)


def _arm(path: str) -> tuple[CritiquedPair, ...]:
    items = read_arm(path)
    if items is None:
        raise ConfigError(f"{path} is no arm that `critrm augment` wrote: name the pairs' critiques with --critiques")
    if only_critic(items) == NO_CRITIC:
        raise ConfigError(f"{path} is the arm without critiques: there is nothing to take apart")
    return items
