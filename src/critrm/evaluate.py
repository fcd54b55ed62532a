"""Stage 4: benchmark x reward model -> EvalResult (sections 4.1 and 5.1)."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from critrm.augment import Budget, augment_pairs, segment_pair, text_encoder
from critrm.benchmarks import find_benchmark, summarise
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, CriticMismatch, DataError
from critrm.metrics import half_credit
from critrm.preferences import read_pairs
from critrm.store import content_hash, disk_errors, from_json, read_records, read_rows, write_records, write_text
from critrm.types import SIDES, Critique, CritiquedPair, EvalResult, Score, Tally

if TYPE_CHECKING:
    from critrm.reward_model import RewardModel

PAIRS_PER_SAVE = 256
"""Rewards are on disk after so many pairs; a killed run loses at most these."""


def evaluate(
    model: "RewardModel",
    pairs: Sequence[CritiquedPair],
    *,
    benchmark: str = "pairs",
    out: str | Path | None = None,
    allow_other_critic: bool = False,
    max_tokens_per_step: int = 4096,
    console: Console | None = None,
) -> EvalResult:
    """Score a benchmark's pairs with a reward model.

    Args:
        model: the reward model.
        pairs: critiqued pairs of the critic that the model was trained with.
        benchmark: whose subsets, sections and headline number to compute; `pairs` has none.
        out: folder that gets `<benchmark>.json` and the rewards, `<benchmark>.scores.jsonl`; rewards that are there
            for the same model, pair and critiques are used again.
        allow_other_critic: score critiques of another critic than the model was trained with.
        max_tokens_per_step: how many tokens are computed at once; does not change the scores.
        console: gets the progress bar; none is shown when None.

    Raises:
        CriticMismatch: the critics differ (section 4.2: train and test match).
        DataError: no pairs, two with one id, or none that is of the benchmark.
        ConfigError: no such benchmark.
        StorageError: the disk is full or read-only.
    """
    critic = _critic(pairs)
    if critic != model.critic and not allow_other_critic:
        raise CriticMismatch(
            f"the reward model was trained with critiques by {model.critic!r}, these are by {critic!r}. "
            "Evaluate with the same critic, or allow it with --allow-other-critic (section 4.2)."
        )
    plain = [item.pair for item in pairs]
    # Before hours of scoring: pairs that cannot be summarised are refused now.
    summarise(plain, [], benchmark=benchmark, model=model.name, critic=critic)
    folder = None if out is None else Path(out)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        task = progress.add_task(f"evaluate {escape(model.critic)} on {benchmark}", total=len(pairs))
        scores = _scores(
            model,
            pairs,
            folder=folder,
            benchmark=benchmark,
            max_tokens_per_step=max_tokens_per_step,
            on_progress=lambda n: progress.update(task, advance=n),
        )
    result = summarise(plain, scores, benchmark=benchmark, model=model.name, critic=critic)
    if folder is not None:
        write_text(folder / f"{benchmark}.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


def _critic(pairs: Sequence[CritiquedPair]) -> str:
    critics = sorted({item.critic for item in pairs})
    if len(critics) != 1:
        raise DataError(f"evaluation needs pairs of one critic, got {critics or 'no pairs'}", field="critic")
    return critics[0]


def _scores(
    model: "RewardModel",
    pairs: Sequence[CritiquedPair],
    *,
    folder: Path | None,
    benchmark: str,
    max_tokens_per_step: int,
    on_progress: Callable[[int], None],
) -> list[Score]:
    """The rewards of the pairs, in their order; those on disk are used again and new ones saved as they come."""
    if folder is None:
        return model.score(pairs, max_tokens_per_step=max_tokens_per_step, on_progress=on_progress)
    path, table, fingerprint = folder / f"{benchmark}.scores.jsonl", find_benchmark(benchmark), model.fingerprint
    keys = {item.pair.id: content_hash(fingerprint, asdict(item)) for item in pairs}
    saved = _saved(path)
    known = {pair_id: saved[key] for pair_id, key in keys.items() if key in saved}
    on_progress(len(known))

    def save() -> None:
        done = [item.pair for item in pairs if item.pair.id in known]
        write_records(path, [_row(known[pair.id], table.subset_of(pair), keys[pair.id]) for pair in done])

    todo = [item for item in pairs if item.pair.id not in known]
    if todo:
        # A result must never lie beside rewards that it was not computed from.
        with disk_errors(folder):
            (folder / f"{benchmark}.json").unlink(missing_ok=True)
    elif len(saved) != len(keys):
        save()
    for start in range(0, len(todo), PAIRS_PER_SAVE):
        part = todo[start : start + PAIRS_PER_SAVE]
        scores = model.score(part, max_tokens_per_step=max_tokens_per_step, on_progress=on_progress)
        known |= {score.pair_id: score for score in scores}
        save()
    return [known[item.pair.id] for item in pairs if item.pair.id in known]


def _row(score: Score, subset: str, key: str) -> dict[str, object]:
    # JSON has no not-a-number: null, which read_scores takes for it, keeps the file readable by other tools.
    chosen, rejected = (None if math.isnan(reward) else reward for reward in (score.chosen, score.rejected))
    rewards = {"chosen": chosen, "rejected": rejected}
    return {"pair_id": score.pair_id, "subset": subset, **rewards, "outcome": score.outcome.value, "key": key}


def _saved(path: Path) -> dict[str, Score]:
    """Key -> rewards of an earlier run; empty where there is none that can be read, since it is then made anew."""
    try:
        return {str(row.get("key")): _score(row) for _, row in read_rows(path)}
    except (DataError, KeyError, TypeError, ValueError):
        return {}


def _score(row: Mapping[str, Any]) -> Score:
    chosen, rejected = (math.nan if row[side] is None else float(row[side]) for side in SIDES)
    return Score(str(row["pair_id"]), chosen, rejected)


def read_scores(path: str | Path) -> list[Score]:
    """Read the rewards that `evaluate` wrote.

    Raises:
        DataError: a row lacks a field; names file and line.
    """
    scores = []
    for number, row in read_rows(path):
        try:
            scores.append(_score(row))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a score ({error})", path=str(path), line=number) from None
    return scores


def read_result(path: str | Path) -> EvalResult:
    """Read the result that `evaluate` wrote.

    Raises:
        DataError: the file is missing, or no result.
    """
    rows = list(read_rows(path))
    try:
        return from_json(EvalResult, rows[0][1])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a result of an evaluation ({error})", path=str(path)) from None


def command(
    model: str,
    pairs: str,
    *,
    out: Path | None = None,
    critiques: Path | None = None,
    critic: str | None = None,
    benchmark: str = "pairs",
    split: str = "",
    source: str = "",
    subset: str = "",
    allow_other_critic: bool = False,
    max_tokens_per_step: int = 4096,
    skip_bad: bool = False,
) -> None:
    """Score pairs with a reward model: strict accuracy by subset and section, ties counted apart.

    Args:
        model: the reward model's folder, or a hub id.
        pairs: the test pairs: a file, a hub id, or an arm that `critrm augment` wrote.
        out: folder for the result and the rewards; the same command goes on where it was interrupted.
        critiques: critiques of the pairs' completions; none for a model trained without.
        critic: the critic's name; the file's unless its rows say otherwise.
        benchmark: whose sections to compute: pairs, llmbar, pandalm or rewardbench.
        split: only pairs of this split.
        source: only pairs of these sources, comma separated.
        subset: only pairs of these subsets, comma separated.
        allow_other_critic: score critiques of another critic than the model was trained with.
        max_tokens_per_step: how many tokens are computed at once.
        skip_bad: leave out rows that cannot be read instead of stopping at the first.
    """
    find_benchmark(benchmark)  # a misspelt name is found before anything is loaded
    console = Console()
    items = _read_augmented(pairs)
    if items is None:
        found = read_pairs(pairs, split=split, source=source, subset=subset, skip_bad=skip_bad)
        _show_counts(console, "rows left out", (row.reason for row in found.skipped))
        augmented = augment_pairs(found.pairs, _by_critic(critiques, critic))
        _show_counts(console, "pairs dropped", augmented.dropped.values())
        items = list(augmented.arms.values())[-1]  # the critic's arm; the No-Critiques arm where there is no critic
    elif critiques or critic or split or source or subset:
        raise ConfigError(f"{pairs} is an arm with its critiques: give no critiques, critic or filter beside it")
    from critrm.reward_model import RewardModel

    loaded = RewardModel.load(model)
    _show_counts(console, "pairs cut to the model's length", _cuts(loaded, items))
    result = evaluate(
        loaded,
        items,
        benchmark=benchmark,
        out=out,
        allow_other_critic=allow_other_critic,
        max_tokens_per_step=max_tokens_per_step,
        console=console,
    )
    console.print(result_table(result))
    if out is not None:
        console.print(f"Result: {out / f'{benchmark}.json'}", soft_wrap=True, markup=False)


def _read_augmented(pairs: str) -> tuple[CritiquedPair, ...] | None:
    """The pairs of an arm's file; None for any other file and for a hub id."""
    if not Path(pairs).is_file():
        return None
    try:
        _, row = next(iter(read_rows(pairs)))
    except DataError:
        return None  # read_pairs says what is wrong with it, or leaves the row out
    return tuple(read_records(pairs, CritiquedPair)) if "pair" in row else None


