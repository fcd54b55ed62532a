"""A run's results as tables: for the terminal, and in Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from critrm.baselines import ZERO_LABEL_NULLS
from critrm.results import ALL, baseline_notes
from critrm.types import NO_CRITIC

_Row = list[str]
BLEND = (
    "the arm's rewards plus another reading of the same pairs, each divided by the size of its margins on the test "
    "set; no label is used; untrained: its backbone's before training; difference and p: from the arm alone, paired by "
    "pair and seed"
)
"""What a blend is."""
ENSEMBLE = (
    "the rewards of an arm's seeds added up, as those of one model, alone or blended with another reading; difference "
    "and p: from no critiques, all seeds"
)
"""What an ensemble is."""


def results_table(results: Mapping[str, Any]) -> Table:
    """The arms side by side, over all pairs of each test set and by group, for the terminal."""
    seeds = len(results["seeds"])
    caption = (
        f"{results['n_train']} training pairs, {seeds} seed{'s' if seeds > 1 else ''}; [95 % intervals]; difference "
        "from no critiques and p: paired" + ("; ± standard deviation over seeds" if seeds > 1 else "")
    )
    table = number_table(
        "Strict accuracy by test set", caption, ("test set, and its arms", "accuracy", "difference", "p")
    )
    for test, groups in results["tests"].items():
        for label, group in groups.items():
            style = "bold" if label == ALL else ""
            table.add_row(Text(f"{test if label == ALL else label}, {group['n']} pairs", style))
            for critic, arm in group["arms"].items():
                accuracy, difference, p_value = accuracy_cells(arm)
                name = Text(f" {_name(critic)}")
                if critic == NO_CRITIC:
                    table.add_row(name, Text(accuracy, style))
                else:
                    table.add_row(name, Text(accuracy, style), Text(difference), Text(p_value))
            table.add_section()
    return table


def _name(critic: str) -> str:
    return "no critiques" if critic == NO_CRITIC else critic


def baselines_table(results: Mapping[str, Any]) -> Table | None:
    """Null baselines below each arm, over all pairs of each test set, for the terminal; None where there are none."""
    untrained = "; untrained: the backbone's own reading, without a label" if _asks_backbone(results) else ""
    caption = "\n".join([f"arm minus null and p: paired{untrained}", *baseline_notes(results["tests"])])
    table = number_table("Null baselines", caption, ("arm, and its nulls", "accuracy", "arm minus null", "p"))
    for test, groups in results["tests"].items():
        for critic, nulls in groups[ALL].get("baselines", {}).items():
            table.add_row(
                Text(f"{test}, {_name(critic)}", "bold"),
                Text(accuracy_cells(groups[ALL]["arms"][critic])[0], "bold"),
                "",
                "",
            )
            for null, found in nulls.items():
                if found["mean"] is not None:
                    table.add_row(Text(f" {null}"), *map(Text, accuracy_cells(found)))
            table.add_section()
    return table if table.row_count else None


def blends_table(results: Mapping[str, Any]) -> Table | None:
    """Each arm blended with other readings of its pairs, for the terminal; None where there are none."""
    return _combined_table(results, "blends", "Blended", BLEND)


def ensembles_table(results: Mapping[str, Any]) -> Table | None:
    """Each arm's seeds as one model, for the terminal; None where there is one seed."""
    return _combined_table(results, "ensembles", "Ensembles", ENSEMBLE)


def _combined_table(results: Mapping[str, Any], kind: str, title: str, caption: str) -> Table | None:
    table = number_table(title, caption, ("test set, and its arms", "accuracy", "difference", "p"))
    for test, groups in results["tests"].items():
        for label, group in groups.items():
            if group["kind"] == "subset":
                continue
            for reading, blends in group.get(kind, {}).items():
                if not blends:
                    continue
                where = f"{test if label == ALL else label}, {group['n']} pairs"
                table.add_row(Text(f"{where}, with {reading}", "bold"))
                for critic, found in blends.items():
                    table.add_row(Text(f" {_name(critic)}"), *map(Text, accuracy_cells(found)))
                table.add_section()
    return table if table.row_count else None


def _asks_backbone(results: Mapping[str, Any]) -> bool:
    arms = (nulls for groups in results["tests"].values() for nulls in groups[ALL].get("baselines", {}).values())
    return any(name in nulls for nulls in arms for name in ZERO_LABEL_NULLS)


