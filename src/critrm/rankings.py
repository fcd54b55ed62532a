"""How completions were ranked: the record, and the table for the terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from critrm.metrics import n_scored, tally
from critrm.types import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What a reward model makes of the completions of one prompt. Completions are named by their position, from 0."""

    id: str
    scores: tuple[float | None, ...]
    """The reward of each completion; None for one that could not be scored."""
    order: tuple[int, ...]
    """The scored completions, best first; of those with one reward the earlier one first."""
    best: int | None
    ties: tuple[tuple[int, ...], ...]
    """Groups of completions with exactly the same reward, best first."""
    best_completion: str | None
    critiques: tuple[str, ...]
    """What the reward model read."""
    critic: str
    """Who wrote that; `none` where it read none."""
    failure: str = ""
    """Why there are no scores, or why they are without critiques."""
    outcome: str | None = None
    """Of a list whose right completions are known: right if all of them beat all others, wrong, tie or unscored."""


def rankings_table(rankings: Sequence[Ranking]) -> Table:
    """What came out, for the terminal: counts, and the first lists."""
    n_ranked = sum(each.best is not None for each in rankings)
    table = Table(title=f"{n_ranked} of {len(rankings)} prompts ranked", box=box.SIMPLE_HEAD)
    table.show_edge = table.pad_edge = False
    for title, justify in (
        ("id", "left"),
        ("n", "right"),
        ("best", "right"),
        ("reward", "right"),
        ("ahead by", "right"),
    ):
        table.add_column(title, justify="left" if justify == "left" else "right", overflow="fold")
    table.add_column("")
    for each in rankings[:10]:
        rewards = [each.scores[i] for i in each.order]
        first = rewards[0] if each.best is not None else None
        second = rewards[1] if first is not None and len(rewards) > 1 else None
        table.add_row(
            Text(each.id),
            str(len(each.scores)),
            "" if each.best is None else str(each.best),
            "" if first is None else f"{first:.3f}",
            "" if first is None or second is None else f"{first - second:.3f}",
            Text(each.failure[:40] or ("tie at the top" if each.ties and each.best in each.ties[0] else "")),
        )
    table.caption, table.caption_justify = Text("\n".join(_remarks(rankings))), "left"
    return table


def _remarks(rankings: Sequence[Ranking]) -> Iterator[str]:
    if len(rankings) > 10:
        yield f"... and {len(rankings) - 10} more."
    if n_tied := sum(bool(each.ties) and each.best in each.ties[0] for each in rankings):
        yield f"Ties at the top: {n_tied}; the earlier completion stands first."
    failed = [each for each in rankings if each.failure]
    if n_unscored := sum(each.best is None for each in failed):
        yield f"Without scores: {n_unscored} ({failed[0].failure[:60]}). Run again with --retry-failed."
    if n_without := sum(each.best is not None for each in failed):
        yield f"Scored without critiques, because the critic failed: {n_without}."
    outcomes = [Outcome(each.outcome) for each in rankings if each.outcome is not None]
    counts = tally(outcomes)
    if found := counts.accuracy:
        yield (
            f"Lists whose right completions beat all others: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] "
            f"of {n_scored(counts)} (95 %; a tie is not right)."
        )
