"""What a study will take, before it starts: trainings, tokens, hours, and what its critics cost."""

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from critrm.benchmarks import read_source
from critrm.budget import CHARACTERS_PER_TOKEN, Estimate, estimates_table
from critrm.calls import estimate_jobs, jobs_of
from critrm.config import CritiqueConfig, Recipe, data_path
from critrm.critics import complete_critics
from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.critique_files import read_critiques
from critrm.errors import CritrmError
from critrm.preferences import read_pairs
from critrm.store import content_hash, file_name
from critrm.study_plan import Cell, plan_study
from critrm.types import NO_CRITIC, PreferencePair

UTILISATION = 0.4
"""Share of a machine's matrix product rate that training reaches."""
FLOPS_TRAIN, FLOPS_SCORE = 6, 2
"""Operations per parameter and token: forward and backward, and forward alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellEstimate:
    """What one cell of a study will take."""

    cell: Cell
    n_arms: int
    n_trainings: int
    n_done: int
    tokens: float
    """That the trainings left to do read; the cell's own share of the test sets apart."""
    hours: float | None
    """Of one worker; None where the backbone's size is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyEstimate:
    """What a study will take."""

    cells: tuple[CellEstimate, ...]
    critics: tuple[Estimate, ...]
    """Over all pairs of the study; calls for pairs that are not there yet are extrapolated from those that are."""
    basis: str
    """How the hours were estimated."""


def estimate_study(recipe: Recipe, *, out: str | Path, tflops: float | None = None) -> StudyEstimate:
    """Plan a study and say what it will take; nothing is run and nobody is called.

    Args:
        recipe: with a `study`.
        out: the study's folder; what is finished there is not counted.
        tflops: what one worker computes at best, in TFLOP/s; this machine is measured when None.

    Raises:
        CritrmError: as `plan_study` says.
    """
    cells = plan_study(recipe, out=out, short=True)
    rate = (tflops or _measured_tflops()) * 1e12 * UTILISATION
    tests = [pair for source in recipe.preferences.test.values() for pair in read_source(source).pairs]
    assert recipe.study is not None
    sizes = {
        backbone: recipe.study.n_parameters.get(backbone) or n_parameters(backbone)
        for backbone in {cell.backbone for cell in cells}
    }
    read: dict[tuple[str, ...], int] = {}
    trained: set[str] = set()
    found = [_estimate_cell(cell, tests, read, trained, n_parameters=sizes[cell.backbone], rate=rate) for cell in cells]
    source = "given" if tflops else "measured here"
    return StudyEstimate(
        cells=tuple(found),
        critics=tuple(_critics(recipe, cells, tests)),
        basis=f"{rate / 1e12:.2f} TFLOP/s: {UTILISATION:.0%} of the matrix product rate {source}; learning-rate trials "
        "and the critics' own time are not in it",
    )


def _estimate_cell(
    cell: Cell,
    tests: Sequence[PreferencePair],
    read: dict[tuple[str, ...], int],
    trained: set[str],
    *,
    n_parameters: float | None,
    rate: float,
) -> CellEstimate:
    """What a cell will take.

    `read` notes how many pairs of which texts a frozen backbone will have read by then, `trained` the arms without
    critiques that other cells will have trained.
    """
    config = cell.recipe
    drawn_from = read_pairs(config.preferences.train.path).pairs
    pairs = drawn_from[: cell.n_train]
    # Draws are of the same pairs in another order.
    every = content_hash(sorted(pair.id for pair in drawn_from))
    seeds = config.train.seeds
    tokens = flops_tokens = 0.0
    n_done = 0
    for critic in (NO_CRITIC, *cell.arms):
        marks = cell.folder / "evaluate" / file_name(critic)
        left = sum(not (marks / f"seed-{seed}" / "done.json").is_file() for seed in seeds)
        n_done += len(seeds) - left
        if critic == NO_CRITIC:
            settings = config.train.of_arm(critic), config.augment, config.preferences.test
            same = content_hash([pair.id for pair in pairs], *settings)
            left *= same not in trained
            trained.add(same)
        critique = _critique_tokens(config.critique, critic) if critic != NO_CRITIC else 0.0
        n_train, n_tests, per_token = cell.n_train * config.train.n_epochs, len(tests), FLOPS_TRAIN
        if config.train.frozen:
            # Whatever else a grid changes, the texts are those that others read as well.
            how = content_hash(cell.backbone, config.augment.max_length, config.train.of_arm(critic).critique_first)
            n_train = _not_read_yet(n_train, read, how, critic, every)
            n_tests = _not_read_yet(n_tests, read, how, critic)
            # A mixture's texts are those of its critics, which are arms of the cell as well.
            left, per_token = min(left, 1) * (critic not in config.critique.mixtures), FLOPS_SCORE
        train = n_train * (_mean_tokens(pairs) + 2 * critique)
        score = n_tests * (_mean_tokens(tests) + 2 * critique)
        tokens += left * train
        flops_tokens += left * (per_token * train + FLOPS_SCORE * score)
    return CellEstimate(
        cell=cell,
        n_arms=1 + len(cell.arms),
        n_trainings=len(seeds) * (1 + len(cell.arms)),
        n_done=n_done,
        tokens=tokens,
        hours=None if n_parameters is None else n_parameters * flops_tokens / rate / 3600,
    )


def _not_read_yet(n_pairs: int, read: dict[tuple[str, ...], int], *texts: str) -> int:
    """How many of so many pairs of these texts a frozen backbone has yet to read: see `readings`."""
    known, read[texts] = read.get(texts, 0), max(n_pairs, read.get(texts, 0))
    return max(n_pairs - known, 0)


def _mean_tokens(pairs: Sequence[PreferencePair]) -> float:
    """Tokens of a pair: its prompt once, and both completions."""
    lengths = [
        sum(len(message.content) for message in pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs
    ]
    return statistics.fmean(lengths) / CHARACTERS_PER_TOKEN


def _critique_tokens(stage: CritiqueConfig, arm: str) -> float:
    """Tokens of one critique: the mean of a file's, or the most that a model may write."""
    if arm in stage.mixtures:
        return sum(share * _critique_tokens(stage, name) for name, share in stage.mixtures[arm].items())
    critic = stage.critics[arm]
    if not critic.files:
        return float(critic.max_tokens)
    texts = [len(row.text) for file in critic.files for row in read_critiques(data_path(file), critic="critic")]
    return statistics.fmean(texts) / CHARACTERS_PER_TOKEN


