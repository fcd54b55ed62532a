"""Beside the accuracy of an evaluation: half credit, calibration, length bias and null baselines; and its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from critrm.baselines import baselines
from critrm.calibration import calibrate, length_bias
from critrm.errors import DataError
from critrm.metrics import half_credit, n_scored
from critrm.results import ALL, baseline_notes, compare_arms
from critrm.types import Critique, CritiquedPair, EvalResult, Outcome, Score, Tally


def diagnose(
    items: Sequence[CritiquedPair],
    scores: Sequence[Score],
    *,
    benchmark: str = "pairs",
    train_items: Sequence[CritiquedPair] = (),
    critiques: Sequence[Critique] = (),
    zero_label: Mapping[str, Sequence[Outcome]] | None = None,
) -> dict[str, Any]:
    """All statistics of one evaluation, as plain values; `<benchmark>.statistics.json`.

    Args:
        items: the test pairs, with the critiques that were read.
        scores: their rewards; pairs without are unscored.
        benchmark: whose sections are groups as well.
        train_items: the arm's training pairs; the bags of words learn from them, and are left out without.
        critiques: recorded critiques with the critic's own score, if there are.
        zero_label: what the untrained backbone reads (`zero_label.zero_label_scores`), if it was asked.

    Returns:
        `groups` as `results.compare_arms` gives them (by pair, also where the benchmark counts lists), `calibration`
        (None where nothing is scored), `length_bias`, and `notes`, which say what baseline is not beaten.

    Raises:
        DataError: no pairs, or of several critics.
    """
    critics = {item.critic for item in items}
    if len(critics) != 1:
        raise DataError(f"statistics need pairs of one critic, got {sorted(critics) or 'no pairs'}", field="critic")
    (critic,) = critics
    pairs = [item.pair for item in items]
    found = {score.pair_id: score for score in scores}
    nan = float("nan")
    complete = [found.get(pair.id, Score(pair.id, nan, nan)) for pair in pairs]
    nulls = {**baselines(train_items, items, critiques=critiques), **(zero_label or {})}
    groups = compare_arms(pairs, {critic: [complete]}, benchmark=benchmark, baselines={critic: nulls})
    calibration = calibrate(complete)
    return {
        "critic": critic,
        "groups": groups,
        "calibration": asdict(calibration) if calibration else None,
        "length_bias": asdict(length_bias(pairs, found)),
        "notes": baseline_notes({benchmark: groups}),
    }


def diagnostics_table(statistics: Mapping[str, Any]) -> Table:
    """The null baselines of an evaluation for the terminal; calibration and length bias below."""
    table = Table(title="Beside it: null baselines", caption=_caption(statistics))
    for title in ("null baseline", "pairs", "strict accuracy", "model minus it", "p"):
        is_text = title in ("null baseline", "pairs")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=title == "null baseline")
    critic = statistics["critic"]
    for label, group in statistics["groups"].items():
        if group["kind"] == "subset":
            continue
        for name, null in group["baselines"].get(critic, {}).items():
            difference, mean = null["difference"], null["mean"]
            table.add_row(
                Text(name),
                Text(label),
                "-" if mean is None else Text(f"{mean:.3f} [{null['low']:.2f}, {null['high']:.2f}]"),
                f"{difference['value']:+.3f}" if difference else "-",
                f"{difference['p_value']:.2g}" if difference else "-",
                style="bold" if label == ALL else None,
            )
    return table


def _caption(statistics: Mapping[str, Any]) -> str:
    lines = []
    if found := statistics["calibration"]:
        fitted = f", at most well set at temperature {found['temperature']:.2f}" if found["temperature"] else ""
        lines.append(f"calibration error {found['ece']:.3f}{fitted}")
    bias = statistics["length_bias"]
    if bias["correlation"] is not None:
        lines.append(f"rank correlation of reward and length {bias['correlation']:+.2f}")
    if matched := bias["matched"]["accuracy"]:
        n = sum(bias["matched"][f"n_{name}"] for name in ("right", "wrong", "tie"))
        lines.append(f"accuracy on the {n} pairs of about equal length {matched['value']:.3f}")
    lines += [escape(note) for note in statistics["notes"]]
    return "\n".join(lines)


def result_table(result: EvalResult) -> Table:
    """One evaluation for the terminal."""
    table = Table(title=f"{escape(result.benchmark)}, model {escape(result.model)}, critic {escape(result.critic)}")
    for index, title in enumerate(("subset", "pairs", "right", "wrong", "tie", "unscored", "strict accuracy")):
        table.add_column(title, justify="left" if index == 0 else "right")
    for name, found in result.subsets.items():
        table.add_row(*_cells(name, found))
    for name, value in result.sections.items():
        table.add_row(f"section {escape(name)}", *[""] * 5, f"{value:.3f}", style="cyan")
    table.add_row(*_cells("all pairs", result.overall), style="bold")
    number = "-" if result.headline_value is None else f"{result.headline_value:.3f}"
    half = half_credit(result.overall) if result.overall.n_tie else None
    table.caption = (
        f"{number} {escape(result.headline)}\n\\[95 % Wilson interval]; a tie is not right"
        + (f" (all pairs with half credit for ties: {half:.3f})" if half is not None else "")
        + ("; unscored pairs are left out" if result.overall.n_unscored else "")
    )
    return table


def _cells(name: str, found: Tally) -> tuple[str, ...]:
    n = n_scored(found) + found.n_unscored
    counts = tuple(str(each) for each in (n, found.n_right, found.n_wrong, found.n_tie, found.n_unscored))
    accuracy = found.accuracy
    text = f"{accuracy.value:.3f} \\[{accuracy.low:.2f}, {accuracy.high:.2f}]" if accuracy else "-"
    return (escape(name), *counts, text)
