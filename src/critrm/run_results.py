"""A finished run's arms side by side, with their null baselines, and what they took."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from critrm.augment import Augmented
from critrm.baselines import OWN_SCORE, UNTRAINED_WHOLE, baselines, own_scores
from critrm.config import PairSource
from critrm.errors import DataError, ModelError
from critrm.result_tables import results_markdown
from critrm.results import ALL_SEEDS, ArmScores, blend, compare_arms
from critrm.runs import TRAIN, Run
from critrm.score_files import read_scores
from critrm.store import file_name, write_text
from critrm.types import NO_CRITIC, Critique, CritiquedPair, Outcome, Score
from critrm.zero_label import zero_label_scores


def write_results(
    run: Run,
    augmented: Mapping[str, Augmented],
    critiques: Mapping[str, Sequence[Critique]],
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """Lay a finished run's arms side by side, and write `results.json` and `results.md`.

    Args:
        run: the run; every arm is trained and evaluated with every seed.
        augmented: the arms of each set of pairs.
        critiques: each critic's.
        rates: each arm's learning rate.
    """
    tests = {}
    for name, source in run.recipe.preferences.test.items():
        arms: ArmScores = {critic: _seed_scores(run, critic, name, source) for critic in augmented[name].arms}
        pairs = [item.pair for item in augmented[name].arms[NO_CRITIC]]
        untrained = {critic: _zero_label(run, name, items) for critic, items in augmented[name].arms.items()}
        nulls = {
            critic: baselines(augmented[TRAIN].arms[critic], items, critiques=critiques.get(critic, ()))
            | {reading: [score.outcome for score in scores] for reading, scores in untrained[critic].items()}
            for critic, items in augmented[name].arms.items()
        }
        readings = {
            UNTRAINED_WHOLE: {critic: found.get(UNTRAINED_WHOLE, []) for critic, found in untrained.items()},
            OWN_SCORE: {
                critic: _complete(own_scores(items, critiques.get(critic, ())))
                for critic, items in augmented[name].arms.items()
            },
        }
        blends = {
            reading: {critic: [blend(each, other) for each in arms[critic]] for critic, other in found.items() if other}
            for reading, found in readings.items()
        }
        tests[name] = compare_arms(
            pairs,
            arms,
            benchmark=source.benchmark,
            baselines=nulls,
            blends=blends,
            ensembles=_ensembles(arms, readings),
        )
    results: dict[str, Any] = {
        "recipe": run.recipe.name,
        "backbone": run.recipe.train.backbone,
        "seeds": list(run.recipe.train.seeds),
        "n_train": len(augmented[TRAIN].arms[NO_CRITIC]),
        "learning_rates": dict(rates),
        "tests": tests,
        "seconds": run.seconds(),
        "tokens": _tokens(run, critiques, augmented),
        "cost": _cost(run, critiques),
    }
    write_text(run.out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_text(run.out / "results.md", results_markdown(results))
    return results


def _ensembles(
    arms: ArmScores, readings: Mapping[str, Mapping[str, Sequence[Score]]]
) -> dict[str, dict[str, list[Score]]]:
    """Each arm's seeds as one model, alone and blended with each other reading; nothing where there is one seed."""
    together = {critic: blend(*seeds) for critic, seeds in arms.items() if len(seeds) > 1}
    if not together:
        return {}
    blended = {
        f"{ALL_SEEDS} and {reading}": {
            critic: blend(scores, found[critic]) for critic, scores in together.items() if found.get(critic)
        }
        for reading, found in readings.items()
    }
    return {ALL_SEEDS: together} | blended


def _complete(scores: list[Score]) -> list[Score]:
    """The scores of a critic that scored every pair; none of one that left some out, such as a mixture of critics."""
    return [] if any(score.outcome == Outcome.UNSCORED for score in scores) else scores


def _cost(run: Run, critiques: Mapping[str, Sequence[Critique]]) -> dict[str, float]:
    """US dollars per arm: its critic's ledger, or what a file's rows say they cost; none where that is not known.

    A mixture costs what its critiques do, where that is known of all its critics.
    """
    cost = {name: ledger.cost + ledger.cost_cached for name, ledger in run.ledgers.items()}
    noted = {name: sum(row.cost for row in rows) for name, rows in critiques.items()}
    for name in run.recipe.critique.critics:
        if noted[name]:
            cost.setdefault(name, noted[name])
    for name, shares in run.recipe.critique.mixtures.items():
        if set(shares) <= set(cost):
            cost[name] = noted[name]
    return {name: round(dollars, 6) for name, dollars in cost.items()}


def _zero_label(run: Run, name: str, items: Sequence[CritiquedPair]) -> dict[str, list[Score]]:
    """What the untrained backbone reads in an arm of a test set; nothing where it cannot be asked, which is said."""
    recipe, critic = run.recipe, items[0].critic
    if not recipe.evaluate.zero_label:
        return {}
    try:
        with run.timed(f"zero-label {critic}"):
            return zero_label_scores(
                items,
                backbone=recipe.train.backbone,
                max_length=recipe.augment.max_length,
                max_tokens_per_step=recipe.evaluate.max_tokens_per_step,
                path=run.out / "zero-label" / file_name(critic) / f"{name}.jsonl",
                console=run.console,
            )
    except (ModelError, DataError) as error:
        # All is trained and scored by now: a backbone that cannot be asked costs a row of the table, not the run.
        run.console.print(f"no zero-label baseline for {critic}: {error}", style="yellow", markup=False)
        return {}


def _seed_scores(run: Run, critic: str, name: str, source: PairSource) -> list[list[Score]]:
    folder = run.out / "evaluate" / file_name(critic)
    return [
        read_scores(folder / f"seed-{seed}" / name / f"{source.benchmark}.scores.jsonl")
        for seed in run.recipe.train.seeds
    ]


def _tokens(
    run: Run, critiques: Mapping[str, Sequence[Critique]], augmented: Mapping[str, Augmented]
) -> dict[str, dict[str, int]]:
    """Per critic: tokens that its critic read and wrote, and tokens that one training run read."""
    tokens = {}
    for critic in augmented[TRAIN].arms:
        rows = critiques.get(critic, ())
        marker = run.out / "evaluate" / file_name(critic) / f"seed-{run.recipe.train.seeds[0]}" / "done.json"
        tokens[critic] = {
            "critic_read": sum(row.n_prompt_tokens for row in rows),
            "critic_wrote": sum(row.n_completion_tokens for row in rows),
            "train": json.loads(marker.read_text(encoding="utf-8"))["n_train_tokens"],
        }
    return tokens
