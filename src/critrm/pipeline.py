"""A recipe's stages in order: preferences, critique, augment, train, evaluate; what is finished is skipped.

Everything a stage makes lies in the run folder, so that the same command goes on where a killed run stopped:

    preferences/train.jsonl, <test set>.jsonl
    critique/<critic>.jsonl
    augment/<set>/<critic>.jsonl, augment.json
    train/<critic>/learning-rate-*/, seed-*/
    evaluate/<critic>/seed-*/<test set>/
    zero-label/<critic>/<test set>.jsonl
    readings/ (of a frozen backbone)
    results.json, results.md, seconds.json, manifest.json
"""

import itertools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from critrm.augment import Augmented, Budget, augment_pairs, text_encoder, write_augmented
from critrm.benchmarks import read_source
from critrm.budget import Estimate, Ledger, Purse, estimates_table
from critrm.calls import Job, estimate_jobs, jobs_of, open_purse
from critrm.config import CriticConfig, PairSource, Recipe, data_path, load_recipe
from critrm.critics import check_critic, complete_critics
from critrm.critique import critique_with_progress
from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.critique_files import read_critiques
from critrm.encoding import beginning
from critrm.errors import DataError
from critrm.mixtures import mix_critiques
from critrm.models import load_tokenizer
from critrm.overlap import overlap_warning
from critrm.result_tables import baselines_table, blends_table, ensembles_table, results_table
from critrm.run_results import write_results
from critrm.run_training import learning_rates_of, train_and_evaluate_all
from critrm.runs import LEARNING_RATES, TRAIN, Run, Sets
from critrm.store import (
    file_name,
    write_manifest,
    write_records,
    write_text,
)
from critrm.training_data import ScoreScale
from critrm.types import Critique, PreferencePair
from critrm.work_sharing import claim


