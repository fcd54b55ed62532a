"""Arms side by side: accuracy by group with intervals, spread over seeds, and paired tests against no critiques."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from critrm.baselines import CRITIQUE_NULLS, CRITIQUES_ONLY, ZERO_LABEL_NULLS
from critrm.benchmarks import BENCHMARKS
from critrm.errors import DataError
from critrm.metrics import correctness, half_credit, holm, n_scored, paired_difference, seed_spread, tally
from critrm.types import NO_CRITIC, Outcome, PreferencePair, Score

ArmScores = Mapping[str, Sequence[Sequence[Score]]]
"""Critic's name -> one list of scores per seed."""

ArmBaselines = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""Critic's name -> null baseline (`baselines.baselines`) -> one outcome per pair, in their order."""

ALL = "all"
"""The group that holds every pair."""
ALL_SEEDS = "all seeds"
"""The ensemble of an arm's seeds."""


def compare_arms(
    pairs: Sequence[PreferencePair],
    arms: ArmScores,
    *,
    benchmark: str = "pairs",
    baselines: ArmBaselines | None = None,
    blends: Mapping[str, ArmScores] | None = None,
    ensembles: Mapping[str, Mapping[str, Sequence[Score]]] | None = None,
) -> dict[str, Any]:
    """Compare each arm with the No-Critiques arm and with its null baselines on the same pairs, over all and by group.

    Args:
        pairs: the test pairs.
        arms: the scores of each arm and seed, on exactly these pairs.
        benchmark: whose sections are groups as well.
        baselines: the null baselines of the arms.
        blends: the arms' scores blended with another reading (`blend`), by the reading; one list per arm and seed.
        ensembles: an arm's seeds as one model, alone or blended with another reading, by its name; one list per arm.

    Returns:
        Group -> number of pairs, whether it is `all`, a `section` or a `subset` (`kind`), and per arm: `mean` strict
        accuracy over seeds with its `std`, `half` credit for ties, the 95 % Wilson interval `low` to `high` over items
        at it, ties and unscored pairs over all seeds, and the `difference` from the No-Critiques arm (paired bootstrap
        over items and seeds) with `p_value`, and `p_holm` adjusted over the sections and subsets together.
        `baselines` holds, per arm and baseline, its accuracy and the `difference` of the arm from it; `blends`, per
        reading and arm, what the blend comes to and its `difference` from the arm, seed by seed; `ensembles`, per name
        and arm, what the ensemble comes to and its `difference` from that of no critiques (exact McNemar).

    Raises:
        DataError: an arm lacks a pair, or a baseline has another number of outcomes than there are pairs.
    """
    by_arm = {critic: [_by_pair(scores, pairs, critic) for scores in seeds] for critic, seeds in arms.items()}
    nulls = {
        critic: {name: _by_position(outcomes, pairs, name) for name, outcomes in found.items()}
        for critic, found in (baselines or {}).items()
        if critic in by_arm
    }
    blended = {
        reading: {critic: [_by_pair(scores, pairs, critic) for scores in seeds] for critic, seeds in found.items()}
        for reading, found in (blends or {}).items()
    }
    together = {
        name: {critic: [_by_pair(scores, pairs, critic)] for critic, scores in found.items()}
        for name, found in (ensembles or {}).items()
    }
    plain = next((found[NO_CRITIC] for found in together.values() if NO_CRITIC in found), None)
    groups = {}
    for label, (kind, members) in groups_of(pairs, benchmark).items():
        groups[label] = {"kind": kind, **_group(members, by_arm)}
        groups[label]["baselines"] = {
            critic: {name: _baseline(members, by_arm[critic], found) for name, found in each.items()}
            for critic, each in nulls.items()
        }
        groups[label]["blends"] = {
            reading: {
                critic: _blended(_outcomes(seeds, members), _outcomes(by_arm[critic], members))
                for critic, seeds in found.items()
            }
            for reading, found in blended.items()
        }
        groups[label]["ensembles"] = {
            name: {critic: _ensemble(members, models, plain) for critic, models in found.items()}
            for name, found in together.items()
        }
    parts = [group for label, group in groups.items() if label != ALL]
    for critic in arms:
        rows = [group["arms"][critic]["difference"] for group in parts]
        tested = [row for row in rows if row is not None]
        for row, adjusted in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
            row["p_holm"] = adjusted
    return groups


