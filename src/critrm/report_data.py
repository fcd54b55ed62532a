"""What a report is drawn from: a study's or a run's folder, read once, with every arm's accuracy on the same pairs.

A run is read as a study of one cell. The groups of a test set are those of `results.compare_arms`; where a benchmark's
headline is the mean of its sections, that is a group as well, and sections weigh their subsets as the benchmark does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from critrm.benchmarks import BENCHMARKS
from critrm.errors import DataError
from critrm.report_weights import Strata, weighted_arm
from critrm.results import ALL, compare_arms, groups_of
from critrm.score_files import read_scores
from critrm.store import content_hash, file_name, read_records
from critrm.types import NO_CRITIC, PreferencePair, Score

AVERAGE = "average of sections"
"""The group of a benchmark whose headline is the mean of its sections."""
HEADLINE = "headline"
"""The kind of that group."""

Groups = dict[str, dict[str, Any]]
"""Group -> its pairs and arms, as `compare_arms` gives them."""
ArmScores = dict[str, tuple[dict[str, Score], ...]]
"""Critic -> scores by pair id, one mapping per seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCell:
    """One run: a backbone and a number of training pairs, with all its arms."""

    grid: str
    backbone: str
    n_train: int
    folder: Path
    results: dict[str, Any]
    tests: dict[str, Groups]
    scores: dict[str, ArmScores]
    """By test set; empty where the scores are no longer there."""
    family: str
    """Cells of one family differ in nothing but their training pairs and critics."""
    n_draws: int = 1
    """Draws of the training pairs that the scores are of."""

    @property
    def n_runs(self) -> int:
        """Trained models per arm: draws times seeds."""
        return self.n_draws * len(self.results["seeds"])

    @property
    def critics(self) -> tuple[str, ...]:
        """The critics of the arms besides no critiques, in the recipe's order."""
        return tuple(critic for critic in self.results["learning_rates"] if critic != NO_CRITIC)

    @property
    def backbone_name(self) -> str:
        """The backbone without its owner or folder."""
        return self.backbone.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a report shows."""

    name: str
    folder: Path
    seeds: tuple[int, ...]
    cells: tuple[ReportCell, ...]
    benchmarks: dict[str, str]
    """Test set -> benchmark."""
    pairs: dict[str, tuple[PreferencePair, ...]]
    """Test set -> the pairs that all arms of all cells scored; empty where scores or pairs are no longer there."""
    exchange: tuple[dict[str, Any], ...]
    quality: tuple[dict[str, Any], ...]
    """Of `critrm metacritique`: one result per critic, with the `grader`."""
    notes: tuple[str, ...]
    """What a reader should know, such as what is missing."""


def read_report(folder: str | Path) -> Report:
    """Read the folder of a finished `critrm study` or `critrm run`.

    Raises:
        DataError: it is neither, or a file in it cannot be read.
    """
    folder = Path(folder)
    study, run = folder / "study.json", folder / "results.json"
    notes: list[str] = []
    if study.is_file():
        content = _json(study)
        found = [_cell(folder, each) for each in content["cells"]]
        name, exchange = content["study"], content["exchange"]
    elif run.is_file():
        content = _json(run)
        name, exchange = content["recipe"], []
        found = [
            _cell(folder, {"grid": name, "folder": "", "results": content} | {k: content[k] for k in _RUN_KEYS}),
        ]
    else:
        raise DataError(
            "neither study.json nor results.json is there: name a folder that `critrm study` or `critrm run` finished",
            path=str(folder),
        )
    found = _over_draws(found, notes)
    benchmarks = {test: _benchmark(found, test) for test in found[0].tests}
    pairs = {test: _common_pairs(found, test, notes) for test in found[0].tests}
    main = {id(cell) for cell in main_cells(found)}
    cells = tuple(_measured(cell, pairs, benchmarks, compare=id(cell) in main) for cell in found)
    return Report(
        name=name,
        folder=folder,
        seeds=tuple(content["seeds"]),
        cells=cells,
        benchmarks=benchmarks,
        pairs=pairs,
        exchange=tuple(exchange),
        quality=_quality(folder),
        notes=tuple(notes),
    )


_RUN_KEYS = ("backbone", "n_train")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON ({error})", path=str(path)) from None
    if not isinstance(content, dict) or not {"seeds", "cells"} & set(content):
        raise DataError("this is no result of `critrm study` or `critrm run`", path=str(path))
    return content


def _cell(folder: Path, row: Mapping[str, Any]) -> ReportCell:
    """A cell with its scores; its folder is looked for in the study's, which may have been moved."""
    place = Path(row["folder"])
    moved = folder.joinpath(*place.parts[-3:])
    place = moved if moved.is_dir() or not place.is_dir() else place
    results: dict[str, Any] = row["results"]
    return ReportCell(
        grid=row["grid"],
        backbone=row["backbone"],
        n_train=row["n_train"],
        folder=place,
        results=results,
        tests={test: dict(groups) for test, groups in results["tests"].items()},
        scores={test: _scores(place, results, test) for test in results["tests"]},
        family=_family(place, row["backbone"], row["grid"]),
    )


