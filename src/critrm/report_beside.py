"""The paper's numbers beside a report's own: Tables 1, 2 and 4, and what the paper's text reads off its figures."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from critrm.paper_tables import (
    CHECKPOINTS,
    NO_CRITIQUES,
    PANDALM,
    SECTIONS,
    PaperReading,
    paper_gains,
    readings,
    same_name,
    table1,
    table2,
    table4,
)
from critrm.report_data import Report, arm_name, headline, label_of, main_cells, parts
from critrm.report_markup import ReportTable, TableCell
from critrm.result_tables import accuracy_cells
from critrm.results import ALL
from critrm.types import NO_CRITIC


def quality_table(report: Report) -> ReportTable | None:
    """Table 4: MetaCritique's scores, the paper's beside ours; None where nothing was graded."""
    if not report.quality:
        return None
    rows = []
    for each in report.quality:
        papers = next((asdict(row) for row in table4() if same_name(each["critic"], row.critic)), None)
        row = [TableCell(text=each["critic"]), TableCell(text=each["grader"])]
        row.append(TableCell(text=str(each["n_critiques"]), value=each["n_critiques"]))
        for name in ("precision", "recall", "f1"):
            row += [_interval_cell(each[name]), _number(papers[name] if papers else None, digits=4)]
        rows.append(tuple(row))
    return ReportTable(
        key="table4",
        title="Table 4: how good the critiques are",
        caption="MetaCritique: means over critiques [95 % bootstrap interval over pairs]; the paper's beside ours.",
        titles=("critic", "grader", "critiques", "precision", "paper", "recall", "paper", "F1", "paper"),
        rows=tuple(rows),
        n_text=2,
    )


def _interval_cell(score: Mapping[str, float] | None) -> TableCell:
    if score is None:
        return TableCell(text="-")
    return TableCell(text=f"{score['value']:.3f} [{score['low']:.2f}, {score['high']:.2f}]", value=score["value"])


def _number(value: float | None, *, digits: int = 3, sign: bool = False) -> TableCell:
    if value is None:
        return TableCell(text="-")
    return TableCell(text=f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}", value=value)


def gains_table(report: Report) -> ReportTable:
    """What each critic's critiques add: the paper's three checkpoints beside our backbones."""
    cells, theirs = main_cells(report.cells), paper_gains()
    ours = list(dict.fromkeys(critic for cell in cells for critic in cell.critics))
    names = [*ours, *(name for name in theirs if not any(same_name(each, name) for each in ours))]
    columns = [(cell, test) for cell in cells for test in cell.tests]
    rows = []
    for name in names:
        papers = next((gains for critic, gains in theirs.items() if same_name(name, critic)), {})
        row = [TableCell(text=name)]
        for cell, test in columns:
            groups = cell.tests[test]
            arm = groups[headline(groups)]["arms"].get(name, {"mean": None, "difference": None})
            row.append(TableCell(text=accuracy_cells(arm)[1], value=(arm["difference"] or {}).get("value")))
        rows.append((*row, *(_number(papers.get(checkpoint), sign=True) for checkpoint in CHECKPOINTS)))
    return ReportTable(
        key="gains",
        title="What critiques add: ours and the paper's",
        caption=(
            "Accuracy with critiques minus accuracy without. The paper's: the mean of RewardBench's four sections, "
            "computed from its Table 2 (5,000 training pairs, one run each; it gives no intervals)."
        ),
        titles=(
            "critic",
            *(f"{label_of(cell, cells)}, {test}" for cell, test in columns),
            *(f"paper: {each}" for each in CHECKPOINTS),
        ),
        rows=tuple(rows),
    )


def readings_table(report: Report) -> ReportTable:
    """What the paper's text reads off its figures, and the same of this study where it was measured."""
    rows = [
        (
            TableCell(text=each.section),
            TableCell(text=f"“{each.quote}”"),
            TableCell(text=_our_reading(report, each)),
            TableCell(text=f"{each.value:g}", value=each.value),
        )
        for each in readings()
    ]
    return ReportTable(
        key="readings",
        title="What the paper's text reads off its figures",
        caption="Ours are of this study's data and backbones, for the same critic: no replication of the number.",
        titles=("section", "the paper", "here", "the paper's number"),
        rows=tuple(rows),
        n_text=3,
    )


