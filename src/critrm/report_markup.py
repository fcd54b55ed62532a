"""A report's tables as data, and written in Markdown and LaTeX with every text escaped."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCell:
    """A cell: its text, the number to sort by, and whether it is the best or second best of its block."""

    text: str
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """A table for a reader, in whatever form it is written."""

    key: str
    title: str
    caption: str
    titles: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    n_text: int = 1
    """So many columns at the left are text; the others are numbers."""


def markdown(table: ReportTable) -> str:
    """The table in Markdown, texts escaped."""
    wrap = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    lines = [f"## {escaped(table.title)}", "", escaped(table.caption, rows=True), ""]
    lines.append("| " + " | ".join(map(escaped, table.titles)) + " |")
    lines.append("|" + "|".join("---" if i < table.n_text else "---:" for i in range(len(table.titles))) + "|")
    lines += [
        "| " + " | ".join(wrap[cell.mark].format(escaped(cell.text)) for cell in row) + " |" for row in table.rows
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str, *, rows: bool = False) -> str:
    """A text that Markdown shows as it is; in a table on one line, else with its line breaks (`rows`)."""
    text = _CONTROL.sub("�", _LINE_END.sub("\n", text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    text = re.sub(r"([|*_`\[\]#~$!])", r"\\\1", text) if re.search(r"[|*`#~$!]|\]\(|_", text) else text
    return text.replace("\n", "  \n" if rows else "<br>")


_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "“": "``",
    "”": "''",
}


def latex(table: ReportTable) -> str:
    """The table in LaTeX (booktabs), texts escaped."""
    wrap = {"best": r"\textbf{%s}", "second": r"\underline{%s}", "": "%s"}
    long = any(len(cell.text) > 100 for row in table.rows for cell in row)
    texts = ["l"] * table.n_text
    if long:
        texts[-1] = r"p{0.75\linewidth}"
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        r"\begin{tabular}{" + "".join(texts) + "r" * (len(table.titles) - table.n_text) + "}",
        r"\toprule",
        " & ".join(map(_tex, table.titles)) + r" \\",
        r"\midrule",
    ]
    for number, row in enumerate(table.rows):
        if number and table.key == "table2" and row[0].text != table.rows[number - 1][0].text:
            lines.append(r"\midrule")
        lines.append(" & ".join(wrap[cell.mark] % _tex(cell.text) for cell in row) + r" \\")
    caption = _tex(table.caption)
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{table.key}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    text = _CONTROL.sub("", _LINE_END.sub("\n", text))
    return re.sub(r"\s*\n\s*", " ", "".join(_LATEX.get(letter, letter) for letter in text))