def n_parameters(backbone: str) -> float | None:
    """A backbone's parameters: from its files where they are here, else from a size in its name ("7b"); or None."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from critrm.models import resolve

    auto: Any = AutoModelForCausalLM  # untyped where it matters
    try:
        config = AutoConfig.from_pretrained(str(resolve(backbone)), local_files_only=True)
        with init_empty_weights():
            model = auto.from_config(config)
        return float(sum(each.numel() for each in model.parameters()))
    except (OSError, ValueError, CritrmError):
        found = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", backbone.rsplit("/", 1)[-1].lower())
        return float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]] if found else None


def _measured_tflops() -> float:
    """The rate of a large matrix product on this machine, in the precision that training takes here."""
    import torch

    from critrm.models import choose_device, choose_precision

    device = choose_device()
    dtype = torch.bfloat16 if choose_precision(device) == "bf16" else torch.float32
    size, best = 1536, float("inf")
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(5):
        started = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def _critics(recipe: Recipe, cells: Sequence[Cell], tests: Sequence[PreferencePair]) -> list[Estimate]:
    """Each critic's calls over the largest training set that it critiques, and the tests."""
    found = []
    with CritiqueCache(default_cache_path()) as cache:
        for name, settings in complete_critics(recipe.critique, backbone=recipe.train.backbone).items():
            asked = [cell for cell in cells if name in cell.arms]
            if settings.files or not asked:
                continue
            largest = max(asked, key=lambda cell: cell.n_train)
            train = read_pairs(largest.recipe.preferences.train.path, limit=largest.n_train).pairs
            n_averaged = max(cell.recipe.evaluate.samples for cell in asked)
            jobs = jobs_of(settings, train, tests, n_averaged=n_averaged)
            rows = estimate_jobs(jobs, critic=name, cache=cache)
            # The first is about the training pairs, which may not all be there.
            n_there = len(jobs[0][0])
            found += [_scaled(rows[0], (n_there - len(train) + largest.n_train) / n_there), *rows[1:]]
    return found


def _scaled(row: Estimate, factor: float) -> Estimate:
    """An estimate over more pairs than there are to count."""
    if factor == 1:
        return row

    def times(value: float | None) -> float | None:
        return None if value is None else value * factor

    return Estimate(
        critic=row.critic,
        n_calls=round(row.n_calls * factor),
        n_cached=row.n_cached,
        tokens_in=round(row.tokens_in * factor),
        tokens_out=round(row.tokens_out * factor),
        most_tokens_out=round(row.most_tokens_out * factor),
        cost=times(row.cost),
        most_cost=times(row.most_cost),
        paid=row.paid,
        basis=f"{row.basis}, for {factor:.3g} times the pairs that are there",
    )


def estimate_tables(found: StudyEstimate, *, workers: int = 1) -> list[Table]:
    """The plan for the terminal: its cells, and what the critics cost."""
    names = {each.cell.backbone: each.cell.backbone.rsplit("/", 1)[-1] for each in found.cells}
    only = next(iter(names.values())) if len(names) == 1 else ""
    title = Text("Nothing is run yet" + (f"; backbone {only}" if only else ""))
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    known = [each.hours for each in found.cells if each.hours is not None]
    total = f"{_hours(sum(known))} of one worker" + (
        f", about {_hours(sum(known) / workers)} with {workers}" if workers > 1 else ""
    )
    unknown = "" if len(known) == len(found.cells) else " without the backbones whose size is not known (?)"
    table.caption, table.caption_justify = Text(f"In all {total}{unknown}, at {found.basis}."), "left"
    for name in ("grid", *(() if only else ("backbone",))):
        table.add_column(name, overflow="fold")
    for name in ("pairs", "arms", "trainings", "done", "tokens", "hours"):
        table.add_column(name, justify="right")
    for each in found.cells:
        table.add_row(
            Text(each.cell.grid + (f", draw {each.cell.draw + 1}" if each.cell.draw else "")),
            *(() if only else (Text(names[each.cell.backbone]),)),
            f"{each.cell.n_train:,}",
            str(each.n_arms),
            str(each.n_trainings),
            str(each.n_done),
            f"{each.tokens / 1e6:,.1f}M",
            "?" if each.hours is None else _hours(each.hours),
        )
    return [table, *([estimates_table(found.critics)] if found.critics else [])]


def _hours(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
