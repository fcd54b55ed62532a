"""A study's results: one tidy table of every run, the exchange rates, and both in words.

study.csv       one row per run, test set and group: what was run, and strict accuracy
study.json      the same by cell, with the exchange rates and their settings
study.md        in words and tables
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from critrm.benchmarks import read_source
from critrm.budget import dollars
from critrm.config import PairSource, Recipe
from critrm.exchange import Exchange, Runs, exchange_rate, in_words
from critrm.metrics import correctness, tally
from critrm.results import ALL, groups_of
from critrm.score_files import read_scores
from critrm.store import file_name, to_json, write_text
from critrm.study_plan import Cell
from critrm.types import NO_CRITIC, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One trained reward model on one group of a test set."""

    grid: str
    backbone: str
    critic: str
    n_train: int
    draw: int
    """Of the training pairs, from 1."""
    seed: int
    learning_rate: float
    test: str
    group: str
    kind: str
    """`all`, `section` or `subset`."""
    n: int
    n_right: int
    n_wrong: int
    n_tie: int
    n_unscored: int
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One arm on one test set: of one cell, or of the cells that differ in their draw alone."""

    cell: Cell
    critic: str
    test: str
    by_seed: tuple[dict[str, Score], ...]

    def runs(self, members: Sequence[str]) -> Runs:
        """Strict correctness on these pairs, of shape (n_seeds, n_pairs)."""
        return [correctness(scores[pair_id].outcome for pair_id in members) for scores in self.by_seed]


def study_results(recipe: Recipe, cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything that a study's finished cells say.

    Returns:
        `rows` (one per run and group, `StudyRow`), `exchange` (one per backbone, arm, size and group, with `words`),
        `cells` (each cell's `results.json`), and what the study was.

    Raises:
        DataError: a cell's scores are missing.
    """
    rows: list[StudyRow] = []
    rates: list[dict[str, Any]] = []
    for test, source in recipe.preferences.test.items():
        arms = [found for cell in cells for found in _outcomes(cell, test, source)]
        # Every cell drops what its arms cannot use: only pairs that all have are compared.
        common = set.intersection(*(set(scores) for arm in arms for scores in arm.by_seed))
        pairs = [pair for pair in read_source(source).pairs if pair.id in common]
        for label, (kind, members) in groups_of(pairs, source.benchmark).items():
            rows += [row for arm in arms for row in _rows(arm, label, kind, members)]
            rates += _exchanges(recipe, _over_draws(arms), test=test, group=label, kind=kind, members=members)
    return {
        "study": recipe.name,
        "seeds": list(recipe.train.seeds),
        "draws": recipe.study.draws if recipe.study else 1,
        "label_price": recipe.study.label_price if recipe.study else None,
        "rows": [asdict(row) for row in rows],
        "exchange": rates,
        "cells": [
            {
                "grid": cell.grid,
                "backbone": cell.backbone,
                "n_train": cell.n_train,
                "draw": cell.draw + 1,
                "folder": str(cell.folder),
                "results": _results_of(cell),
            }
            for cell in cells
        ],
    }


def _results_of(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cell.folder / "results.json").read_text(encoding="utf-8"))
    return found


def _outcomes(cell: Cell, test: str, source: PairSource) -> list[Outcomes]:
    found = []
    for critic in (NO_CRITIC, *cell.arms):
        folder = cell.folder / "evaluate" / file_name(critic)
        by_seed = tuple(
            {
                score.pair_id: score
                for score in read_scores(folder / f"seed-{seed}" / test / f"{source.benchmark}.scores.jsonl")
            }
            for seed in cell.recipe.train.seeds
        )
        found.append(Outcomes(cell, critic, test, by_seed))
    return found


