"""The whole method in one command: three arms that differ in the critic, on bundled pairs and the embedded model."""

from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from critrm.config import BUNDLED, Recipe, load_recipe
from critrm.errors import ConfigError
from critrm.evaluate import read_scores
from critrm.pipeline import run_recipe
from critrm.result_tables import baselines_table, blends_table, costs_table, results_table
from critrm.store import file_name, read_records
from critrm.types import NO_CRITIC, CritiquedPair, Score

N_EXAMPLES = 3


def command(*, out: Path = Path("runs/demo"), quick: bool = False, resume: bool = True) -> None:
    """Does a critic help? Train three reward models on the bundled pairs and compare them.

    The arms read the same pairs in the same order: without critiques, with critiques that the embedded
    SmolLM2-135M-Instruct writes now, and with a frontier model's that come with the package.

    Args:
        out: the run's folder.
        quick: a few dozen pairs: shows that everything works, not what a critic is worth.
        resume: go on where a run in this folder stopped; with --no-resume a folder that is in use is an error.
    """
    console = Console()
    recipe = load_recipe(f"{BUNDLED}demo.yaml")
    if quick:
        recipe, out = _quick(recipe), out.with_name(f"{out.name}-quick")
    if not resume and out.exists():
        raise ConfigError(f"{out} is in use: leave out --no-resume to go on with it, or choose another --out")
    results = run_recipe(recipe, out=out, console=console)
    for critic in list(results["learning_rates"])[1:]:
        for panel in _examples(out, recipe, critic):
            console.print(panel)
    for table in (results_table(results), baselines_table(results), blends_table(results)):
        if table is not None:
            console.print(table)
    console.print(costs_table(results))
    if quick:
        console.print("A quick run is too small to tell arms apart; run `critrm demo` for that.")
    console.print(f"Run folder: {out}", soft_wrap=True)


def _quick(recipe: Recipe) -> Recipe:
    preferences = recipe.preferences
    return recipe.model_copy(
        update={
            "name": "demo-quick",
            "preferences": preferences.model_copy(
                update={
                    "train": preferences.train.model_copy(update={"limit": 24}),
                    "test": {
                        name: source.model_copy(update={"limit": 24}) for name, source in preferences.test.items()
                    },
                }
            ),
            "train": recipe.train.model_copy(update={"batch_size": 8}),
        }
    )


def _examples(out: Path, recipe: Recipe, critic: str) -> list[Panel]:
    """The test pairs whose outcome this critic's arm turned furthest, with the critiques and the rewards they got."""
    name, source = next(iter(recipe.preferences.test.items()))
    arm = {
        item.pair.id: item
        for item in read_records(out / "augment" / name / f"{file_name(critic)}.jsonl", CritiquedPair)
    }
    scores = {which: _first_seed(out, recipe, which, name, source.benchmark) for which in (NO_CRITIC, critic)}
    gained = sorted(arm, key=lambda pair_id: _gap(scores[NO_CRITIC][pair_id]) - _gap(scores[critic][pair_id]))
    return [_panel(arm[pair_id], critic, scores[critic][pair_id], scores[NO_CRITIC][pair_id]) for pair_id in gained[:1]]


def _first_seed(out: Path, recipe: Recipe, critic: str, name: str, benchmark: str) -> dict[str, Score]:
    folder = out / "evaluate" / file_name(critic) / f"seed-{recipe.train.seeds[0]}" / name
    return {score.pair_id: score for score in read_scores(folder / f"{benchmark}.scores.jsonl")}


def _gap(score: Score) -> float:
    return score.chosen - score.rejected


def _panel(item: CritiquedPair, critic: str, score: Score, without: Score) -> Panel:
    text = Text()
    text.append("Prompt    ", "bold").append(_short(item.pair.prompt[-1].content) + "\n")
    for side, reward, before in (
        ("chosen", score.chosen, without.chosen),
        ("rejected", score.rejected, without.rejected),
    ):
        completion = item.pair.chosen if side == "chosen" else item.pair.rejected
        critique = item.chosen_critique if side == "chosen" else item.rejected_critique
        text.append(f"{side:<10}", "bold").append(_short(completion) + "\n")
        text.append("critique  ", "cyan").append(_short(critique, 300) + "\n", "cyan")
        text.append(f"reward    {reward:+.2f}  (without critiques {before:+.2f})\n", "bold")
    text.rstrip()
    return Panel(text, title=f"An example of {critic}: {item.pair.subset} {item.pair.id}", width=110)


def _short(text: str, length: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
