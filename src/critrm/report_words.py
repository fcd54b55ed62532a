"""A report's bottom line: one paragraph in plain words, which claims no more than the numbers show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from critrm.metrics import holm
from critrm.report_data import Report, ReportCell, headline, label_of, main_cells
from critrm.results import ALL, baseline_notes
from critrm.types import NO_CRITIC


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm against no critiques on a test set's headline."""

    where: str
    """The backbone and test set."""
    critic: str
    plain: float
    with_critiques: float
    difference: Mapping[str, float]
    p_adjusted: float
    """After Holm's correction over all comparisons of the report."""


def comparisons(report: Report) -> list[Comparison]:
    """Every arm of the main cells against no critiques, with p-values adjusted together."""
    cells = main_cells(report.cells)
    found: list[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]] = []
    for cell in cells:
        for test, groups in cell.tests.items():
            arms = groups[headline(groups)]["arms"]
            where = f"{label_of(cell, cells)}, {_test(test, headline(groups))}"
            found += [(where, critic, arms[NO_CRITIC], arm) for critic, arm in arms.items() if arm["difference"]]
    adjusted = holm([arm["difference"]["p_value"] for _, _, _, arm in found])
    return [
        Comparison(
            where=where,
            critic=critic,
            plain=plain["mean"],
            with_critiques=arm["mean"],
            difference=arm["difference"],
            p_adjusted=p_value,
        )
        for (where, critic, plain, arm), p_value in zip(found, adjusted, strict=True)
    ]


def _test(test: str, label: str) -> str:
    return test if label == ALL else f"{test}'s {label}"


def bottom_line(report: Report) -> str:
    """The paragraph."""
    found = comparisons(report)
    if not found:
        return f"{_plain(report)} No arm read critiques, so nothing is said about them."
    sentences = [_verdict(found)]
    best, worst = _significant(found, gain=True), _significant(found, gain=False)
    if best:
        sentences.append(_change("Most is gained", most_telling(best)))
    if worst:
        sentences.append(_change("Most is lost", most_telling(worst)))
    if not best and not worst:
        sentences.append(_change("The largest difference is", most_telling(found)))
    sentences += [*_worth(report.exchange), *_nulls(main_cells(report.cells)), *_cautions(report)]
    return " ".join(sentences)


def _plain(report: Report) -> str:
    cell = main_cells(report.cells)[0]
    test, groups = next(iter(cell.tests.items()))
    mean = groups[headline(groups)]["arms"][NO_CRITIC]["mean"]
    share = "no pair was scored" if mean is None else f"{mean:.1%} of the pairs are ordered rightly"
    return f"After {cell.n_train} training pairs {share} on {test}."


def _significant(found: Sequence[Comparison], *, gain: bool) -> list[Comparison]:
    return [each for each in found if each.p_adjusted < 0.05 and (each.difference["value"] > 0) is gain]


def most_telling(found: Sequence[Comparison]) -> Comparison:
    """The largest gain that was shown; where none was, the largest difference."""
    return max(_significant(found, gain=True) or found, key=lambda each: abs(each.difference["value"]))


def _verdict(found: Sequence[Comparison]) -> str:
    better, worse = _significant(found, gain=True), _significant(found, gain=False)
    critics = ", ".join(dict.fromkeys(each.critic for each in found))
    if len(found) == 1:
        said = "help" if better else "harm" if worse else "make no difference that could be shown"
        return f"Critiques by {critics} {said}."
    level = len(found) - len(better) - len(worse)
    return (
        f"Of {len(found)} comparisons with no critiques (critics: {critics}), {len(better)} came out better, "
        f"{len(worse)} worse, and {level} without a difference that could be shown (p < 0.05 after Holm's correction)."
    )


def _change(start: str, each: Comparison) -> str:
    found = {name: f"{100 * each.difference[name]:+.1f}" for name in ("value", "low", "high")}
    return (
        f"{start} with {each.critic}'s critiques ({each.where}): {each.with_critiques:.1%} right instead of "
        f"{each.plain:.1%} ({found['value']} points, 95 % interval {found['low']} to {found['high']}, "
        f"adjusted p {each.p_adjusted:.2g})."
    )


def _worth(exchange: Sequence[Mapping[str, Any]]) -> list[str]:
    overall = [each for each in exchange if each["group"] == ALL]
    if not overall:
        return ["What a critique is worth in plain pairs was not measured: that takes a study of several sizes."]
    helpful = [each for each in overall if each["is_significant"] and each["difference"]["value"] > 0]
    if not helpful:
        return ["At no size is a critique shown to be worth a plain pair."]
    # Beyond the plain curve rates are bounds, and the same for all arms of a size: then the arm that gains most.
    best = max(helpful, key=lambda each: (each["rate"], each["difference"]["value"]))
    return [f"What a critique is worth, over all pairs of {best['words']}"]


def _nulls(cells: Sequence[ReportCell]) -> list[str]:
    """Whether the arms beat what reads no meaning, and the untrained backbone."""
    noted = [
        note
        for cell in cells
        # As the run noted it: of several draws of the training pairs, the first.
        for note in baseline_notes({test: {ALL: groups[ALL]} for test, groups in cell.results["tests"].items()})
        if "does not beat" in note
    ]
    if not noted:
        return []
    more = [f"{len(noted) - 1} more of the comparisons with null baselines end so."] if len(noted) > 1 else []
    return [f"A caution: {noted[0]}", *more]


def _cautions(report: Report) -> list[str]:
    found = []
    if all(cell.n_runs == 1 for cell in main_cells(report.cells)):
        found.append("One seed was trained, so the intervals speak of these models, not of the method.")
    n = min(groups[ALL]["n"] for cell in report.cells for groups in cell.tests.values())
    if n < 200:
        found.append(f"The smallest test set has {n} pairs: only large differences can be seen on it.")
    return found
