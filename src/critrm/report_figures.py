"""A report's figures: the paper's Figures 2, 3, 4, 6 and 7 of our own numbers."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from critrm.baselines import SENTIMENT
from critrm.report_data import Report, ReportCell, arm_name, headline, label_of, main_cells, parts
from critrm.report_drawing import (
    DASHES,
    HATCHES,
    MARKERS,
    PLAIN,
    Places,
    arm_in,
    color_of,
    critic_places,
    errors_of,
    new_figure,
    set_limits,
    shown_name,
    style,
    written,
)
from critrm.results import ALL
from critrm.types import NO_CRITIC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFigure:
    """A figure as it is written."""

    key: str
    title: str
    caption: str
    svg: str
    png: bytes


def figures(report: Report) -> tuple[list[ReportFigure], list[str]]:
    """The figures that can be drawn, and why each of the others cannot."""
    drawn: list[ReportFigure] = []
    missing: list[str] = []
    places = critic_places(report)
    curves = curve_families(report)
    has_critics = any(cell.critics for cell in report.cells)
    makers: tuple[tuple[str, str, str, bool, str, Callable[[], Figure]], ...] = (
        (
            "figure2",
            "Figure 2: accuracy by backbone and critic",
            "Bars: strict accuracy; lines: 95 % intervals over items.",
            has_critics,
            "no arm reads critiques",
            lambda: _bars(report, places),
        ),
        (
            "figure3",
            "Figure 3: accuracy against training pairs",
            "With 95 % intervals over items. Dashed: critics that were trained on one number of pairs only.",
            bool(curves),
            "no backbone was trained on two numbers of pairs or more",
            lambda: _scaling(report, curves, places, by_part=False, dashed=True),
        ),
        (
            "figure4",
            "Figure 4: accuracy by section against training pairs",
            "With 95 % intervals over items.",
            bool(curves) and _has_parts(report),
            "it takes two numbers of training pairs, and a test set with sections or subsets",
            lambda: _scaling(report, curves, places, by_part=True, dashed=False),
        ),
        (
            "figure6",
            "Figure 6: the same with the other critics",
            "With 95 % intervals over items. Dashed: critics that were trained on one number of pairs only.",
            bool(curves) and _has_parts(report) and any(_dashed(report, cells) for cells in curves),
            "it takes what Figure 4 takes, and a critic that was trained on one number of pairs only",
            lambda: _scaling(report, curves, places, by_part=True, dashed=True),
        ),
        (
            "figure7",
            "Figure 7: accuracy against critics",
            "Critics in the recipe's order; with 95 % intervals over items. Dashed: no critiques.",
            any(len(cell.critics) > 1 for cell in report.cells),
            "it takes two critics or more",
            lambda: _by_critic(report),
        ),
        (
            "quality",
            "Critique quality: accuracy against what the critiques' wording gives away",
            "Across: pairs in which the chosen completion's critique is worded more kindly. With 95 % intervals over "
            "items. Dashed: no critiques; dotted: as good as the wording alone.",
            any(_wordings(cell) for cell in report.cells),
            "it takes two critics or more, and `pip install 'critrm[eval]'` when they are evaluated",
            lambda: _by_quality(report, places),
        ),
    )
    for key, title, caption, can, why, make in makers:
        if can:
            with style(key):
                svg, png = written(make(), key)
            drawn.append(ReportFigure(key=key, title=title, caption=caption, svg=svg, png=png))
        else:
            missing.append(f"{title.partition(':')[0]} is left out: {why}.")
    return drawn, missing


def _where(test: str, label: str) -> str:
    return shown_name(test) if label == ALL else f"{shown_name(test)}: {shown_name(label)}"


def _bars(report: Report, places: Places) -> "Figure":
    cells, tests = main_cells(report.cells), list(report.cells[0].tests)
    critics = [critic for critic in places if any(critic in (NO_CRITIC, *cell.critics) for cell in cells)]
    width = min(0.2, 0.8 / len(critics))
    panel_width = max(5.0, 1.2 + 0.38 * len(critics) * len(cells))
    figure, panels = new_figure(len(tests), width=panel_width, height=3.2, n_columns=1)
    for axes, test in zip(panels, tests, strict=True):
        shown = []
        for i, critic in enumerate(critics):
            arms = [arm_in(cell.tests[test], headline(cell.tests[test]), critic) for cell in cells]
            at = [x + (i - (len(critics) - 1) / 2) * width for x, arm in enumerate(arms) if arm]
            found = [arm for arm in arms if arm]
            if not found:
                continue
            place = places[critic]
            axes.bar(
                at,
                [arm["mean"] for arm in found],
                width * 0.92,
                yerr=errors_of(found),
                color="white" if place < 0 else color_of(place),
                edgecolor=PLAIN if place < 0 else "black",
                linewidth=0.6,
                hatch=HATCHES[place % len(HATCHES)] if place >= 0 else "",
                error_kw={"elinewidth": 1.1, "capsize": 2},
                label=shown_name(arm_name(critic)),
            )
            shown += found
        axes.set_ylim(0, min(1.02, max((arm["high"] for arm in shown), default=1.0) + 0.05))
        # Names side by side would run into each other; an inch holds about eleven letters.
        n_letters = max(10, int(11 * (panel_width - 1.0) / len(cells)))
        labels = [", ".join(map(shown_name, label_of(cell, cells).split(", "))) for cell in cells]
        axes.set_xticks(range(len(cells)), [textwrap.fill(label, n_letters) for label in labels])
        axes.set_xlim(-0.55, len(cells) - 0.45)
        axes.set_ylabel("strict accuracy")
        axes.set_title(_where(test, headline(cells[0].tests[test])), loc="left")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def curve_families(report: Report) -> list[list[ReportCell]]:
    """Cells that differ in their training pairs alone, by size, where there are two sizes or more."""
    families: dict[str, list[ReportCell]] = {}
    for cell in report.cells:
        families.setdefault(cell.family, []).append(cell)
    curves = [sorted(cells, key=lambda cell: cell.n_train) for cells in families.values()]
    return [cells for cells in curves if len({cell.n_train for cell in cells}) > 1]


def _has_parts(report: Report) -> bool:
    return any(parts(groups) for groups in report.cells[0].tests.values())


def _sizes_of(cells: Sequence[ReportCell], critic: str) -> list[ReportCell]:
    """The cells with an arm, one per size."""
    found = {cell.n_train: cell for cell in cells if critic in (NO_CRITIC, *cell.critics)}
    return [found[size] for size in sorted(found)]


def _dashed(report: Report, cells: Sequence[ReportCell]) -> list[str]:
    """The critics of one size only."""
    critics = dict.fromkeys(critic for cell in cells for critic in cell.critics)
    return [critic for critic in critics if len(_sizes_of(cells, critic)) == 1]


def _scaling(
    report: Report, curves: Sequence[Sequence[ReportCell]], places: Places, *, by_part: bool, dashed: bool
) -> "Figure":
    panels = [
        (cells, test, label)
        for cells in curves
        for test, groups in cells[0].tests.items()
        for label in (parts(groups) if by_part else [headline(groups)])
    ]
    n_columns = min(len(panels), 3 if by_part else 2)
    width, height = (3.6, 2.9) if by_part else (4.8, 3.8)
    figure, all_axes = new_figure(len(panels), width=width, height=height, n_columns=n_columns)
    names: dict[str, Any] = {}
    for axes, (cells, test, label) in zip(all_axes, panels, strict=True):
        handles = _curves(axes, cells, test, label, places=places, dashed=dashed, report=report)
        names = handles | names
        axes.set_title("\n".join(filter(None, (_whose(cells, curves), _where(test, label)))), loc="left")
    n_entries = max(1, int(n_columns * width / 2.4))  # an entry takes about 2.4 inches
    figure.legend(
        names.values(), names.keys(), loc="outside lower center", ncols=n_entries, frameon=False, handlelength=3
    )
    return figure


def _whose(cells: Sequence[ReportCell], curves: Sequence[Sequence[ReportCell]]) -> str:
    """What tells a curve from the others: its backbone, and its grids where another setting has the same backbone."""
    if len(curves) == 1:
        return ""
    backbone = cells[0].backbone_name
    grids = ", ".join(dict.fromkeys(shown_name(cell.grid) for cell in cells))
    is_shared = sum(each[0].backbone_name == backbone for each in curves) > 1
    return f"{shown_name(backbone)}\n{grids}" if is_shared else shown_name(backbone)


def _curves(
    axes: "Axes",
    cells: Sequence[ReportCell],
    test: str,
    label: str,
    *,
    places: Places,
    dashed: bool,
    report: Report,
) -> dict[str, Any]:
    """Draw one panel; returns name -> line, for the legend."""
    shown: list[Mapping[str, Any]] = []
    handles: dict[str, Any] = {}
    single = _dashed(report, cells)
    for critic, place in places.items():
        points = [
            (cell.n_train, arm) for cell in _sizes_of(cells, critic) if (arm := arm_in(cell.tests[test], label, critic))
        ]
        if not points or (critic in single and not dashed):
            continue
        arms = [arm for _, arm in points]
        color, name = color_of(place), shown_name(arm_name(critic))
        if critic in single:
            size, arm = points[0]
            dashes = (0, DASHES[place % len(DASHES)])
            name = f"{name} ({size} pairs)"
            handles[name] = axes.axhline(arm["mean"], color=color, linestyle=dashes, linewidth=1.3)
            shown.append({"low": arm["mean"], "high": arm["mean"]})
            continue
        handles[name] = axes.errorbar(
            # A little apart, so that intervals do not hide each other.
            [size * (cells[-1].n_train / cells[0].n_train) ** (0.008 * len(handles)) for size, _ in points],
            [arm["mean"] for arm in arms],
            yerr=errors_of(arms),
            color=color,
            marker=MARKERS[place % len(MARKERS)] if place >= 0 else "o",
            markerfacecolor=color if place >= 0 else "white",
            linestyle="-",
            linewidth=1.5,
            elinewidth=1.0,
            capsize=2,
        )
        shown += arms
    _log_sizes(axes, sorted({cell.n_train for cell in cells}))
    set_limits(axes, shown)
    axes.set_xlabel("training pairs")
    axes.set_ylabel("strict accuracy")
    return handles


def _log_sizes(axes: "Axes", sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size // 1000}k" if size >= 1000 and not size % 1000 else str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)


def _by_critic(report: Report) -> "Figure":
    cells = [cell for cell in main_cells(report.cells) if len(cell.critics) > 1]
    order = list(dict.fromkeys(critic for cell in cells for critic in cell.critics))
    tests = list(cells[0].tests)
    figure, panels = new_figure(len(tests), width=max(4.8, 1.5 + 0.9 * len(order)), height=3.2, n_columns=1)
    for axes, test in zip(panels, tests, strict=True):
        shown: list[Mapping[str, Any]] = []
        for i, cell in enumerate(cells):
            label = headline(cell.tests[test])
            points = [(x, arm) for x, critic in enumerate(order) if (arm := arm_in(cell.tests[test], label, critic))]
            arms = [arm for _, arm in points]
            axes.errorbar(
                [x + 0.06 * (i - (len(cells) - 1) / 2) for x, _ in points],
                [arm["mean"] for arm in arms],
                yerr=errors_of(arms),
                color=color_of(i),
                marker=MARKERS[i % len(MARKERS)],
                linewidth=1.5,
                elinewidth=1.0,
                capsize=2,
                label=shown_name(label_of(cell, cells)),
            )
            shown += arms
            if plain := arm_in(cell.tests[test], label, NO_CRITIC):
                axes.axhline(plain["mean"], color=color_of(i), linestyle=(0, DASHES[i % len(DASHES)]), linewidth=1.2)
                shown.append({"low": plain["mean"], "high": plain["mean"]})
        set_limits(axes, shown)
        axes.set_xticks(range(len(order)), [shown_name(critic) for critic in order], rotation=20, ha="right")
        axes.set_ylabel("strict accuracy")
        axes.set_title(_where(test, headline(cells[0].tests[test])), loc="left")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _wordings(cell: ReportCell) -> dict[str, dict[str, float]]:
    """Test set -> critic -> the share of pairs that the sentiment of its critiques gets right; of two critics or more.

    As the run noted it, over the pairs of its own test sets.
    """
    found = {
        test: {
            critic: nulls[SENTIMENT]["mean"]
            for critic, nulls in groups[ALL].get("baselines", {}).items()
            if nulls.get(SENTIMENT, {}).get("mean") is not None
        }
        for test, groups in cell.results["tests"].items()
    }
    return {test: by_critic for test, by_critic in found.items() if len(by_critic) > 1}


def _by_quality(report: Report, places: Places) -> "Figure":
    panels = [(cell, test, wordings) for cell in main_cells(report.cells) for test, wordings in _wordings(cell).items()]
    figure, all_axes = new_figure(len(panels), width=4.2, height=3.6, n_columns=3)
    names: dict[str, Any] = {}
    for axes, (cell, test, wordings) in zip(all_axes, panels, strict=True):
        shown: list[Mapping[str, Any]] = []
        for critic, wording in wordings.items():
            if (arm := arm_in(cell.tests[test], ALL, critic)) is None:
                continue
            names[shown_name(critic)] = axes.errorbar(
                [wording],
                [arm["mean"]],
                yerr=errors_of([arm]),
                color=color_of(places[critic]),
                marker=MARKERS[places[critic] % len(MARKERS)],
                linestyle="none",
                elinewidth=1.0,
                capsize=2,
            )
            shown.append(arm)
        if plain := arm_in(cell.tests[test], ALL, NO_CRITIC):
            axes.axhline(plain["mean"], color=PLAIN, linestyle=(0, DASHES[0]), linewidth=1.2)
            shown.append({"low": plain["mean"], "high": plain["mean"]})
        axes.axline((0.5, 0.5), slope=1, color=PLAIN, linestyle=":", linewidth=1.0)
        set_limits(axes, shown)
        axes.set_xlim(min(wordings.values()) - 0.03, max(wordings.values()) + 0.03)
        axes.set_xlabel("pairs that the critiques' sentiment gets right")
        axes.set_ylabel("strict accuracy")
        label = (
            f"{shown_name(label_of(cell, [each for each, *_ in panels]))}\n" if len(panels) > len(cell.tests) else ""
        )
        axes.set_title(label + shown_name(test), loc="left")
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure
