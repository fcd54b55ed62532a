"""Attributions for a reader: one HTML page with the critiques shaded by effect, and a table for the terminal."""

import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from critrm.attribution_files import AspectTotal, Attribution
from critrm.types import SIDES, CritiquedPair, Side

PAGE = Path(__file__).with_name("templates") / "attribution.html"


def attribution_page(
    items: Sequence[CritiquedPair],
    attributions: Sequence[Attribution],
    totals: Sequence[AspectTotal],
    *,
    model: str,
    n_shown: int = 50,
) -> str:
    """One self-contained HTML page: the totals, and the critiques with each sentence shaded by its effect."""

    def size(effect: float) -> float:
        return abs(effect) if math.isfinite(effect) else 0.0

    by_pair: dict[str, dict[Side, Attribution]] = {}
    for each in attributions:
        by_pair.setdefault(each.pair_id, {})[each.side] = each
    largest = {
        pair_id: max((size(s.effect) for each in sides.values() for s in each.sentences), default=0.0)
        for pair_id, sides in by_pair.items()
    }
    shown = sorted((item for item in items if item.pair.id in by_pair), key=lambda item: -largest[item.pair.id])
    # Full colour is for the largest effects of all, but not for a single one far beyond them.
    effects = sorted(size(s.effect) for each in attributions for s in each.sentences)
    scale = (effects[math.ceil(0.98 * len(effects)) - 1] if effects else 0.0) or 1.0
    # Nor do the wild intervals of a few pairs set the scale of the totals.
    ends = [(total.mean,) if total.n_pairs < 5 else (total.mean, total.low, total.high) for total in totals]
    reach = max((abs(end) for each in ends for end in each if end is not None), default=0.0) or 1.0
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True)
    page = environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        items=shown[:n_shown],
        by_pair=by_pair,
        totals=totals,
        aspects=list(dict.fromkeys(total.aspect for total in totals)),
        sides=SIDES,
        model=model,
        critic=items[0].critic,
        n_pairs=len(items),
        strength=lambda effect: min(1.0, size(effect) / scale),
        place=lambda value: 100 + 92 * max(-1.0, min(1.0, value / reach)),
    )
    # Half of an emoji, which JSON can hold, has no UTF-8 form.
    return page.encode("utf-8", "replace").decode("utf-8")


def totals_table(totals: Sequence[AspectTotal], *, critic: str) -> Table:
    """The totals by aspect for the terminal."""
    table = Table(title=Text(f"Effect of a sentence on the reward, critic {critic}"), box=box.SIMPLE_HEAD)
    table.show_edge = table.pad_edge = False
    table.caption = "reward with the whole critique minus reward without the sentence: mean [95 % interval] (sentences)"
    table.caption_justify = "left"
    table.add_column("aspect")
    for side in SIDES:
        table.add_column(f"on the {side}", justify="right")
    found = {(total.aspect, total.side): total for total in totals}
    for aspect in dict.fromkeys(total.aspect for total in totals):
        table.add_row(aspect, *(_cell(found.get((aspect, side))) for side in SIDES))
    return table


def _cell(total: AspectTotal | None) -> Text:
    if total is None:
        return Text("")
    interval = "" if total.low is None else f" [{total.low:+.2f}, {total.high:+.2f}]"
    sure = total.low is not None and total.high is not None and total.low * total.high > 0
    return Text(f"{total.mean:+.2f}{interval} ({total.n_sentences})", "bold" if sure else "")