def _over_draws(arms: Sequence[Outcomes]) -> list[Outcomes]:
    """The arms with the draws of their training pairs put together; a run on another draw counts as a run does."""
    found: dict[tuple[str, str, int, str], Outcomes] = {}
    for arm in sorted(arms, key=lambda arm: arm.cell.draw):
        key = (arm.cell.grid, arm.cell.backbone, arm.cell.n_train, arm.critic)
        first = found.get(key)
        found[key] = replace(first, by_seed=first.by_seed + arm.by_seed) if first else arm
    return list(found.values())


def _rows(arm: Outcomes, label: str, kind: str, members: Sequence[str]) -> list[StudyRow]:
    rates = _results_of(arm.cell)["learning_rates"]
    rows = []
    for seed, scores in zip(arm.cell.recipe.train.seeds, arm.by_seed, strict=True):
        found = tally(scores[pair_id].outcome for pair_id in members)
        rows.append(
            StudyRow(
                grid=arm.cell.grid,
                backbone=arm.cell.backbone,
                critic=arm.critic,
                n_train=arm.cell.n_train,
                draw=arm.cell.draw + 1,
                seed=seed,
                learning_rate=rates[arm.critic],
                test=arm.test,
                group=label,
                kind=kind,
                n=len(members),
                n_right=found.n_right,
                n_wrong=found.n_wrong,
                n_tie=found.n_tie,
                n_unscored=found.n_unscored,
                accuracy=found.accuracy.value if found.accuracy else None,
            )
        )
    return rows


def _exchanges(
    recipe: Recipe, arms: Sequence[Outcomes], *, test: str, group: str, kind: str, members: Sequence[str]
) -> list[dict[str, Any]]:
    """The exchange rate of every arm with critiques whose own curve without them was measured."""
    if kind == "subset":
        return []
    found = []
    for arm in arms:
        plain = _plain_curve(recipe, arms, arm)
        if arm.critic == NO_CRITIC or arm.cell.n_train not in plain or len(plain) < 2:
            continue
        rate = exchange_rate(
            {size: each.runs(members) for size, each in plain.items()},
            arm.runs(members),
            n_train=arm.cell.n_train,
        )
        if rate is None:
            continue
        where, money = test if group == ALL else f"{test}, {group}", _money(recipe, arm, rate)
        found.append(
            {
                "grid": arm.cell.grid,
                "backbone": arm.cell.backbone,
                "critic": arm.critic,
                "test": test,
                "group": group,
                **asdict(rate),
                "rate": rate.rate,
                "is_significant": rate.is_significant,
                "words": in_words(rate, arm=arm.critic, where=where) + _in_money(rate, money),
                "money": money,
            }
        )
    return found


def _plain_curve(recipe: Recipe, arms: Sequence[Outcomes], arm: Outcomes) -> dict[int, Outcomes]:
    """The arms without critiques of the same family, by size; of one size, that of the arm's own cell."""
    curve = {
        each.cell.n_train: each for each in arms if each.critic == NO_CRITIC and each.cell.family == arm.cell.family
    }
    own = next(each for each in arms if each.critic == NO_CRITIC and each.cell is arm.cell)
    return curve | {arm.cell.n_train: own}


def _money(recipe: Recipe, arm: Outcomes, rate: Exchange) -> dict[str, float] | None:
    """What the arm's pairs cost with critiques, and as good ones without, in US dollars; None where it is not known."""
    price = recipe.study.label_price if recipe.study else None
    cost = _results_of(arm.cell).get("cost", {}).get(arm.critic)
    if price is None or cost is None:
        return None
    n_critiques = len((arm.cell.folder / "critique" / f"{file_name(arm.critic)}.jsonl").read_bytes().splitlines())
    per_critique = cost / n_critiques
    return {
        "label": price,
        "critique": per_critique,
        "critiqued_pairs": rate.n_train * (price + 2 * per_critique),
        "plain_pairs": rate.plain_pairs * price,
    }


