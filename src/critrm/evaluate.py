"""Stage 4: benchmark x reward model -> EvalResult (sections 4.1 and 5.1)."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from critrm.arm_files import only_critic, read_arm, read_training_arm, refuse_shared, with_dropped
from critrm.augment import augment_pairs, segment_pair, text_encoder
from critrm.benchmarks import find_benchmark, level_identical, read_benchmark, summarise
from critrm.benchmarks.rewardbench import official_files
from critrm.critique_files import critiques_by_one
from critrm.diagnostics import diagnose, diagnostics_table, result_table
from critrm.errors import ConfigError, CriticMismatch, DataError, ModelError
from critrm.overlap import overlap_warning
from critrm.probe import probe as run_probe
from critrm.probe import probe_json, probe_table
from critrm.score_files import read_result as read_result
from critrm.score_files import read_scores as read_scores
from critrm.score_files import saved_scores, score_row
from critrm.store import content_hash, disk_errors, file_name, write_records, write_text
from critrm.types import NO_CRITIC, Critique, CritiquedPair, EvalResult, Outcome, PreferencePair, Score

if TYPE_CHECKING:
    from critrm.averaging import SampleAveraged
    from critrm.reward_model import RewardModel
    from critrm.zero_label import ZeroLabelModel

    Model = RewardModel | SampleAveraged | ZeroLabelModel

ZERO_LABEL = ("zero-label", "zero-label-alone")
"""Before a colon and a backbone's name: the backbone untrained; the second one reads the critiques alone."""
PAIRS_PER_SAVE = 256
"""Rewards are on disk after so many pairs; a killed run loses at most these."""