def number_table(title: str, caption: str, titles: Sequence[str]) -> Table:
    """An empty table for the terminal whose first column is text and whose others are numbers, kept whole."""
    # Without lines between columns, so that three arms fit into 80 columns; texts as `Text`, never as markup.
    table = Table(title=title, caption=Text(caption), caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in titles:
        is_number = name != titles[0]
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def _arms(results: Mapping[str, Any]) -> tuple[_Row, list[_Row]]:
    """Column titles and rows of text: the arms in each group."""
    critics = list(results["learning_rates"])
    titles = ["test set", "pairs"]
    for critic in critics:
        titles += [critic] if critic == NO_CRITIC else [critic, "difference", "p"]
    rows = []
    for test, groups in results["tests"].items():
        for label, group in groups.items():
            row = [test if label == ALL else f"  {label}", str(group["n"])]
            for critic in critics:
                row += accuracy_cells(group["arms"][critic])[: 1 if critic == NO_CRITIC else 3]
            rows.append(row)
    return titles, rows


def _nulls(results: Mapping[str, Any]) -> tuple[_Row, list[_Row]]:
    """Column titles and rows of text: each null baseline under each arm; those that never apply are left out."""
    critics = list(results["learning_rates"])
    titles = ["null baseline", *(title for critic in critics for title in (critic, "arm minus null", "p"))]
    rows = []
    for test, groups in results["tests"].items():
        found = groups[ALL].get("baselines", {})
        names = dict.fromkeys(name for each in found.values() for name in each)
        applied = [row for row in (_null(name, found, critics) for name in names) if set(row[1:]) != {"-"}]
        if applied:
            rows += [[test, *[""] * (len(titles) - 1)], *applied]
    return titles, rows


def _combined(results: Mapping[str, Any], kind: str, title: str) -> tuple[_Row, list[_Row]]:
    """Column titles and rows of text: each arm's blends or ensembles, by their names, in each group."""
    critics = list(results["learning_rates"])
    titles = [title, *(title for critic in critics for title in (critic, "difference", "p"))]
    rows = []
    for test, groups in results["tests"].items():
        for reading in groups[ALL].get(kind, {}):
            found = {label: group[kind][reading] for label, group in groups.items()}
            if found[ALL]:
                rows.append([reading, *[""] * (len(titles) - 1)])
                for label, blends in found.items():
                    cells = (accuracy_cells(blends.get(critic, {"mean": None})) for critic in critics)
                    rows.append([f"  {test if label == ALL else label}", *(cell for each in cells for cell in each)])
    return titles, rows


def _null(name: str, found: Mapping[str, Mapping[str, Any]], critics: Sequence[str]) -> _Row:
    cells = (accuracy_cells(found.get(critic, {}).get(name, {"mean": None})) for critic in critics)
    return [f"  {name}", *(cell for each in cells for cell in each)]


def accuracy_cells(arm: Mapping[str, Any]) -> _Row:
    """Accuracy with its interval, the difference with its interval, and its p-value."""
    if arm["mean"] is None:
        return ["-"] * 3
    spread = f" ±{arm['std']:.3f}" if arm.get("std") is not None else ""
    accuracy = f"{arm['mean']:.3f}{spread} [{_short(arm['low'])}, {_short(arm['high'])}]"
    found = arm["difference"]
    if not found:
        return [accuracy, "-", "-"]
    return [
        accuracy,
        f"{found['value']:+.3f} [{_signed(found['low'])}, {_signed(found['high'])}]",
        f"{found['p_value']:.2g}",
    ]


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")


def _signed(share: float) -> str:
    return f"{share:+.2f}".replace("0.", ".", 1)


def costs_table(results: Mapping[str, Any]) -> Table:
    """Seconds and tokens by stage and arm, for the terminal."""
    table = Table(title="What it took")
    for index, title in enumerate(("stage", "seconds", "tokens read", "tokens written")):
        table.add_column(title, justify="left" if index == 0 else "right")
    for stage, seconds in results["seconds"].items():
        verb, _, critic = stage.partition(" ")
        tokens = results["tokens"].get(critic, {})
        read = {"critique": tokens.get("critic_read"), "train": tokens.get("train")}.get(verb)
        written = tokens.get("critic_wrote") if verb == "critique" else None
        table.add_row(Text(stage), f"{seconds:.0f}", f"{read:,}" if read else "", f"{written:,}" if written else "")
    return table


def arms_markdown(results: Mapping[str, Any]) -> str:
    """The arms of a run in each test set and group, as a Markdown table with its key."""
    rates = ", ".join(f"{critic} {rate:g}" for critic, rate in results["learning_rates"].items())
    table = "\n".join(markdown_table(*_arms(results)))
    return (
        f"{table}\n\n{results['n_train']} training pairs, backbone {results['backbone']}, seeds {results['seeds']}, "
        f"learning rates: {rates}. "
        "Strict accuracy (a tie is not right), mean over seeds ± standard deviation, "
        "[95 % Wilson interval over items]. "
        "Difference from no critiques with its 95 % interval and p from a paired bootstrap over items and seeds "
        "(exact McNemar for one seed), not adjusted for the number of rows."
    )


def results_markdown(results: Mapping[str, Any]) -> str:
    """A run's results as Markdown tables with their keys."""
    lines = [
        arms_markdown(results) + " Half credit for ties, and all numbers by subset, are in results.json.",
        "",
    ]
    titles, rows = _nulls(results)
    asks = _asks_backbone(results)
    if rows:
        lines += [
            *markdown_table(titles, rows),
            "",
            "Null baselines read no meaning"
            + (", or (untrained) are what the backbone says before it has seen a label" if asks else "")
            + ". Each arm's column has the baseline's accuracy, how much better the arm is than it, and p of that.",
            "",
            *(f"- {note}\n" for note in baseline_notes(results["tests"])),
        ]
    for kind, title, key in (("blends", "blended with", BLEND), ("ensembles", "ensemble of", ENSEMBLE)):
        titles, rows = _combined(results, kind, title)
        if rows:
            lines += [*markdown_table(titles, rows), "", f"{key[0].upper()}{key[1:]}.", ""]
    lines += [
        "| stage | seconds |",
        "|---|---:|",
        *(f"| {stage} | {seconds:.0f} |" for stage, seconds in results["seconds"].items()),
    ]
    return "\n".join(lines) + "\n"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table; the first column is text, the others are numbers."""
    yield "| " + " | ".join(map(_cell, titles)) + " |"
    yield "|" + "|".join("---" if index == 0 else "---:" for index in range(len(titles))) + "|"
    for row in rows:
        name, *numbers = map(_cell, row)
        yield "| " + " | ".join(["&nbsp;" * (len(name) - len(name.lstrip())) + name.lstrip(), *numbers]) + " |"


def _cell(text: str) -> str:
    """A text that cannot end its cell of a Markdown table."""
    return re.sub(r"\s", " ", text).replace("<", "&lt;").replace("|", "\\|")