def _in_money(rate: Exchange, money: Mapping[str, float] | None) -> str:
    if money is None or not rate.is_significant or rate.difference.value < 0:
        return ""
    more = "more than " if rate.plain_pairs >= rate.largest else ""
    return (
        f" At {dollars(money['label'])} a label and {dollars(money['critique'])} a critique that is "
        f"{dollars(money['critiqued_pairs'])} instead of {more}{dollars(money['plain_pairs'])}."
    )


def write_study(out: Path, found: Mapping[str, Any]) -> None:
    """Write `study.csv`, `study.json` and `study.md`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(StudyRow.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found["rows"])
    write_text(out / "study.csv", text.getvalue())
    write_text(out / "study.json", to_json(found) + "\n")
    write_text(out / "study.md", study_markdown(found))


def study_markdown(found: Mapping[str, Any]) -> str:
    """A study's accuracy by arm and size, and what its critiques are worth, in Markdown."""
    lines = [f"# {found['study']}", ""]
    lines += [f"- {each['words']}" for each in found["exchange"]]
    lines += ["", "| grid | backbone | test set | arm | pairs | runs | accuracy |", "|---|---|---|---|---:|---:|---:|"]
    for key, accuracies in by_arm(found["rows"]).items():
        grid, backbone, test, group, critic, n_train = key
        where = test if group == ALL else f"{test}, {group}"
        mean = sum(accuracies) / len(accuracies)
        spread = f" ({min(accuracies):.3f} to {max(accuracies):.3f})" if len(accuracies) > 1 else ""
        cells = [grid, backbone, where, critic, str(n_train), str(len(accuracies)), f"{mean:.3f}{spread}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Strict accuracy, mean over runs (lowest to highest). A critiqued pair's worth: see the docs on studies.",
    ]
    return "\n".join(lines) + "\n"


def by_arm(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, str, str, int], list[float]]:
    """(grid, backbone, test set, group, critic, training pairs) -> accuracy of each run; subsets are left out."""
    found: dict[tuple[str, str, str, str, str, int], list[float]] = {}
    for row in rows:
        if row["kind"] != "subset" and row["accuracy"] is not None:
            key = (row["grid"], row["backbone"], row["test"], row["group"], row["critic"], row["n_train"])
            found.setdefault(key, []).append(row["accuracy"])
    return dict(sorted(found.items()))


def exchange_table(found: Mapping[str, Any]) -> Table:
    """What each arm's critiques are worth, for the terminal."""
    caption = "plain pairs: what the curve without critiques needs for the arm's accuracy, with its 95 % interval"
    table = Table(title="What a critiqued pair is worth", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption, table.caption_justify = Text(caption), "left"
    for title in ("test set, arm", "pairs", "accuracy", "without", "p", "plain pairs", "each"):
        table.add_column(title, justify="left" if title.startswith("test") else "right")
    for each in found["exchange"]:
        where = each["test"] if each["group"] == ALL else f"{each['test']}, {each['group']}"
        table.add_row(
            Text(f"{where}: {each['critic']}"),
            str(each["n_train"]),
            f"{each['accuracy']:.3f}",
            f"{each['plain_accuracy']:.3f}",
            f"{each['difference']['p_value']:.2g}",
            *_worth(each),
        )
    return table


def _worth(each: Mapping[str, Any]) -> tuple[str, str]:
    if not each["is_significant"]:
        return "not shown", "-"
    if each["difference"]["value"] < 0:
        return "harm", "-"
    if each["plain_pairs"] >= each["largest"] and each["slope"] <= 0:
        return "no number", "-"
    if each["plain_pairs"] >= each["largest"]:
        return f"> {each['largest']}", f"> {each['largest'] / each['n_train']:.1f}"
    high = f"> {each['largest']}" if each["high"] >= each["largest"] else f"{each['high']:.0f}"
    return f"{each['plain_pairs']:.0f} [{each['low']:.0f}, {high}]", f"{each['rate']:.1f}"
