"""What `critrm doctor` finds: what is so, how bad that is, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

Verdict = Literal["good", "note", "warning", "problem"]
MARKS: dict[Verdict, str] = {"good": "green", "note": "cyan", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and what to do about it."""

    check: str
    verdict: Verdict
    what: str
    advice: str = ""


def findings_table(findings: Sequence[Finding]) -> Table:
    """The findings for the terminal."""
    table = Table(title="critrm doctor", show_lines=False)
    for title in ("check", "", "finding", "what to do"):
        table.add_column(title)
    for finding in findings:
        mark = Text(finding.verdict, style=MARKS[finding.verdict])
        table.add_row(Text(finding.check), mark, Text(finding.what), Text(finding.advice))
    return table