def _by_critic(critiques: Path | None, critic: str | None) -> dict[str, list[Critique]]:
    if critiques is None:
        if critic is not None:
            raise ConfigError(f"no critiques by {critic!r} are given: add --critiques FILE")
        return {}
    rows = read_critiques(critiques, critic=critic)
    names = sorted({row.critic for row in rows})
    if len(names) > 1:
        raise DataError(f"critiques by {names}: name one with a file of its own", path=str(critiques), field="critic")
    return {names[0]: rows}


def _cuts(model: "RewardModel", items: Iterable[CritiquedPair]) -> list[str]:
    """Which segments the model will not read whole, one entry per pair and segment."""
    encode, budget = text_encoder(model.tokenizer), Budget(model.reads.max_length)
    names = ("prompt", "completion", "critique")
    cuts = (zip(names, segment_pair(item, encode, budget).n_cut, strict=True) for item in items)
    return [f"{name} cut" for each in cuts for name, n_cut in each if n_cut]


def _show_counts(console: Console, title: str, reasons: Iterable[str]) -> None:
    for reason, count in Counter(reasons).most_common():
        console.print(f"{count} {title}: {reason}", style="yellow", markup=False, highlight=False)


def result_table(result: EvalResult) -> Table:
    """One evaluation for the terminal."""
    table = Table(title=f"{escape(result.benchmark)}, model {escape(result.model)}, critic {escape(result.critic)}")
    for index, title in enumerate(("subset", "pairs", "right", "wrong", "tie", "unscored", "strict accuracy")):
        table.add_column(title, justify="left" if index == 0 else "right")
    for name, found in result.subsets.items():
        table.add_row(*_cells(name, found))
    for name, value in result.sections.items():
        table.add_row(f"section {escape(name)}", *[""] * 5, f"{value:.3f}", style="cyan")
    table.add_row(*_cells("all pairs", result.overall), style="bold")
    number = "-" if result.headline_value is None else f"{result.headline_value:.3f}"
    half = half_credit(result.overall) if result.overall.n_tie else None
    table.caption = (
        f"{number} {escape(result.headline)}\n\\[95 % Wilson interval]; a tie is not right"
        + (f" (all pairs with half credit for ties: {half:.3f})" if half is not None else "")
        + ("; unscored pairs are left out" if result.overall.n_unscored else "")
    )
    return table


def _cells(name: str, found: Tally) -> tuple[str, ...]:
    n = found.n_right + found.n_wrong + found.n_tie + found.n_unscored
    counts = tuple(str(each) for each in (n, found.n_right, found.n_wrong, found.n_tie, found.n_unscored))
    accuracy = found.accuracy
    text = f"{accuracy.value:.3f} \\[{accuracy.low:.2f}, {accuracy.high:.2f}]" if accuracy else "-"
    return (escape(name), *counts, text)
