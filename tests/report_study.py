"""Finished studies without a training: made-up rewards in the folders of real plans, through the real functions."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from critrm.augment import augment_pairs, write_augmented
from critrm.baselines import baselines
from critrm.config import Recipe
from critrm.results import compare_arms
from critrm.score_files import score_row
from critrm.store import file_name, write_manifest, write_records, write_text
from critrm.study_plan import Cell, plan_study
from critrm.study_results import study_results, write_study
from critrm.types import NO_CRITIC, SIDES, Critique, Message, PreferencePair, Score

SUBSETS = ("alpacaeval-easy", "alpacaeval-hard", "llmbar-natural", "mt-bench-hard", "xstest-should-refuse", "hep-cpp")


def made_pairs(n: int, *, subsets: Sequence[str] = SUBSETS, start: str = "test") -> list[PreferencePair]:
    """Pairs that say which they are."""
    return [
        PreferencePair(
            id=f"{start}-{i}",
            prompt=(Message("user", f"{start} question {i}: what is {i} plus {i}?"),),
            chosen=f"{i} plus {i} is {2 * i}.",
            rejected=f"It may be {2 * i + 1}, or so.",
            subset=subsets[i % len(subsets)] if subsets else "",
        )
        for i in range(n)
    ]


def made_critiques(pairs: Sequence[PreferencePair], critic: str) -> list[Critique]:
    """A critique of each completion, of two sentences."""
    return [
        Critique(
            key=f"{pair.id}-{side}",
            pair_id=pair.id,
            side=side,
            text=f"{critic} says: this is {'right' if side == 'chosen' else 'wrong'}. It is about {pair.id}.",
            critic=critic,
            prompt_version="",
        )
        for pair in pairs
        for side in SIDES
    ]


def made_study(
    folder: Path,
    *,
    gains: Mapping[str, float],
    grids: Mapping[str, object],
    pairs: Sequence[PreferencePair] | None = None,
    critiques: Mapping[str, Sequence[Critique]] | None = None,
    benchmark: str = "rewardbench",
    test: str = "rewardbench",
    seeds: Sequence[int] = (0, 1),
    backbone: str = "some/backbone-7b",
    cost: Mapping[str, float] | None = None,
) -> Path:
    """A study's folder: each critic adds its gain to a log-odds that grows with the logarithm of the pairs."""
    out = folder / "study"
    pairs = list(made_pairs(60) if pairs is None else pairs)
    recipe = _recipe(folder, gains, grids, pairs, benchmark, test, seeds, backbone)
    cells = plan_study(recipe, out=out)
    critiques = critiques or {critic: made_critiques(pairs, critic) for critic in gains}
    for cell in cells:
        _fill(cell, pairs, gains, critiques, test=test, benchmark=benchmark, seeds=seeds, cost=dict(cost or {}))
    write_study(out, study_results(recipe, cells))
    return out


def _recipe(folder, gains, grids, pairs, benchmark, test, seeds, backbone) -> Recipe:
    largest = max(size for grid in grids.values() for size in grid["sizes"])
    write_records(folder / "train.jsonl", made_pairs(largest, start="train"))
    write_records(folder / "test.jsonl", pairs)
    for critic in gains:
        write_records(folder / f"{file_name(critic)}.jsonl", made_critiques(pairs, critic))
    return Recipe.model_validate(
        {
            "name": "made-up",
            "preferences": {
                "train": {"path": str(folder / "train.jsonl")},
                "test": {test: {"path": str(folder / "test.jsonl"), "benchmark": benchmark}},
            },
            "critique": {"critics": {critic: {"file": str(folder / f"{file_name(critic)}.jsonl")} for critic in gains}},
            "augment": {"max_length": 3000},
            "train": {"backbone": backbone, "seeds": list(seeds)},
            "study": {"grids": dict(grids), "label_price": 1.0},
        }
    )


def _fill(cell: Cell, pairs, gains, critiques, *, test, benchmark, seeds, cost) -> None:
    out = cell.folder
    write_records(out / "preferences" / f"{test}.jsonl", pairs)
    arms = augment_pairs(pairs, {critic: critiques[critic] for critic in cell.arms})
    write_augmented(out / "augment" / test, arms)
    scores = {}
    for critic in (NO_CRITIC, *cell.arms):
        write_records(out / "critique" / f"{file_name(critic)}.jsonl", critiques.get(critic, ()))
        odds = math.log(cell.n_train / 10) / 3 + (len(cell.backbone) % 5) / 10 + gains.get(critic, 0.0)
        scores[critic] = []
        for seed in seeds:
            rng = random.Random(f"{cell.backbone} {critic} {seed}")
            # The same draws at all sizes, so that curves are smooth.
            draws = [rng.uniform(1e-6, 1 - 1e-6) for _ in arms.arms[NO_CRITIC]]
            margins = [odds + math.log(draw / (1 - draw)) for draw in draws]
            found = [
                Score(item.pair.id, margin / 2, -margin / 2)
                for item, margin in zip(arms.arms[NO_CRITIC], margins, strict=True)
            ]
            scores[critic].append(found)
            path = out / "evaluate" / file_name(critic) / f"seed-{seed}" / test / f"{benchmark}.scores.jsonl"
            write_records(path, [score_row(score, "", "") for score in found])
    kept = [item.pair for item in arms.arms[NO_CRITIC]]
    nulls = {critic: baselines((), items) for critic, items in arms.arms.items()}
    results = {
        "recipe": cell.recipe.name,
        "backbone": cell.backbone,
        "seeds": list(seeds),
        "n_train": cell.n_train,
        "learning_rates": dict.fromkeys((NO_CRITIC, *cell.arms), 8e-5),
        "tests": {test: compare_arms(kept, scores, benchmark=benchmark, baselines=nulls)},
        "seconds": {},
        "tokens": {},
        "cost": cost,
    }
    write_text(out / "results.json", json.dumps(results))
    write_manifest(out, config=cell.recipe.model_dump(mode="json"), started=0.0)
