"""A report as one HTML page that asks nobody for anything: tables, figures, and an explorer of the pairs."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from critrm.report_data import Report
from critrm.report_explorer import Json, attribute_command, embedded
from critrm.report_figures import ReportFigure
from critrm.report_markup import ReportTable
from critrm.report_words import comparisons, most_telling
from critrm.results import ALL

PAGE = Path(__file__).with_name("templates") / "report.html"


def report_page(
    report: Report,
    *,
    bottom_line: str,
    tables: Sequence[ReportTable],
    figures: Sequence[ReportFigure],
    notes: Sequence[str],
    pairs: Json,
) -> str:
    """The page.

    Args:
        report: what it is about.
        bottom_line: its first paragraph.
        tables: in the order of the page; their keys say where they go.
        figures: drawn inline.
        notes: what is missing, and what a reader should know.
        pairs: of `explorer`.
    """
    template = PAGE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None
    allowed = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True)
    page = environment.from_string(template).render(
        name=report.name,
        bottom_line=bottom_line,
        tiles=_tiles(report),
        tables={table.key: table for table in tables},
        figures=[(figure, inline_svg(figure)) for figure in figures],
        worth=[_worth(report, each) for each in report.exchange if each["group"] == ALL],
        worth_by_part=[_worth(report, each) for each in report.exchange if each["group"] != ALL],
        notes=notes,
        attribute=attribute_command(report),
        has_effects=bool(pairs["effects"]),
        has_pairs=bool(pairs["tests"]),
        cut=[test for test in pairs["tests"] if len(test["pairs"]) < test["n_all"]],
        data=embedded(pairs),
        script_hash=allowed,
    )
    # Half of an emoji, which JSON can hold, has no UTF-8 form.
    return page.encode("utf-8", "replace").decode("utf-8")


def _worth(report: Report, each: Mapping[str, Any]) -> str:
    backbones = {cell.backbone for cell in report.cells}
    return f"{each['backbone']}, {each['words']}" if len(backbones) > 1 else str(each["words"])


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The headline: number, what it is, and where; the arm that gains most beside no critiques."""
    found = comparisons(report)
    if not found:
        return []
    best = most_telling(found)
    points = {name: f"{100 * best.difference[name]:+.1f}" for name in ("value", "low", "high")}
    return [
        (f"{best.plain:.1%}", "right without critiques", best.where),
        (f"{best.with_critiques:.1%}", f"right with {best.critic}'s critiques", best.where),
        (
            f"{points['value']} points",
            f"95 % interval {points['low']} to {points['high']}",
            f"p {best.p_adjusted:.2g}, adjusted for {len(found)} comparisons" if len(found) > 1 else "",
        ),
    ]


def inline_svg(figure: ReportFigure) -> str:
    """A figure to stand in a page: no prolog, ids of its own, and a name for those who cannot see it."""
    svg = figure.svg[figure.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{figure.key}-", svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
    width: Any = size[1] if size else 500
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf"<svg \1 style='--w: {width}pt' ROLE>", svg, count=1)
    label = re.sub(r"[<>&\"]", " ", f"{figure.title}. {figure.caption}")
    return svg.replace("ROLE", f'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{label}"', 1)
