"""Train critic by test critic: what a finished run's models lose on critiques by another critic than their own.

A reward model reads the critic it was trained with (section 4.2). Here each arm's models read every arm's critiques,
and none; what they read of their own is taken from the run. In the run folder:

    cross/<trained>/seed-*/<test set>/<read>/    rewards, as an evaluation's
    cross.json, cross.md
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from critrm.config import Recipe
from critrm.errors import ConfigError, DataError
from critrm.evaluate import score_benchmark
from critrm.metrics import holm
from critrm.result_tables import accuracy_cells, markdown_table, number_table
from critrm.results import accuracy_over_seeds, same_models_difference
from critrm.reward_model import RewardModel
from critrm.score_files import read_scores
from critrm.store import content_hash, file_name, mark_stage_done, read_records, stage_is_done, write_text
from critrm.types import NO_CRITIC, CritiquedPair, Outcome, PreferencePair

SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class _Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    critics: tuple[str, ...]

    def items(self, test: str, critic: str) -> list[CritiquedPair]:
        return read_records(self.folder / "augment" / test / f"{file_name(critic)}.jsonl", CritiquedPair)

    def evaluated(self, critic: str, seed: int) -> Path:
        return self.folder / "evaluate" / file_name(critic) / f"seed-{seed}"

    def cell(self, trained: str, seed: int, test: str, read: str) -> Path:
        """Where the rewards of a cell lie; the run's own evaluation on the diagonal."""
        if read == trained:
            return self.evaluated(trained, seed) / test
        return self.folder / "cross" / file_name(trained) / f"seed-{seed}" / test / file_name(read)

    def outcomes(self, trained: str, seed: int, test: str, read: str) -> list[Outcome]:
        path = self.cell(trained, seed, test, read) / f"{self.recipe.preferences.test[test].benchmark}.scores.jsonl"
        found = {score.pair_id: score.outcome for score in read_scores(path)}
        return [found.get(item.pair.id, Outcome.UNSCORED) for item in self.items(test, trained)]