def _our_reading(report: Report, reading: PaperReading) -> str:
    found = []
    rates = [each for each in report.exchange if each["group"] == ALL]
    if reading.measure == "rate":
        helpful = [each for each in rates if each["is_significant"] and each["difference"]["value"] > 0]
        if rates and not helpful:
            return "no critique is shown to be worth a plain pair"
        found = [_rate(each) for each in sorted(helpful, key=lambda each: -float(each["rate"]))[:1]]
    elif reading.measure in ("plain_pairs", "plain_pairs_above"):
        found = [_rate(each) for each in rates if same_name(each["critic"], reading.critic)]
    elif reading.measure == "gain":
        for cell in main_cells(report.cells):
            for groups in cell.tests.values():
                for critic, arm in groups[headline(groups)]["arms"].items():
                    if same_name(critic, reading.critic):
                        found.append(f"{cell.backbone_name}: {accuracy_cells(arm)[1]}")
    return "; ".join(found) or "not measured"


def _rate(each: Mapping[str, Any]) -> str:
    return f"{each['critic']}, {each['n_train']} pairs, {each['test']}: {worth(each)}"


def worth(each: Mapping[str, Any]) -> str:
    """An exchange rate in a few words."""
    if not each["is_significant"]:
        return "no worth shown"
    if each["difference"]["value"] < 0:
        return "they do harm"
    if each["plain_pairs"] >= each["largest"] and each["slope"] <= 0:
        return f"no number of plain pairs up to {each['largest']}"
    if each["plain_pairs"] >= each["largest"]:
        return f"more than {each['largest']} plain pairs"
    high = f"more than {each['largest']}" if each["high"] >= each["largest"] else f"{each['high']:.0f}"
    return f"{each['plain_pairs']:.0f} plain pairs [{each['low']:.0f}, {high}], {each['rate']:.1f} each"


def counts_table(report: Report) -> ReportTable:
    """Table 1: the test sets, ours and the paper's."""
    cell, papers = report.cells[0], {row.dataset: row.n_examples for row in table1()}
    rows = []
    for test, groups in cell.tests.items():
        for label in (ALL, *parts(groups)):
            name = test if label == ALL else label
            in_paper = report.benchmarks[test] in ("rewardbench", "pandalm")
            theirs = next((n for dataset, n in papers.items() if in_paper and same_name(name, dataset)), None)
            n = groups[label]["n"]
            rows.append(
                (
                    TableCell(text=test if label == ALL else f"{test}: {label}"),
                    TableCell(text=f"{n}", value=n),
                    TableCell(text="-" if theirs is None else f"{theirs}", value=theirs),
                )
            )
    return ReportTable(
        key="table1",
        title="Table 1: the test sets",
        caption="Pairs that every run scored. The paper counts RewardBench's 447 PRM pairs with their weight, 984.",
        titles=("test set", "pairs here", "paper"),
        rows=tuple(rows),
    )


def paper_accuracy_table() -> ReportTable:
    """The paper's Table 2, as printed."""
    rows = [
        (
            TableCell(text=row.checkpoint),
            TableCell(text=arm_name(NO_CRITIC) if row.critic == NO_CRITIQUES else row.critic),
            *(_number(row.accuracy[name], digits=4) for name in (*SECTIONS, PANDALM)),
            _number(row.average, digits=4),
        )
        for row in table2()
    ]
    return ReportTable(
        key="paper-table2",
        title="The paper's Table 2",
        caption="As printed; the mean of the four sections of RewardBench is computed from it.",
        titles=("checkpoint", "critiques", *SECTIONS, PANDALM, "mean of sections"),
        rows=tuple(rows),
        n_text=2,
    )
