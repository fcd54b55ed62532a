"""Stage 4: benchmark x reward model -> EvalResult (sections 4.1 and 5.1)."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from critrm.augment import augment_pairs
from critrm.benchmarks import BENCHMARKS
from critrm.critique import read_critiques
from critrm.errors import ConfigError, CriticMismatch, DataError
from critrm.metrics import section_scores, tally
from critrm.preferences import read_pairs
from critrm.reward_model import RewardModel
from critrm.store import content_hash, mark_stage_done, read_rows, stage_is_done, write_records, write_text
from critrm.types import NO_CRITIC, CritiquedPair, EvalResult, PreferencePair, Score, Tally


def evaluate(
    model: RewardModel,
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
            for the same model and pairs are used again.
        allow_other_critic: score critiques of another critic than the model was trained with.
        max_tokens_per_step: how many tokens are computed at once; does not change the scores.
        console: gets the progress bar; none is shown when None.

    Raises:
        CriticMismatch: the critics differ (section 4.2: train and test match).
        DataError: no pairs, or two with one id.
        ConfigError: no such benchmark.
    """
    if benchmark not in BENCHMARKS:
        raise ConfigError(f"no benchmark {benchmark!r}; there is {', '.join(BENCHMARKS)}")
    critic = _critic(pairs)
    if critic != model.critic and not allow_other_critic:
        raise CriticMismatch(
            f"the reward model was trained with critiques by {model.critic!r}, these are by {critic!r}. "
            "Evaluate with the same critic, or allow it with --allow-other-critic (section 4.2)."
        )
    scores = _scores(model, pairs, benchmark, out, max_tokens_per_step, console)
    result = summarise([item.pair for item in pairs], scores, benchmark=benchmark, model=model.name, critic=critic)
    if out is not None:
        write_text(Path(out) / f"{benchmark}.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


def _critic(pairs: Sequence[CritiquedPair]) -> str:
    critics = sorted({item.critic for item in pairs})
    if len(critics) != 1:
        raise DataError(f"evaluation needs pairs of one critic, got {critics or 'no pairs'}", field="critic")
    return critics[0]


def _scores(
    model: RewardModel,
    pairs: Sequence[CritiquedPair],
    benchmark: str,
    out: str | Path | None,
    max_tokens_per_step: int,
    console: Console | None,
) -> list[Score]:
    path = Path(out) / f"{benchmark}.scores.jsonl" if out is not None else None
    fingerprint = content_hash(model.fingerprint, [asdict(item) for item in pairs])
    if path is not None and stage_is_done(path.parent / f".{benchmark}", fingerprint) and path.is_file():
        return read_scores(path)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        task = progress.add_task(f"evaluate {model.critic} on {benchmark}", total=len(pairs))
        scores = model.score(
            pairs, max_tokens_per_step=max_tokens_per_step, on_progress=lambda n: progress.update(task, advance=n)
        )
    if path is not None:
        rows = (
            {"pair_id": score.pair_id, "subset": item.pair.subset or item.pair.source, "chosen": score.chosen,
             "rejected": score.rejected, "outcome": score.outcome.value}
            for item, score in zip(pairs, scores, strict=True)
        )  # fmt: skip
        write_records(path, rows)
        mark_stage_done(path.parent / f".{benchmark}", fingerprint)
    return scores


def summarise(
    pairs: Sequence[PreferencePair], scores: Sequence[Score], *, benchmark: str, model: str, critic: str
) -> EvalResult:
    """Count outcomes by subset and section, and name the headline number."""
    table = BENCHMARKS[benchmark]
    by_id = {score.pair_id: score.outcome for score in scores}
    if len(by_id) != len(pairs):
        raise DataError(f"{len(pairs)} pairs but {len(by_id)} different ids; ids must be unique", field="id")
    outcomes: dict[str, list[object]] = {}
    for pair in pairs:
        outcomes.setdefault(table.subset_name(pair.subset or pair.source) or "all", []).append(by_id[pair.id])
    subsets = {name: tally(found) for name, found in outcomes.items()}  # type: ignore[arg-type]
    overall = tally(by_id.values())
    sections = section_scores(subsets, table.sections, weights=table.weights)
    missing = [name for names in table.sections.values() for name in names if name not in subsets]
    if benchmark == "rewardbench" and sections:
        headline = sum(sections.values()) / len(sections)
    else:
        headline = overall.accuracy.value if overall.accuracy else None
    return EvalResult(
        benchmark=table.title + (f" (partial: without {', '.join(missing)})" if missing else ""),
        model=model,
        critic=critic,
        overall=overall,
        subsets=subsets,
        sections=sections,
        headline=table.headline,
        headline_value=headline,
    )


def read_scores(path: str | Path) -> list[Score]:
    """Read the rewards that `evaluate` wrote.

    Raises:
        DataError: a row lacks a field; names file and line.
    """
    scores = []
    for number, row in read_rows(path):
        try:
            scores.append(Score(str(row["pair_id"]), float(row["chosen"]), float(row["rejected"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a score ({error})", path=str(path), line=number) from None
    return scores


def command(
    model: str,
    pairs: str,
    *,
    out: Path,
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
        model: the reward model's folder.
        pairs: the test pairs: a file or a hub id.
        out: folder for the result and the rewards.
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
    found = read_pairs(pairs, split=split, source=source, subset=subset, skip_bad=skip_bad).pairs
    rows = read_critiques(critiques, critic=critic) if critiques else []
    named = {name: [row for row in rows if row.critic == name] for name in {row.critic for row in rows}}
    if len(named) > 1:
        raise DataError(f"critiques by {sorted(named)}: give one critic's", path=str(critiques), field="critic")
    augmented = augment_pairs(found, named)
    console = Console()
    for reason in sorted(set(augmented.dropped.values())):
        console.print(f"[yellow]Dropped:[/] {reason}", highlight=False)
    result = evaluate(
        RewardModel.load(model),
        augmented.arms[next(iter(named), NO_CRITIC)],
        benchmark=benchmark,
        out=out,
        allow_other_critic=allow_other_critic,
        max_tokens_per_step=max_tokens_per_step,
        console=console,
    )
    console.print(result_table(result))
    console.print(f"Result: {out / f'{benchmark}.json'}", soft_wrap=True)


def result_table(result: EvalResult) -> Table:
    """One evaluation for the terminal."""
    table = Table(title=f"{result.benchmark}, critic {result.critic}")
    for index, title in enumerate(("subset", "right", "wrong", "tie", "unscored", "strict accuracy")):
        table.add_column(title, justify="left" if index == 0 else "right")
    for name, found in result.subsets.items():
        table.add_row(*_row(name, found))
    for name, value in result.sections.items():
        table.add_row(f"section {name}", "", "", "", "", f"{value:.3f}", style="cyan")
    table.add_row(*_row("all", result.overall), style="bold")
    if result.headline_value is not None:
        table.caption = f"{result.headline}: {result.headline_value:.3f}; [95 % Wilson interval]; a tie is not right"
    return table


def _row(name: str, found: Tally) -> tuple[str, ...]:
    counts = tuple(str(n) for n in (found.n_right, found.n_wrong, found.n_tie, found.n_unscored))
    accuracy = found.accuracy
    text = f"{accuracy.value:.3f} [{accuracy.low:.2f}, {accuracy.high:.2f}]" if accuracy else "-"
    return (name, *counts, text)
