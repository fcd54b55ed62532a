"""Stage 8: a study's or a run's tables and figures as the paper has them, and one page with all its pairs.

In the report's folder:

    report.html            the page; needs nothing beside it
    report.md              the bottom line, the tables and the figures in Markdown
    tables/*.md, *.tex     each table
    figures/*.svg, *.png   each figure
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from critrm.errors import ConfigError
from critrm.report_beside import counts_table, gains_table, paper_accuracy_table, quality_table, readings_table
from critrm.report_data import Report, read_report
from critrm.report_explorer import explorer
from critrm.report_figures import ReportFigure, figures
from critrm.report_markup import ReportTable, escaped, latex, markdown
from critrm.report_page import report_page
from critrm.report_tables import accuracy_table, example_table
from critrm.report_texts import example
from critrm.report_words import bottom_line
from critrm.store import disk_errors, write_text

N_PAIRS = 3000
"""The page's explorer holds at most so many pairs of a test set, unless told otherwise."""


TABLES = ("table1", "table2", "table3", "table4", "gains", "readings", "paper-table2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A report that was written."""

    folder: Path
    bottom_line: str
    tables: tuple[str, ...]
    figures: tuple[str, ...]
    notes: tuple[str, ...]
    """What is left out and why, and what a reader should know."""


def write_report(folder: str | Path, *, out: str | Path | None = None, n_pairs: int = N_PAIRS) -> Written:
    """Write the report of a finished study's or run's folder.

    Args:
        folder: what `critrm study` or `critrm run` wrote.
        out: the report's folder; `report` in the other when not given.
        n_pairs: at most so many pairs of each test set are in the page's explorer.

    Raises:
        ConfigError: `n_pairs` is below 0.
        DataError: the folder holds neither, or a file in it cannot be read.
        StorageError: the disk is full or read-only.
    """
    if n_pairs < 0:
        raise ConfigError(f"the number of pairs must be at least 0, not {n_pairs}")
    report = read_report(folder)
    out = Path(out) if out is not None else report.folder / "report"
    tables, table_notes = _tables(report)
    drawn, figure_notes = figures(report)
    notes = [*report.notes, *table_notes, *figure_notes]
    line = bottom_line(report)
    _clear(out)
    for table in tables:
        write_text(out / "tables" / f"{table.key}.md", _whole(markdown(table)))
        write_text(out / "tables" / f"{table.key}.tex", _whole(latex(table)))
    for figure in drawn:
        write_text(out / "figures" / f"{figure.key}.svg", figure.svg)
        with disk_errors(out):
            (out / "figures" / f"{figure.key}.png").write_bytes(figure.png)
    write_text(out / "report.md", _whole(_markdown(report, line, tables, drawn, notes)))
    pairs = explorer(report, n_pairs=n_pairs)
    page = report_page(report, bottom_line=line, tables=tables, figures=drawn, notes=notes, pairs=pairs)
    write_text(out / "report.html", page)
    return Written(
        folder=out,
        bottom_line=line,
        tables=tuple(table.key for table in tables),
        figures=tuple(figure.key for figure in drawn),
        notes=tuple(notes),
    )


def _clear(out: Path) -> None:
    """Take away an earlier report's tables and figures: this one may leave some of them out."""
    with disk_errors(out):
        for path in (*out.glob("tables/*.*"), *out.glob("figures/figure[0-9].*")):
            if path.name.removesuffix(path.suffix) in TABLES or path.parent.name == "figures":
                path.unlink()


def _tables(report: Report) -> tuple[list[ReportTable], list[str]]:
    """The tables that can be filled, and why the others cannot."""
    notes = []
    tables = [accuracy_table(report), counts_table(report), readings_table(report), paper_accuracy_table()]
    if any(cell.critics for cell in report.cells):
        tables.insert(1, gains_table(report))
    if found := example(report):
        pair, texts = found
        tables.append(example_table(texts, pair))
    else:
        notes.append("Table 3 is left out: there is no pair that every critic has written of.")
    if quality := quality_table(report):
        tables.append(quality)
    else:
        notes.append(
            "Table 4 is left out: no critique quality was measured. Write the result of `critrm metacritique` "
            "into a folder below this one (its --out), and report again."
        )
    return tables, notes


def _markdown(
    report: Report, line: str, tables: Sequence[ReportTable], drawn: Sequence[ReportFigure], notes: Sequence[str]
) -> str:
    parts = [f"# {escaped(report.name)}", escaped(line)]
    parts += [markdown(table) for table in tables]
    parts += [
        f"## {figure.title}\n\n![{figure.title}](figures/{figure.key}.svg)\n\n{figure.caption}\n" for figure in drawn
    ]
    parts += ["## Notes", "\n".join(f"- {escaped(note)}" for note in notes)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _whole(text: str) -> str:
    """A text that has a UTF-8 form: half of an emoji, which JSON can hold, has none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def command(folder: Path, *, out: Path | None = None, n_pairs: int = N_PAIRS) -> None:
    """Write the paper's tables and figures of a finished study or run, and one HTML page with all its pairs.

    Args:
        folder: what `critrm study` or `critrm run` wrote.
        out: the report's folder; `report` in the other when not given.
        n_pairs: at most so many pairs of each test set are in the page.
    """
    console = Console()
    written = write_report(folder, out=out, n_pairs=n_pairs)
    console.print(written.bottom_line, markup=False, highlight=False)
    for note in written.notes:
        console.print(f"Note: {note}", style="yellow", markup=False, highlight=False)
    console.print(f"Page: {written.folder / 'report.html'}", soft_wrap=True, markup=False)