def _over_draws(cells: Sequence[ReportCell], notes: list[str]) -> list[ReportCell]:
    """One cell for those that differ in their draw of training pairs alone."""
    found: dict[tuple[str, str, int], ReportCell] = {}
    for cell in cells:
        key = (cell.grid, cell.backbone, cell.n_train)
        first = found.setdefault(key, cell)
        if first is cell:
            continue
        if not (all(first.scores.values()) and all(cell.scores.values())):
            notes.append(f"{cell.folder.name}: its scores are not in the folder, so this draw is left out.")
            continue
        scores = {
            test: {critic: seeds + cell.scores[test][critic] for critic, seeds in arms.items()}
            for test, arms in first.scores.items()
        }
        found[key] = replace(first, scores=scores, n_draws=first.n_draws + 1)
    return list(found.values())


def _scores(folder: Path, results: Mapping[str, Any], test: str) -> ArmScores:
    found: ArmScores = {}
    for critic in results["learning_rates"]:
        by_seed = []
        for seed in results["seeds"]:
            for path in folder.glob(f"evaluate/{file_name(critic)}/seed-{seed}/{_escaped(test)}/*.scores.jsonl"):
                by_seed.append({score.pair_id: score for score in read_scores(path)})
        if len(by_seed) == len(results["seeds"]):
            found[critic] = tuple(by_seed)
    return found if len(found) == len(results["learning_rates"]) else {}


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _family(folder: Path, backbone: str, grid: str) -> str:
    path = folder / "manifest.json"
    if not path.is_file():
        return content_hash(backbone, grid)
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    return content_hash(backbone, config.get("augment"), config.get("train"))


def _benchmark(cells: Sequence[ReportCell], test: str) -> str:
    for path in sorted(cells[0].folder.glob(f"evaluate/*/seed-*/{_escaped(test)}/*.scores.jsonl")):
        name = path.name.removesuffix(".scores.jsonl")
        if name in BENCHMARKS:
            return name
    return "pairs"


def _common_pairs(cells: Sequence[ReportCell], test: str, notes: list[str]) -> tuple[PreferencePair, ...]:
    """The pairs that every arm of every cell scored."""
    path = cells[0].folder / "preferences" / f"{test}.jsonl"
    arms = [seed for cell in cells for seeds in cell.scores[test].values() for seed in seeds]
    if not path.is_file() or not all(cell.scores[test] for cell in cells):
        notes.append(f"{test}: the pairs or their scores are not in the folder, so there is no explorer of them.")
        return ()
    common = set.intersection(*(set(scores) for scores in arms))
    pairs = tuple(pair for pair in read_records(path, PreferencePair) if pair.id in common)
    left_out = max(cell.tests[test][ALL]["n"] for cell in cells) - len(pairs)
    if left_out:
        notes.append(f"{test}: {left_out} pairs that not every run could read are left out, so that all are compared.")
    return pairs