def run_recipe(
    recipe: Recipe,
    *,
    out: str | Path,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run a recipe's stages in order, skipping what is finished, and return its results (`results.json`).

    Several processes may run the same recipe in the same folder: they share its trainings.

    Args:
        recipe: the stages' settings.
        out: the run's folder.
        console: where progress is shown; nowhere when None.

    Raises:
        DataError: pairs or critiques cannot be read, or do not fit together.
        CriticError: a critic cannot be reached at all.
        ModelError: a model cannot be loaded.
    """
    results = share_run(recipe, out=out, console=console)
    assert results is not None
    return results


def share_run(
    recipe: Recipe,
    *,
    out: str | Path,
    learning_rates: Mapping[str, float] | None = None,
    study: Path | None = None,
    wait: bool = True,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Do what other processes leave of a recipe's run, and return its results; None while others are at it.

    Args:
        recipe: the stages' settings.
        out: the run's folder.
        learning_rates: arm -> learning rate; where given, none is chosen.
        study: the folder of the study that the run is a cell of; what other cells have done is not done again.
        wait: for the others.
        console: where progress is shown; nowhere when None.

    Raises:
        CritrmError: as `run_recipe` says.
    """
    out, started = Path(out), time.time()
    run = Run(recipe, out, console or Console(quiet=True), study)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # What is wrong with the recipe is said before anything is written.
    critics, sets = complete_critics(recipe.critique, backbone=recipe.train.backbone), _read_sets(recipe)
    with claim(run.out, wait=True):
        critiques, augmented = _prepare(run, critics, sets)
    rates = learning_rates_of(run, augmented[TRAIN], learning_rates or {})
    write_text(run.out / LEARNING_RATES, json.dumps(rates, indent=2) + "\n")
    if not train_and_evaluate_all(run, sets, augmented, critiques, rates, wait=wait):
        return None
    # A claim of its own, not waited for: what the untrained backbone says is read here, which takes long.
    with claim(run.out / ".results", wait=wait) as is_mine:
        if not is_mine:
            return None
        results = write_results(run, augmented, critiques, rates)
    inputs = [data_path(source.path) for source in _sources(recipe).values()]
    write_manifest(
        run.out,
        config=recipe.model_dump(mode="json") | {"ledger": {name: each.facts() for name, each in run.ledgers.items()}},
        started=started,
        inputs=inputs,
        seeds=recipe.train.seeds,
        cost=sum(ledger.cost + ledger.cost_cached for ledger in run.ledgers.values()),
    )
    return results


def _prepare(
    run: Run, critics: Mapping[str, CriticConfig], sets: Sets
) -> tuple[dict[str, list[Critique]], dict[str, Augmented]]:
    """Each critic's critiques of the pairs, and the arms that they make."""
    recipe = run.recipe
    for name, found in sets.items():
        write_records(run.out / "preferences" / f"{name}.jsonl", found)
        run.console.print(f"{name}: {len(found)} pairs", highlight=False)
    pairs = [pair for found in sets.values() for pair in found]
    for settings in critics.values():
        check_critic(settings)
    jobs = {name: _jobs(recipe, critic, sets) for name, critic in critics.items()}
    with CritiqueCache(default_cache_path()) as cache:
        purse = open_purse(recipe.critique.max_cost, itertools.chain(*jobs.values()), cache=cache)
    critiques = {name: _critiques(run, name, asked, purse=purse) for name, asked in jobs.items()}
    for name, shares in recipe.critique.mixtures.items():
        critiques[name] = mix_critiques(pairs, critiques, shares, name=name)
        write_records(run.out / "critique" / f"{file_name(name)}.jsonl", critiques[name])
    if recipe.evaluate.samples > 1 and not any(row.sample for rows in critiques.values() for row in rows):
        raise DataError(
            f"evaluate.samples is {recipe.evaluate.samples}, and no critic wrote more than one critique of "
            "a completion: give one of them a temperature above 0, or a file with several"
        )
    augmented = _augment(run, sets, critiques)
    for name, arm in augmented[TRAIN].arms.items():
        if recipe.train.learns_scores_of(name):
            ScoreScale.of(arm)  # now, and not when the arms before it are trained
    return critiques, augmented


def estimate_recipe(recipe: Recipe) -> list[Estimate]:
    """What a recipe's critics will cost, before any is called.

    Raises:
        DataError: pairs cannot be read.
        ConfigError: a critic is not known.
    """
    sets = _read_sets(recipe)
    with CritiqueCache(default_cache_path()) as cache:
        return [
            row
            for name, critic in complete_critics(recipe.critique, backbone=recipe.train.backbone).items()
            for row in estimate_jobs(_jobs(recipe, critic, sets), critic=name, cache=cache)
        ]


def _jobs(recipe: Recipe, critic: CriticConfig, sets: Sets) -> list[Job]:
    tests = [pair for name, found in sets.items() if name != TRAIN for pair in found]
    return jobs_of(critic, sets[TRAIN], tests, n_averaged=recipe.evaluate.samples)


def _sources(recipe: Recipe) -> dict[str, PairSource]:
    return {TRAIN: recipe.preferences.train} | dict(recipe.preferences.test)


def _read_sets(recipe: Recipe) -> Sets:
    sets: Sets = {}
    owner: dict[str, str] = {}
    for name, source in _sources(recipe).items():
        found = read_source(source, for_training=name == TRAIN)
        for pair in found.pairs:
            if owner.setdefault(pair.id, name) != name:
                raise DataError(
                    f"the pair is in {owner[pair.id]!r} and in {name!r}; ids must be unique", field=f"id {pair.id}"
                )
        sets[name] = found.pairs
    return sets


def _critiques(run: Run, name: str, jobs: Sequence[Job], *, purse: Purse | None) -> list[Critique]:
    rows: list[Critique] = []
    for pairs, critic in jobs:
        if critic.files:
            wanted = {pair.id for pair in pairs}
            found = (row for file in critic.files for row in read_critiques(data_path(file), critic=name))
            rows += [row for row in found if row.pair_id in wanted]
            continue
        ledger = run.ledgers.setdefault(name, Ledger())
        with run.timed(f"critique {name}"), CritiqueCache(default_cache_path()) as cache:
            rows += critique_with_progress(
                pairs, critic, critic=name, cache=cache, console=run.console, ledger=ledger, purse=purse
            )
    write_records(run.out / "critique" / f"{file_name(name)}.jsonl", rows)
    return rows


def _augment(
    run: Run, sets: Mapping[str, Sequence[PreferencePair]], critiques: Mapping[str, Sequence[Critique]]
) -> dict[str, Augmented]:
    config, tokenizer = run.recipe.augment, load_tokenizer(run.recipe.train.backbone)
    encode, budget = text_encoder(tokenizer), Budget(config.max_length - len(beginning(tokenizer)))
    augmented = {}
    for name, pairs in sets.items():
        if name != TRAIN and (warning := overlap_warning(sets[TRAIN], pairs, name=name)):
            run.console.print(warning, style="yellow", markup=False)
        augmented[name] = augment_pairs(
            pairs,
            critiques,
            encode=encode,
            budget=budget,
            drop=config.drop,
            strip_scores=config.strip_scores,
            consistent_only=config.consistent_only and name == TRAIN,
        )
        write_augmented(run.out / "augment" / name, augmented[name])
        counts = augmented[name].summary()
        run.console.print(
            f"augment {name}: {counts['kept']} pairs kept, dropped {counts['dropped'] or 'none'}", highlight=False
        )
    return augmented


def command(recipe: str, *, out: Path | None = None, dry_run: bool = False) -> None:
    """Run a recipe's stages in order; the same command resumes an interrupted run.

    Args:
        recipe: a YAML file, or `bundled:NAME.yaml`.
        out: the run's folder; `runs/NAME` when not given.
        dry_run: print what the critics will cost, and run nothing.
    """
    loaded = load_recipe(recipe)
    console = Console()
    if dry_run:
        console.print(estimates_table(estimate_recipe(loaded), limit=loaded.critique.max_cost))
        return
    out = out or Path("runs") / loaded.name
    results = run_recipe(loaded, out=out, console=console)
    for table_of in (results_table, baselines_table, blends_table, ensembles_table):
        table = table_of(results)
        if table is not None:
            console.print(table)
    console.print(f"Run folder: {out}", soft_wrap=True)
