"""Tables 2 and 3 of a report: each arm's accuracy by section and test set, and what the critics say of one response."""

from collections.abc import Mapping, Sequence

from critrm.report_data import Report, ReportCell, arm_name, headline, label_of, main_cells, parts
from critrm.report_markup import ReportTable, TableCell
from critrm.report_texts import ArmTexts
from critrm.result_tables import accuracy_cells
from critrm.results import ALL
from critrm.types import NO_CRITIC, PreferencePair


def accuracy_table(report: Report) -> ReportTable:
    """Table 2: each arm's accuracy by section and test set, for each backbone."""
    cells = main_cells(report.cells)
    columns = [(test, label) for test, groups in cells[0].tests.items() for label in [headline(groups), *parts(groups)]]
    titles = ["backbone", "critiques"]
    for test, label in columns:
        group = cells[0].tests[test][label]
        where = f"{test}: {label}" if len(cells[0].tests) > 1 and label != ALL else test if label == ALL else label
        titles.append(f"{where} ({group['n']})")
        if label == headline(cells[0].tests[test]):
            titles += ["difference", "p"]
    rows = []
    for cell in cells:
        block = [_accuracy_row(cell, critic, columns, label_of(cell, cells)) for critic in (NO_CRITIC, *cell.critics)]
        rows += _marked(block)
    sizes = sorted({cell.n_train for cell in cells})
    spread = "runs" if any(cell.n_runs > 1 for cell in cells) else ""
    return ReportTable(
        key="table2",
        title="Table 2: accuracy by arm and test set",
        caption=(
            f"Strict accuracy after training on {_listed(sizes)} pairs, {_runs(cells, len(report.seeds))}; "
            f"[95 % intervals over items]{f'; ± standard deviation over {spread}' if spread else ''}. "
            "The best of a backbone is bold, the second underlined. Difference from no critiques on the same pairs, "
            "with its 95 % interval and its p (paired; not adjusted for the number of arms)."
        ),
        titles=tuple(titles),
        rows=tuple(rows),
        n_text=2,
    )


def _accuracy_row(
    cell: ReportCell, critic: str, columns: Sequence[tuple[str, str]], label: str
) -> tuple[TableCell, ...]:
    row = [TableCell(text=label), TableCell(text=arm_name(critic))]
    for test, name in columns:
        arm = cell.tests[test].get(name, {"arms": {}})["arms"].get(critic, {"mean": None})
        is_headline = name == headline(cell.tests[test])
        accuracy, difference, p_value = accuracy_cells(arm if is_headline else {**arm, "std": None})
        row.append(TableCell(text=accuracy, value=arm["mean"], mark="ranked"))
        if is_headline:
            found = arm.get("difference") or {}
            row += [
                TableCell(text=difference, value=found.get("value")),
                TableCell(text=p_value, value=found.get("p_value")),
            ]
    return tuple(row)


def _marked(block: Sequence[tuple[TableCell, ...]]) -> list[tuple[TableCell, ...]]:
    """The rows of a backbone with the best and second best of each column marked."""
    marks: dict[tuple[int, float], str] = {}
    for column in range(len(block[0])):
        values = {row[column].value for row in block if row[column].mark}
        ranked = sorted((value for value in values if value is not None), reverse=True)
        if len(ranked) > 1:
            marks |= {(column, ranked[0]): "best", (column, ranked[1]): "second"}
    return [
        tuple(
            TableCell(text=cell.text, value=cell.value, mark=marks.get((column, cell.value), ""))
            if cell.mark and cell.value is not None
            else TableCell(text=cell.text, value=cell.value)
            for column, cell in enumerate(row)
        )
        for row in block
    ]


def example_table(texts: Mapping[str, ArmTexts], pair: PreferencePair) -> ReportTable:
    """Table 3: what each critic says of one response."""
    asked = pair.prompt[-1].content
    said = {critic: found[pair.id][0] for critic, found in texts.items() if pair.id in found}
    return ReportTable(
        key="table3",
        title="Table 3: critiques of one response by each critic",
        caption=f"Pair {pair.id}. User: {asked}\nPreferred response: {pair.chosen}",
        titles=("critic", "critique of the preferred response"),
        rows=tuple((TableCell(text=critic), TableCell(text=text)) for critic, text in said.items()),
        n_text=2,
    )


def _listed(sizes: Sequence[int]) -> str:
    return " or ".join(str(size) for size in sizes)


def _runs(cells: Sequence[ReportCell], n_seeds: int) -> str:
    n_draws = max(cell.n_draws for cell in cells)
    seeds = f"{n_seeds} seeds" if n_seeds > 1 else "one seed"
    return f"{n_draws} draws of them with {seeds}" if n_draws > 1 else seeds