def _measured(
    cell: ReportCell,
    pairs: Mapping[str, Sequence[PreferencePair]],
    benchmarks: Mapping[str, str],
    *,
    compare: bool,
) -> ReportCell:
    """The cell with its groups over the common pairs, and with the benchmark's own headline."""
    tests = {}
    for test, groups in cell.tests.items():
        if pairs[test] and (cell.n_draws > 1 or len(pairs[test]) != groups[ALL]["n"]):
            arms = {
                critic: [[scores[pair.id] for pair in pairs[test]] for scores in seeds]
                for critic, seeds in cell.scores[test].items()
            }
            groups = compare_arms(pairs[test], arms, benchmark=benchmarks[test])
        tests[test] = groups | _averaged(cell, test, pairs[test], benchmarks[test], compare=compare)
    return replace(cell, tests=tests)


def _averaged(cell: ReportCell, test: str, pairs: Sequence[PreferencePair], benchmark: str, *, compare: bool) -> Groups:
    """The mean of the sections and the sections, with the benchmark's weights, where that is its headline."""
    table = BENCHMARKS[benchmark]
    if not pairs or not table.averages_sections or table.counts_lists or table.extra_sections:
        return {}
    by_subset = {label: ids for label, (kind, ids) in groups_of(pairs, benchmark).items() if kind == "subset"}
    strata: dict[str, Strata] = {}
    for section, subsets in table.sections.items():
        present = [subset for subset in subsets if subset in by_subset]
        total = sum(table.weights[subset] if table.weights else len(by_subset[subset]) for subset in present)
        strata[section] = [
            (by_subset[subset], (table.weights[subset] if table.weights else len(by_subset[subset])) / total)
            for subset in present
        ]
    strata = {section: found for section, found in strata.items() if found}
    if not strata:
        return {}
    average = [(ids, weight / len(strata)) for found in strata.values() for ids, weight in found]
    groups: Groups = {}
    for label, found in ({AVERAGE: average} | strata).items():
        scores = cell.scores[test]
        arms = {critic: weighted_arm(scores, critic, strata=found, compare=compare) for critic in scores}
        kind = HEADLINE if label == AVERAGE else "section"
        groups[label] = {"kind": kind, "n": sum(len(ids) for ids, _ in found), "arms": arms}
    return groups


def _quality(folder: Path) -> tuple[dict[str, Any], ...]:
    found = []
    for path in sorted(folder.rglob("metacritique.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found += [each | {"grader": content["grader"]} for each in content["results"]]
    return tuple(found)


def headline(groups: Groups) -> str:
    """The label of the group that is a test set's headline."""
    return AVERAGE if AVERAGE in groups else ALL


def parts(groups: Groups, *, limit: int = 9) -> list[str]:
    """The labels of a test set's sections, or of its subsets where it has none and they are few."""
    sections = [label for label, group in groups.items() if group["kind"] == "section"]
    subsets = [label for label, group in groups.items() if group["kind"] == "subset"]
    return sections or (subsets if len(subsets) <= limit else [])


def main_cells(cells: Sequence[ReportCell]) -> list[ReportCell]:
    """The cell of each family that has the most arms, and of those the largest: the rows of Table 2."""
    best: dict[str, ReportCell] = {}
    for cell in cells:
        kept = best.setdefault(cell.family, cell)
        if (len(cell.critics), cell.n_train) > (len(kept.critics), kept.n_train):
            best[cell.family] = cell
    chosen = [cell for cell in best.values() if cell.critics] or list(best.values())
    return sorted(chosen, key=lambda cell: (cell.backbone, cell.grid))


def label_of(cell: ReportCell, cells: Sequence[ReportCell]) -> str:
    """The backbone's name, with the grid and the training pairs where several cells share it."""
    same = [each for each in cells if each.backbone_name == cell.backbone_name]
    label = cell.backbone_name
    if len({each.grid for each in same}) > 1:
        label += f", {cell.grid}"
    if len({each.n_train for each in same}) > 1:
        label += f", {cell.n_train} pairs"
    return label


def arm_name(critic: str) -> str:
    """A critic's name for a reader."""
    return "no critiques" if critic == NO_CRITIC else critic