def _by_pair(scores: Sequence[Score], pairs: Sequence[PreferencePair], critic: str) -> dict[str, Score]:
    found = {score.pair_id: score for score in scores}
    missing = [pair.id for pair in pairs if pair.id not in found]
    if missing:
        raise DataError(f"the scores of arm {critic!r} lack {len(missing)} pairs, such as {missing[0]!r}")
    return found


def _by_position(outcomes: Sequence[Outcome], pairs: Sequence[PreferencePair], name: str) -> dict[str, Outcome]:
    if len(outcomes) != len(pairs):
        raise DataError(f"the baseline {name!r} has {len(outcomes)} outcomes for {len(pairs)} pairs")
    return {pair.id: outcome for pair, outcome in zip(pairs, outcomes, strict=True)}


def groups_of(pairs: Sequence[PreferencePair], benchmark: str) -> dict[str, tuple[str, list[str]]]:
    """Label -> kind and pair ids: all pairs; with several subsets, sections that span some of them, and each subset."""
    table = BENCHMARKS[benchmark]
    by_subset: dict[str, list[str]] = {}
    for pair in pairs:
        by_subset.setdefault(table.subset_of(pair), []).append(pair.id)
    groups = {ALL: (ALL, [pair.id for pair in pairs])}
    if len(by_subset) > 1:
        for section, subsets in table.sections.items():
            present = [subset for subset in subsets if subset in by_subset]
            if len(present) > 1:
                groups[section] = ("section", [pair_id for subset in present for pair_id in by_subset[subset]])
        for subset, members in sorted(by_subset.items()):
            # Its name may be that of a section, or "all".
            label = f"{subset} (subset)" if subset in groups else subset
            groups[label] = ("subset", members)
    return groups


def _group(members: list[str], by_arm: Mapping[str, list[dict[str, Score]]]) -> dict[str, Any]:
    outcomes = {critic: _outcomes(seeds, members) for critic, seeds in by_arm.items()}
    right = {critic: [correctness(seed) for seed in seeds] for critic, seeds in outcomes.items()}
    arms = {}
    for critic, seeds in outcomes.items():
        is_compared = critic != NO_CRITIC and NO_CRITIC in right
        arms[critic] = {
            **accuracy_over_seeds(seeds),
            "difference": _difference(right[critic], right[NO_CRITIC]) if is_compared else None,
        }
    return {"n": len(members), "arms": arms}


def _outcomes(seeds: Sequence[Mapping[str, Score]], members: Sequence[str]) -> list[list[Outcome]]:
    return [[scores[pair_id].outcome for pair_id in members] for scores in seeds]