def cross_critics(folder: str | Path, *, console: Console | None = None) -> dict[str, Any]:
    """Score every arm's critiques, and none, with every arm's trained models, and return the matrix (`cross.json`).

    What is finished is not scored again.

    Args:
        folder: a finished run's.
        console: gets the progress bars; none are shown when None.

    Returns:
        `critics`, `seeds`, `warnings` in words, and `tests`: test set -> critic of training -> critic that is read ->
        accuracy as `results.accuracy_over_seeds` gives it, and what is lost against the own critic (`difference`, None
        on the diagonal) with its `p_value`, and `p_holm` adjusted over the critics that these models read.

    Raises:
        DataError: the folder holds no finished run.
        ModelError: a trained model is gone.
    """
    run = _read_run(Path(folder))
    for trained in run.critics:
        for seed in run.recipe.train.seeds:
            _score_row(run, trained, seed, console=console)
    tests = {
        test: {trained: _row(run, test, trained) for trained in run.critics} for test in run.recipe.preferences.test
    }
    results = {
        "critics": list(run.critics),
        "seeds": list(run.recipe.train.seeds),
        "tests": tests,
        "warnings": [warning for test, rows in tests.items() for warning in _warnings(test, rows)],
    }
    write_text(run.folder / "cross.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_text(run.folder / "cross.md", cross_markdown(results))
    return results


def _read_run(folder: Path) -> _Run:
    try:
        manifest, results = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in ("manifest.json", "results.json")
        )
        config = {name: value for name, value in manifest["config"].items() if name != "ledger"}
        return _Run(folder, Recipe.model_validate(config), tuple(results["learning_rates"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no finished run of `critrm run` ({str(error).splitlines()[0]})"
        raise DataError(f"{reason}: name its folder; the same `critrm run` finishes it", path=str(folder)) from None


def _score_row(run: _Run, trained: str, seed: int, *, console: Console | None) -> None:
    """Score what one model has not read yet of the other critics."""
    model: RewardModel | None = None
    marker = run.evaluated(trained, seed) / "done.json"
    weights = json.loads(marker.read_text(encoding="utf-8"))["fingerprint"]
    for test, source in run.recipe.preferences.test.items():
        for read in run.critics:
            items, cell = run.items(test, read), run.cell(trained, seed, test, read)
            fingerprint = content_hash(weights, [item.content() for item in items])
            if read == trained or stage_is_done(cell, fingerprint):
                continue
            if model is None:
                model = RewardModel.load(run.folder / "train" / file_name(trained) / f"seed-{seed}" / "model")
            if console:
                console.print(f"{escape(trained)}, seed {seed}, reads {escape(read)} on {test}", highlight=False)
            score_benchmark(
                model,
                items,
                whole=read_records(run.folder / "preferences" / f"{test}.jsonl", PreferencePair),
                benchmark=source.benchmark,
                out=cell,
                allow_other_critic=True,
                max_tokens_per_step=run.recipe.evaluate.max_tokens_per_step,
                console=console,
            )
            mark_stage_done(cell, fingerprint)


def _row(run: _Run, test: str, trained: str) -> dict[str, dict[str, Any]]:
    """What one arm's models come to on each critic of a test set."""
    outcomes = {
        read: [run.outcomes(trained, seed, test, read) for seed in run.recipe.train.seeds] for read in run.critics
    }
    cells = {
        read: {
            **accuracy_over_seeds(seeds),
            "difference": None if read == trained else same_models_difference(outcomes[trained], seeds),
        }
        for read, seeds in outcomes.items()
    }
    tested = [cell["difference"] for cell in cells.values() if cell["difference"] is not None]
    for difference, adjusted in zip(tested, holm([each["p_value"] for each in tested]), strict=True):
        difference["p_holm"] = adjusted
    return cells


def _loses(cell: Mapping[str, Any]) -> bool:
    found = cell["difference"]
    return found is not None and found["value"] > 0 and found["p_holm"] < SIGNIFICANT


def _warnings(test: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{test}: trained {_with(trained)}, it loses {cell['difference']['value']:.3f} "
        f"[{cell['difference']['low']:+.2f}, {cell['difference']['high']:+.2f}] (Holm p "
        f"{cell['difference']['p_holm']:.2g}) {_with(read)}: test with the critic of training."
        for trained, cells in rows.items()
        for read, cell in cells.items()
        if _loses(cell)
    ]


def _with(critic: str) -> str:
    return "without critiques" if critic == NO_CRITIC else f"with critiques by {critic}"


def cross_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per test set for the terminal: each arm's accuracy on its own critic, then on the others."""
    tables = []
    for test, rows in results["tests"].items():
        warnings = [warning for warning in results["warnings"] if warning.startswith(f"{test}: ")]
        caption = "\n".join(["lost: against its own critic, paired; p: Holm over an arm's rows", *warnings])
        table = number_table(
            f"Train critic by test critic, {test}", caption, ("trained, and read", "accuracy", "lost", "p")
        )
        for trained, cells in rows.items():
            table.add_row(Text(trained, "bold"), Text(accuracy_cells(cells[trained])[0], "bold"), "", "")
            for read, cell in cells.items():
                if read != trained:
                    style = "yellow" if _loses(cell) else ""
                    table.add_row(*(Text(text, style) for text in (f" reads {read}", *_cell(cell))))
            table.add_section()
        tables.append(table)
    return tables


def _cell(cell: Mapping[str, Any]) -> list[str]:
    """Accuracy, what is lost, and its adjusted p-value."""
    accuracy, lost, _ = accuracy_cells(cell)
    return [accuracy, lost, f"{cell['difference']['p_holm']:.2g}" if cell["difference"] else "-"]


def cross_markdown(results: Mapping[str, Any]) -> str:
    """The matrices as Markdown: accuracy by critic of training (rows) and critic that is read, then what is lost."""
    critics: Sequence[str] = results["critics"]
    lines = []
    for test, rows in results["tests"].items():
        lines += [f"## {test}", ""]
        accuracy = [[trained, *(accuracy_cells(cells[read])[0] for read in critics)] for trained, cells in rows.items()]
        lines += [*markdown_table(["trained \\ read", *critics], accuracy), ""]
        lost = [
            [f"{trained}, reads {read}", *_cell(cell)[1:]]
            for trained, cells in rows.items()
            for read, cell in cells.items()
            if read != trained
        ]
        lines += [*markdown_table(["trained on", "lost", "p (Holm)"], lost), ""]
    lines += [
        f"Strict accuracy, mean over seeds {results['seeds']} ± standard deviation, [95 % Wilson interval over pairs]. "
        "Lost: accuracy on the critic of training minus this one, by the same models on the same pairs, with its 95 % "
        "interval and p from a paired bootstrap over pairs and seeds (exact McNemar for one seed), adjusted over what "
        "one arm reads.",
        "",
        *(f"- {warning}\n" for warning in results["warnings"]),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def command(run: Path) -> None:
    """Train critic by test critic: each model of a finished run on every critic's critiques, and on none.

    Args:
        run: the folder of a finished `critrm run`; the same command goes on where it was interrupted.
    """
    console = Console()
    results = cross_critics(run, console=console)
    if len(results["critics"]) < 2:
        raise ConfigError(f"{run} has one arm: there is no other critic to read")
    for table in cross_tables(results):
        console.print(table)
    console.print(f"Matrix: {run / 'cross.json'}", soft_wrap=True, markup=False)
