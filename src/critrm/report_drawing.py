"""How a report's figures look: colours, markers, names that a figure can hold, and the same bytes for the same numbers.

Colours are told apart by colour-blind readers (Okabe and Ito), and in grey by their markers, line styles and hatches.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from critrm.report_data import Groups, Report
from critrm.types import NO_CRITIC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#5D3A9B")
PLAIN = "#4D4D4D"
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "--")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ((4, 2), (1, 1.5), (6, 2, 1, 2), (8, 2), (3, 1, 1, 1, 1, 1), (2, 2), (10, 3), (5, 1))

Places = dict[str, int]
"""Critic -> which colour, marker and hatch it has in all figures; -1 for no critiques."""


@contextmanager
def style(key: str) -> Iterator[None]:
    """The settings of one figure; without a warning about letters that the font lacks."""
    import matplotlib

    settings: Any = {
        "svg.hashsalt": key,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#DDDDDD",
        "axes.axisbelow": True,
        "hatch.linewidth": 0.6,
        "savefig.facecolor": "white",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as boxes in the PNG; in the SVG the reader's font has them.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        yield


def written(figure: "Figure", key: str) -> tuple[str, bytes]:
    """The figure as SVG and as PNG."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": "critrm"})
    figure.savefig(png, format="png", bbox_inches="tight", dpi=150, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def new_figure(n_axes: int, *, width: float, height: float = 3.2, n_columns: int) -> "tuple[Figure, list[Axes]]":
    """A figure of so many panels, each `width` x `height` inches."""
    from matplotlib.figure import Figure

    n_rows = -(-n_axes // n_columns)
    n_columns = min(n_axes, n_columns)
    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    return figure, [figure.add_subplot(n_rows, n_columns, i + 1) for i in range(n_axes)]


def critic_places(report: Report) -> Places:
    """Each critic's place, the same in all figures."""
    critics = dict.fromkeys(critic for cell in report.cells for critic in cell.critics)
    return {NO_CRITIC: -1} | {critic: i for i, critic in enumerate(critics)}


def color_of(place: int) -> str:
    """The colour of a place."""
    return PLAIN if place < 0 else COLORS[place % len(COLORS)]


def shown_name(text: str) -> str:
    """A name that a figure can hold: short, and without what XML has no form for."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", text)
    return text if len(text) <= 40 else text[:39] + "…"


def errors_of(arms: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far the 95 % intervals reach below and above the means, as matplotlib takes it."""
    return [[arm["mean"] - arm["low"] for arm in arms], [arm["high"] - arm["mean"] for arm in arms]]


def arm_in(groups: Groups, label: str, critic: str) -> Mapping[str, Any] | None:
    """An arm's numbers in a group; None where nothing was scored."""
    arm: Mapping[str, Any] | None = groups.get(label, {"arms": {}})["arms"].get(critic)
    return arm if arm and arm["mean"] is not None else None


def set_limits(axes: "Axes", arms: Sequence[Mapping[str, Any]]) -> None:
    """From just below the lowest interval to just above the highest: accuracies lie close together."""
    if arms:
        low, high = min(arm["low"] for arm in arms), max(arm["high"] for arm in arms)
        axes.set_ylim(max(0.0, low - 0.05), min(1.02, high + 0.05))