def _blended(seeds: Sequence[Sequence[Outcome]], arm: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    return {**accuracy_over_seeds(seeds), "difference": same_models_difference(seeds, arm)}


def _ensemble(
    members: Sequence[str], models: list[dict[str, Score]], plain: list[dict[str, Score]] | None
) -> dict[str, Any]:
    """One model on some pairs, and how much better it is than the No-Critiques arm's, where it is not that itself."""
    outcomes = _outcomes(models, members)
    is_compared = plain is not None and models is not plain
    right = [[correctness(rows) for rows in each] for each in (outcomes, _outcomes(plain or [], members))]
    return {**accuracy_over_seeds(outcomes), "difference": _difference(*right) if is_compared else None}


def blend(*readings: Sequence[Score]) -> list[Score]:
    """Several readings of the same pairs as one: the sum of their rewards, each on a scale on which its margins are 1.

    The scale is the root mean square of the margins (chosen minus rejected), which does not change when the two
    completions of a pair are exchanged: no label is used.

    Args:
        *readings: scores of the same pairs, in any order.
    """
    scaled = [(_scale(scores), {score.pair_id: score for score in scores}) for scores in readings]
    return [
        Score(
            pair_id,
            sum(scores[pair_id].chosen / scale for scale, scores in scaled),
            sum(scores[pair_id].rejected / scale for scale, scores in scaled),
        )
        for pair_id in scaled[0][1]
    ]


def _scale(scores: Sequence[Score]) -> float:
    margins = [score.chosen - score.rejected for score in scores]
    known = [margin * margin for margin in margins if math.isfinite(margin)]
    return math.sqrt(sum(known) / len(known)) if any(known) else 1.0


def accuracy_over_seeds(seeds: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """Strict accuracy of one row of outcomes per seed on the same pairs, as `compare_arms` gives it for an arm."""
    tallies = [tally(seed) for seed in seeds]
    spread = seed_spread([each.accuracy.value for each in tallies if each.accuracy])
    halves = [half for each in tallies if (half := half_credit(each)) is not None]
    return {
        "mean": spread.mean if spread else None,
        "std": spread.std if spread else None,
        "half": sum(halves) / len(halves) if halves else None,
        "by_seed": [each.accuracy.value if each.accuracy else None for each in tallies],
        **_interval(spread.mean if spread else None, max(n_scored(each) for each in tallies)),
        "n_tie": sum(each.n_tie for each in tallies),
        "n_unscored": sum(each.n_unscored for each in tallies),
    }


def same_models_difference(a: Sequence[Sequence[Outcome]], b: Sequence[Sequence[Outcome]]) -> dict[str, float] | None:
    """How much more accurate the same models (one row of outcomes per seed) are on `a` than on `b`, the same pairs.

    As between arms (`metrics.paired_difference`), but seeds are paired as well: each model is compared with itself.
    None where nothing is scored.
    """
    right = [(correctness(x), correctness(y)) for x, y in zip(a, b, strict=True)]
    gains = [[x - y for x, y in zip(*seed, strict=True)] for seed in right]
    return _difference(gains, [[0.0] * len(gains[0])] if gains else [])


def _difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> dict[str, float] | None:
    found = paired_difference(a, b)
    return None if found is None else asdict(found)


def _baseline(
    members: Sequence[str], seeds: Sequence[Mapping[str, Score]], outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    """A null baseline on some pairs, and how much better the arm is than it."""
    null = [outcomes[pair_id] for pair_id in members]
    found = tally(null)
    arm = [correctness(scores[pair_id].outcome for pair_id in members) for scores in seeds]
    return {
        "mean": found.accuracy.value if found.accuracy else None,
        "half": half_credit(found),
        "low": found.accuracy.low if found.accuracy else None,
        "high": found.accuracy.high if found.accuracy else None,
        "n_tie": found.n_tie,
        "n_unscored": found.n_unscored,
        "difference": _difference(arm, [correctness(null)]),
    }


def baseline_notes(tests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In words, where an arm does not beat what its critiques give away unread, or to the untrained backbone.

    Args:
        tests: test set -> what `compare_arms` returned.
    """
    notes = []
    for test, groups in tests.items():
        for label, group in groups.items():
            where = test if label == ALL else f"{test}, {label}"
            for critic, found in group.get("baselines", {}).items():
                if critic == NO_CRITIC or group.get("kind") == "subset":
                    continue
                if label == ALL and CRITIQUES_ONLY not in found:
                    notes.append(
                        f"{where}: {critic} was not compared with a bag of words over its critiques, which needs the "
                        "arm's training pairs and `pip install 'critrm[eval]'`."
                    )
                for names, meaning in (
                    (CRITIQUE_NULLS, "It may have learnt no more than how critics word praise and blame."),
                    (ZERO_LABEL_NULLS, "Its training pairs may have taught it nothing that its backbone did not know."),
                ):
                    if lost := _not_beaten(found, names):
                        mean = group["arms"][critic]["mean"]
                        notes.append(f"{where}: {critic} ({mean:.3f}) does not beat {lost}. {meaning}")
    return notes


def _not_beaten(found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    return ", ".join(
        f"{name} ({found[name]['mean']:.3f}, p {found[name]['difference']['p_value']:.2g})"
        for name in names
        if name in found and not _beats(found[name]["difference"])
    )


def _beats(difference: Mapping[str, float] | None) -> bool:
    # Nothing to compare is no defeat.
    return difference is None or (difference["value"] > 0 and difference["p_value"] < 0.05)


def _interval(mean: float | None, n_items: int) -> dict[str, float | None]:
    if mean is None:
        return {"low": None, "high": None}
    n_right = round(mean * n_items)
    found = tally([Outcome.RIGHT] * n_right + [Outcome.WRONG] * (n_items - n_right)).accuracy
    assert found is not None
    return {"low": found.low, "high": found.high}
