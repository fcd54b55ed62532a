"""Stage 4: benchmark x reward model -> EvalResult (sections 4.1 and 5.1)."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from critrm.augment import Budget, augment_pairs, file_name, segment_pair, text_encoder
from critrm.benchmarks import find_benchmark, summarise
from critrm.benchmarks.rewardbench import official_files
from critrm.critique_files import read_critiques
from critrm.diagnostics import diagnose, diagnostics_table, result_table
from critrm.errors import ConfigError, CriticMismatch, DataError
from critrm.preferences import read_pairs
from critrm.probe import probe as run_probe
from critrm.probe import probe_json, probe_table
from critrm.score_files import read_result as read_result
from critrm.score_files import read_scores as read_scores
from critrm.score_files import saved_scores, score_row
from critrm.store import content_hash, disk_errors, read_records, read_rows, write_records, write_text
from critrm.types import NO_CRITIC, Critique, CritiquedPair, EvalResult, Score

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
    train_items: Sequence[CritiquedPair] = (),
    critiques: Sequence[Critique] = (),
    allow_other_critic: bool = False,
    max_tokens_per_step: int = 4096,
    console: Console | None = None,
) -> EvalResult:
    """Score a benchmark's pairs with a reward model.

    Args:
        model: the reward model.
        pairs: critiqued pairs of the critic that the model was trained with.
        benchmark: whose subsets, sections and headline number to compute; `pairs` has none.
        out: folder that gets `<benchmark>.json`, `<benchmark>.statistics.json` (see `diagnostics.diagnose`) and the
            rewards, `<benchmark>.scores.jsonl`; rewards that are there for the same model, pair and critiques are used
            again. For RewardBench, also `rewardbench/` with the files that its own script writes.
        train_items: the arm's training pairs, for the null baselines that are fitted.
        critiques: recorded critiques with the critic's own score, for the baseline that reads it.
        allow_other_critic: score critiques of another critic than the model was trained with.
        max_tokens_per_step: how many tokens are computed at once; does not change the scores.
        console: gets the progress bar; none is shown when None.

    Raises:
        CriticMismatch: the critics differ (section 4.2: train and test match).
        DataError: no pairs, two with one id, or none that is of the benchmark.
        ConfigError: no such benchmark.
        StorageError: the disk is full or read-only.
    """
    result, scores = score_benchmark(
        model,
        pairs,
        benchmark=benchmark,
        out=out,
        allow_other_critic=allow_other_critic,
        max_tokens_per_step=max_tokens_per_step,
        console=console,
    )
    if out is not None:
        statistics = diagnose(pairs, scores, benchmark=benchmark, train_items=train_items, critiques=critiques)
        _write_json(Path(out) / f"{benchmark}.statistics.json", statistics)
    return result


def score_benchmark(
    model: "RewardModel",
    pairs: Sequence[CritiquedPair],
    *,
    benchmark: str = "pairs",
    out: str | Path | None = None,
    allow_other_critic: bool = False,
    max_tokens_per_step: int = 4096,
    console: Console | None = None,
) -> tuple[EvalResult, list[Score]]:
    """`evaluate` without the statistics: the result, and the rewards that it was computed from."""
    critic = _critic(pairs)
    without = critic == NO_CRITIC and model.scores_without_critiques
    if critic != model.critic and not without and not allow_other_critic:
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
        _write_json(folder / f"{benchmark}.json", asdict(result))
        if benchmark == "rewardbench":
            for place, content in official_files(plain, scores, model=model.name).items():
                text = json.dumps(content, indent=4, sort_keys=True) + "\n"
                write_text(folder / "rewardbench" / place / f"{file_name(model.name)}.json", text)
    return result, scores


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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
        scores = model.score(pairs, max_tokens_per_step=max_tokens_per_step, on_progress=on_progress)
        return _level(pairs, scores)
    path, table, fingerprint = folder / f"{benchmark}.scores.jsonl", find_benchmark(benchmark), model.fingerprint
    keys = {item.pair.id: content_hash(fingerprint, asdict(item)) for item in pairs}
    saved = saved_scores(path)
    known = {pair_id: saved[key] for pair_id, key in keys.items() if key in saved}
    on_progress(len(known))

    def save() -> None:
        done = [item.pair for item in pairs if item.pair.id in known]
        write_records(path, [score_row(known[pair.id], table.subset_of(pair), keys[pair.id]) for pair in done])

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
        known |= {score.pair_id: score for score in _level(part, scores)}
        save()
    return [known[item.pair.id] for item in pairs if item.pair.id in known]


def _level(pairs: Sequence[CritiquedPair], scores: Sequence[Score]) -> list[Score]:
    """The scores, with equal rewards where both completions are the same text: a tie, whatever the rounding."""
    same = {item.pair.id for item in pairs if item.pair.chosen.strip() == item.pair.rejected.strip()}
    return [Score(each.pair_id, each.chosen, each.chosen) if each.pair_id in same else each for each in scores]


def command(
    model: str,
    pairs: str,
    *,
    out: Path | None = None,
    critiques: Path | None = None,
    critic: str | None = None,
    benchmark: str = "pairs",
    train: str = "",
    probe: bool = False,
    dialect: str = "auto",
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
        benchmark: whose sections to compute: pairs, llmbar, pandalm, rewardbench, rewardbench2, rmbench, judgebench or
            best-of-n.
        train: the arm's training pairs, as `critrm augment` wrote them; the bag-of-words baselines learn from them.
        probe: also score the pairs with swapped, shuffled, removed, negated and flattering critiques, and with an
            instruction injected into the rejected completion: is the critique read?
        dialect: the format of the pairs; told from the columns when not given.
        split: only pairs of this split.
        source: only pairs of these sources, comma separated.
        subset: only pairs of these subsets, comma separated.
        allow_other_critic: score critiques of another critic than the model was trained with.
        max_tokens_per_step: how many tokens are computed at once.
        skip_bad: leave out rows that cannot be read instead of stopping at the first.
    """
    find_benchmark(benchmark)  # a misspelt name is found before anything is loaded
    console = Console()
    items, recorded = _read_augmented(pairs), dict[str, list[Critique]]()
    if items is None:
        found = read_pairs(
            pairs,
            dialect=dialect,
            split=split,
            source=source,
            subset=subset,
            skip_bad=skip_bad,
            # The published counts of benchmarks hold such rows.
            allow_empty=benchmark != "pairs",
        )
        _show_counts(console, "rows left out", (row.reason for row in found.skipped))
        recorded = _by_critic(critiques, critic)
        augmented = augment_pairs(found.pairs, recorded)
        _show_counts(console, "pairs dropped", augmented.dropped.values())
        items = list(augmented.arms.values())[-1]  # the critic's arm; the No-Critiques arm where there is no critic
    elif critiques or critic or split or source or subset or dialect != "auto":
        raise ConfigError(f"{pairs} is an arm with its critiques: give no critiques, critic or filter beside it")
    train_items = _train_items(train, items)
    if probe and items[0].critic == NO_CRITIC:
        raise ConfigError("--probe asks whether critiques are read: give the critiques of the pairs with --critiques")
    from critrm.reward_model import RewardModel

    loaded = RewardModel.load(model)
    _show_counts(console, "pairs cut to the model's length", _cuts(loaded, items))
    result, scores = score_benchmark(
        loaded,
        items,
        benchmark=benchmark,
        out=out,
        allow_other_critic=allow_other_critic,
        max_tokens_per_step=max_tokens_per_step,
        console=console,
    )
    own = [row for rows in recorded.values() for row in rows]
    statistics = diagnose(items, scores, benchmark=benchmark, train_items=train_items, critiques=own)
    console.print(result_table(result))
    console.print(diagnostics_table(statistics))
    if out is not None:
        _write_json(out / f"{benchmark}.statistics.json", statistics)
    if probe:
        probed = run_probe(
            loaded,
            items,
            benchmark=benchmark,
            max_tokens_per_step=max_tokens_per_step,
            on_probe=lambda name: console.print(f"probe: {name}", highlight=False),
        )
        console.print(probe_table(probed))
        if out is not None:
            _write_json(out / f"{benchmark}.probe.json", probe_json(probed))
    if out is not None:
        console.print(f"Result: {out / f'{benchmark}.json'}", soft_wrap=True, markup=False)


def _train_items(train: str, items: Sequence[CritiquedPair]) -> tuple[CritiquedPair, ...]:
    if not train:
        return ()
    found = _read_augmented(train)
    if found is None:
        raise DataError("not an arm that `critrm augment` wrote", path=train)
    if _critic(found) != items[0].critic:
        raise CriticMismatch(f"--train {train} is of critic {_critic(found)!r}, the pairs are of {items[0].critic!r}")
    return found


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