def evaluate(
    model: "Model",
    pairs: Sequence[CritiquedPair],
    *,
    benchmark: str = "pairs",
    whole: Sequence[PreferencePair] = (),
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
        whole: where lists are counted, all pairs of the lists, those that were dropped (such as for want of a critique)
            included: a list that lacks one is unscored, since it would be easier than it is. `pairs` when empty.
        out: folder that gets `<benchmark>.json`, `<benchmark>.statistics.json` (see `diagnostics.diagnose`) and the
            rewards, `<benchmark>.scores.jsonl`; rewards that are there for the same model, pair and critiques are used
            again. For RewardBench, also `rewardbench/` with the files that its own script writes.
        train_items: the arm's training pairs, none of them in `pairs`, for the null baselines that are fitted.
        critiques: recorded critiques with the critic's own score, for the baseline that reads it.
        allow_other_critic: score critiques of another critic than the model was trained with.
        max_tokens_per_step: how many tokens are computed at once; does not change the scores.
        console: gets the progress bar; none is shown when None.

    Raises:
        CriticMismatch: the critics differ (section 4.2: train and test match).
        DataError: no pairs, two with one id, none that is of the benchmark, one that is not in `whole`, or one that is
            in `train_items`.
        ConfigError: no such benchmark.
        StorageError: the disk is full or read-only.
    """
    refuse_shared(train_items, pairs)
    result, scores = score_benchmark(
        model,
        pairs,
        benchmark=benchmark,
        whole=whole,
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
    model: "Model",
    pairs: Sequence[CritiquedPair],
    *,
    benchmark: str = "pairs",
    whole: Sequence[PreferencePair] = (),
    out: str | Path | None = None,
    allow_other_critic: bool = False,
    max_tokens_per_step: int = 4096,
    console: Console | None = None,
) -> tuple[EvalResult, list[Score]]:
    """`evaluate` without the statistics: the result, and the rewards that it was computed from."""
    critic = only_critic(pairs)
    without = critic == NO_CRITIC and model.scores_without_critiques
    if critic != model.critic and not without and not allow_other_critic:
        raise CriticMismatch(
            f"the reward model was trained with critiques by {model.critic!r}, these are by {critic!r}. "
            "Evaluate with the same critic, or allow it with --allow-other-critic (section 4.2)."
        )
    plain = [item.pair for item in pairs]
    counted = whole if whole and find_benchmark(benchmark).counts_lists else plain
    # Before hours of scoring: pairs that cannot be summarised are refused now.
    unknown = [Score(pair.id, math.nan, math.nan) for pair in plain]
    summarise(counted, unknown, benchmark=benchmark, model=model.name, critic=critic)
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
    result = summarise(counted, scores, benchmark=benchmark, model=model.name, critic=critic)
    if folder is not None:
        _write_json(folder / f"{benchmark}.json", asdict(result))
        if benchmark == "rewardbench":
            for place, content in official_files(plain, scores, model=model.name).items():
                text = json.dumps(content, indent=4, sort_keys=True) + "\n"
                write_text(folder / "rewardbench" / place / f"{file_name(model.name)}.json", text)
    return result, scores


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _scores(
    model: "Model",
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
        return level_identical([item.pair for item in pairs], scores)
    path, table, fingerprint = folder / f"{benchmark}.scores.jsonl", find_benchmark(benchmark), model.fingerprint
    keys = {item.pair.id: content_hash(fingerprint, item.content()) for item in pairs}
    saved = saved_scores(path)
    known = {pair_id: saved[key] for pair_id, key in keys.items() if key in saved}
    on_progress(len(known))

    def save() -> None:
        done = [item.pair for item in pairs if item.pair.id in known]
        write_records(path, [score_row(known[pair.id], table.subset_of(pair), keys[pair.id]) for pair in done])

    todo = [item for item in pairs if item.pair.id not in known]
    if todo or len(saved) != len(keys):
        # A result must never lie beside rewards that it was not computed from.
        with disk_errors(folder):
            for ending in (".json", ".statistics.json", ".probe.json"):
                (folder / f"{benchmark}{ending}").unlink(missing_ok=True)
    if not todo and len(saved) != len(keys):
        save()
    for start in range(0, len(todo), PAIRS_PER_SAVE):
        part = todo[start : start + PAIRS_PER_SAVE]
        scores = model.score(part, max_tokens_per_step=max_tokens_per_step, on_progress=on_progress)
        known |= {score.pair_id: score for score in level_identical([item.pair for item in part], scores)}
        save()
    return [known[item.pair.id] for item in pairs if item.pair.id in known]


def command(
    model: str,
    pairs: str,
    *,
    out: Path | None = None,
    critiques: Path | None = None,
    critic: str | None = None,
    benchmark: str = "pairs",
    train: str = "",
    zero_label: bool = True,
    backbone: str = "",
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
        model: the reward model's folder, or a hub id. Or `zero-label:BACKBONE`, a language model that has seen no
            preference: how much likelier does it call a response good than bad? `zero-label-alone:BACKBONE` reads the
            critiques alone.
        pairs: the test pairs: a file, a hub id, or an arm that `critrm augment` wrote.
        out: folder for the result and the rewards; the same command goes on where it was interrupted.
        critiques: critiques of the pairs' completions; none for a model trained without.
        critic: the critic's name; the file's unless its rows say otherwise.
        benchmark: whose sections to compute: pairs, llmbar, pandalm, rewardbench, rewardbench2, rmbench, judgebench or
            best-of-n.
        train: the arm's training pairs, as `critrm augment` wrote them; the bag-of-words baselines learn from them.
            None may be among the test pairs.
        zero_label: lay what the reward model's backbone says untrained beside it, too.
        backbone: that backbone's name, where the model's folder does not know it.
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
    items, recorded = read_arm(pairs), dict[str, list[Critique]]()
    if items is None:
        found = read_benchmark(
            pairs,
            benchmark=benchmark,
            dialect=dialect,
            split=split,
            source=source,
            subset=subset,
            skip_bad=skip_bad,
        )
        _show_counts(console, "rows left out", (row.reason for row in found.skipped))
        if critiques is not None:
            name, rows = critiques_by_one(critiques, critic=critic)
            recorded = {name: rows}
        elif critic is not None:
            raise ConfigError(f"no critiques by {critic!r} are given: add --critiques FILE")
        augmented = augment_pairs(found.pairs, recorded)
        _show_counts(console, "pairs dropped", augmented.dropped.values())
        items = list(augmented.arms.values())[-1]  # the critic's arm; the No-Critiques arm where there is no critic
        whole = found.pairs
    elif critiques or critic or split or source or subset or dialect != "auto":
        raise ConfigError(f"{pairs} is an arm with its critiques: give no critiques, critic or filter beside it")
    else:
        whole = with_dropped(items, Path(pairs).with_name("augment.json"))
    train_items = read_training_arm(train, items) if train else ()
    if warning := overlap_warning([item.pair for item in train_items], [item.pair for item in items], name=pairs):
        console.print(warning, style="yellow", markup=False, highlight=False)
    if probe and items[0].critic == NO_CRITIC:
        raise ConfigError("--probe asks whether critiques are read: give the critiques of the pairs with --critiques")
    loaded = _load(model, critic=items[0].critic)
    _show_counts(console, "pairs cut to the model's length", _cuts(loaded, items))
    result, scores = score_benchmark(
        loaded,
        items,
        benchmark=benchmark,
        whole=whole,
        out=out,
        allow_other_critic=allow_other_critic,
        max_tokens_per_step=max_tokens_per_step,
        console=console,
    )
    console.print(result_table(result))
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
    reads = loaded.reads
    del loaded  # the backbone takes its place in memory
    readings: Mapping[str, Sequence[Outcome]] = {}
    if zero_label and not _is_untrained(model):
        readings = _ask_backbone(
            items,
            backbone=backbone or reads.backbone,
            max_length=reads.max_length,
            max_tokens_per_step=max_tokens_per_step,
            path=out / f"{benchmark}.zero-label.jsonl" if out is not None else None,
            console=console,
        )
    own = [row for rows in recorded.values() for row in rows]
    statistics = diagnose(
        items, scores, benchmark=benchmark, train_items=train_items, critiques=own, zero_label=readings
    )
    console.print(diagnostics_table(statistics))
    if out is not None:
        _write_json(out / f"{benchmark}.statistics.json", statistics)
        console.print(f"Result: {out / f'{benchmark}.json'}", soft_wrap=True, markup=False)


def _is_untrained(model: str) -> bool:
    return ":" in model and model.partition(":")[0] in ZERO_LABEL


def _load(model: str, *, critic: str) -> "Model":
    if _is_untrained(model):
        from critrm.zero_label import ZeroLabelModel

        kind, _, backbone = model.partition(":")
        return ZeroLabelModel.load(backbone, critic=critic, critique_only=kind == ZERO_LABEL[1])
    from critrm.reward_model import RewardModel

    return RewardModel.load(model)


def _ask_backbone(
    items: Sequence[CritiquedPair], *, backbone: str, console: Console, **how: Any
) -> Mapping[str, Sequence[Outcome]]:
    """The zero-label baselines; nothing where the backbone cannot be asked, which is said."""
    from critrm.zero_label import zero_label_scores

    reason = "name the model's backbone with --backbone"
    if backbone:
        try:
            found = zero_label_scores(items, backbone=backbone, console=console, **how)
            return {name: [score.outcome for score in scores] for name, scores in found.items()}
        except (DataError, ModelError) as error:  # a null baseline is no reason to lose an evaluation
            reason = str(error)
    console.print(f"No zero-label baseline: {reason}", style="yellow", markup=False, highlight=False)
    return {}


def _cuts(model: "Model", items: Iterable[CritiquedPair]) -> list[str]:
    """Which segments the model will not read whole, one entry per pair and segment."""
    # What the model puts before the prompt counts towards its length.
    encode = text_encoder(model.tokenizer)
    budget = replace(model.reads.budget, max_length=model.reads.max_length - model.n_special)
    names = ("prompt", "completion", "critique")
    cuts = (zip(names, segment_pair(item, encode, budget).n_cut, strict=True) for item in items)
    return [f"{name} cut" for each in cuts for name, n_cut in each if n_cut]


def _show_counts(console: Console, title: str, reasons: Iterable[str]) -> None:
    for reason, count in Counter(reasons).most_common():
        console.print(f"{count} {title}: {reason}", style="yellow", markup=False, highlight=False)
