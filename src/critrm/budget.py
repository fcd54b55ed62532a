"""What critiques cost: prices, the estimate before, the ledger during, and the limit that no run exceeds."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from critrm.errors import CriticError
from critrm.types import Critique, Message

CHARACTERS_PER_TOKEN = 4.0
"""Of English text, about."""
FRAME_TOKENS = 64
"""More than any chat format puts around a message."""
N_COUNTED = 200
"""Prompts whose tokens are counted for an estimate; the others are taken to be like them."""
MAYBE_BILLED = ("timeout", "connection failed", "invalid JSON")
"""Failures of calls that a provider may bill for: the answer only did not get here."""
ROUNDING = 1e-9
"""US dollars."""

Count = Callable[[tuple[Message, ...]], int]


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens."""

    read: float
    written: float

    def cost(self, n_read: float, n_written: float) -> float:
        """US dollars for so many tokens."""
        return (n_read * self.read + n_written * self.written) / 1e6


def n_characters(messages: Iterable[Message]) -> int:
    """The length of a prompt's texts."""
    return sum(len(message.content) for message in messages)


def most_tokens(messages: Iterable[Message]) -> int:
    """More tokens than a prompt can have: tokenizers make at most one of each byte."""
    return sum(len(message.content.encode("utf-8", "surrogatepass")) + FRAME_TOKENS for message in messages)


class Purse:
    """A limit on what critics may cost, all of them and earlier attempts included.

    Before a call is made, the most that it can cost is set aside, so that calls under way cannot exceed the limit
    together.
    """

    def __init__(self, limit: float) -> None:
        """Set the limit, in US dollars."""
        self.limit = limit
        self.spent = 0.0
        self.spent_before = 0.0
        """The part of `spent` that earlier runs paid."""
        self._entered: set[str] = set()
        self._set_aside: dict[str, float] = {}
        self._total_aside = 0.0

    @property
    def left(self) -> float:
        """US dollars that neither are spent nor may be by the calls under way."""
        return self.limit - self.spent - self._total_aside

    def paid_before(self, key: str, cost: float) -> None:
        """An earlier run has paid this for a call; entered once, however often it is told."""
        if key not in self._entered:
            self._entered.add(key)
            self.spent += cost
            self.spent_before += cost

    def set_aside(self, key: str, most: float) -> bool:
        """Keep back the most that a call can cost; False when there is not enough."""
        if most > self.left + ROUNDING:
            return False
        self._set_aside[key] = most
        self._total_aside += most
        return True

    def settle(self, key: str, cost: float, *, unsure: bool = False) -> None:
        """A call is over: its cost is spent, the rest is free again; all stays set aside when the cost is unsure."""
        self._entered.add(key)
        self.spent += cost
        if not unsure:
            self._total_aside -= self._set_aside.pop(key, 0.0)

    def refusal(self, n_left: int) -> CriticError:
        """The error of a run that stops here with so many calls not made."""
        before = f", {dollars(self.spent_before)} of it in earlier runs" if self.spent_before else ""
        unsure = (
            f" {dollars(self._total_aside)} more may be billed for calls that timed out." if self._set_aside else ""
        )
        return CriticError(
            f"stopped before the limit of {dollars(self.limit)}: {dollars(self.spent)} spent{before}, "
            f"{dollars(max(0.0, self.left))} left, less than the next call may cost.{unsure} {n_left:,} calls are not "
            "made yet. Every answer is stored: the same command with a higher limit (--max-cost, or max_cost in a "
            "recipe) goes on."
        )


@dataclass(slots=True)
class Ledger:
    """What one critic's calls have come to so far in this run."""

    n_calls: int = 0
    """Made in this run, failed ones included."""
    n_cached: int = 0
    n_failed: int = 0
    """Of all, cached ones included."""
    n_prompt_tokens: int = 0
    """Of the calls made in this run, like the next two."""
    n_completion_tokens: int = 0
    cost: float = 0.0
    cost_cached: float = 0.0
    """What earlier runs paid for the cached ones."""
    started: float = field(default_factory=time.monotonic)

    def add(self, critique: Critique, *, cached: bool) -> None:
        """Enter a call."""
        self.n_failed += bool(critique.failure)
        if cached:
            self.n_cached += 1
            self.cost_cached += critique.cost
        else:
            self.n_calls += 1
            self.n_prompt_tokens += critique.n_prompt_tokens
            self.n_completion_tokens += critique.n_completion_tokens
            self.cost += critique.cost

    def line(self) -> str:
        """For the progress line."""
        rate = self.n_completion_tokens / max(time.monotonic() - self.started, 1e-9)
        money = f"{dollars(self.cost)}, " if self.cost else ""
        tokens = f"{self.n_prompt_tokens:,} in, {self.n_completion_tokens:,} out, {rate:.0f} tokens/s"
        return f"{money}{self.n_cached} cached, {self.n_failed} failed, {tokens}"

    def facts(self) -> dict[str, float]:
        """For the manifest; seconds are those since the ledger was opened."""
        return {
            "calls": self.n_calls,
            "cached": self.n_cached,
            "failed": self.n_failed,
            "tokens_in": self.n_prompt_tokens,
            "tokens_out": self.n_completion_tokens,
            "cost": round(self.cost, 6),
            "cost_cached": round(self.cost_cached, 6),
            "seconds": round(time.monotonic() - self.started, 1),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a critic's calls will come to."""

    critic: str
    n_calls: int
    """To be made."""
    n_cached: int
    tokens_in: int
    tokens_out: int
    most_tokens_out: int
    cost: float | None
    """US dollars; None when the price is unknown."""
    most_cost: float | None
    """A limit that the calls cannot exceed."""
    paid: float
    """What earlier runs paid for the cached calls."""
    basis: str
    """How the tokens were counted."""


def estimate(
    prompts: Iterable[tuple[Message, ...]],
    *,
    critic: str,
    max_tokens: int,
    price: Price | None,
    cached: Sequence[tuple[int, Critique]],
    mean_written: float | None = None,
    count: Count | None = None,
) -> Estimate:
    """What calls will cost, before any is made.

    Args:
        prompts: the prompts that the critic has still to answer.
        critic: the critic's name.
        max_tokens: the most that an answer may have.
        price: the critic's price, if it is known.
        cached: of each call that is answered already, the characters of its prompt and the critique.
        mean_written: tokens of this critic's answers elsewhere, for a critic without cached ones here.
        count: counts the tokens of a prompt, where a tokenizer is at hand.
    """
    n_calls = n_read = n_most = 0
    sample: list[tuple[int, int]] = []
    for messages in prompts:
        n_calls += 1
        n_read += n_characters(messages)
        n_most += most_tokens(messages)
        if count and len(sample) < N_COUNTED:
            sample.append((n_characters(messages), count(messages)))
    good = [(length, critique) for length, critique in cached if not critique.failure]
    counted = sample or [(length, row.n_prompt_tokens) for length, row in good if row.n_prompt_tokens]
    by = "the model's own tokenizer" if sample else "the answers cached so far" if counted else "4 characters a token"
    per_token = sum(length for length, _ in counted) / max(1, sum(n for _, n in counted)) or CHARACTERS_PER_TOKEN
    written = [row.n_completion_tokens for _, row in good if row.n_completion_tokens]
    mean = statistics.fmean(written) if written else mean_written
    tokens_in, most_out = round(n_read / per_token), n_calls * max_tokens
    tokens_out = most_out if mean is None else round(n_calls * min(mean, max_tokens))
    source = "max_tokens" if mean is None else "the mean of its cached answers"
    return Estimate(
        critic=critic,
        n_calls=n_calls,
        n_cached=len(cached),
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        most_tokens_out=most_out,
        cost=price.cost(tokens_in, tokens_out) if price else None,
        most_cost=price.cost(n_most, most_out) if price else None,
        paid=sum(critique.cost for _, critique in cached),
        basis=f"in by {by}, out by {source}",
    )


def estimates_table(estimates: Sequence[Estimate], *, limit: float | None = None) -> Table:
    """Estimates for the terminal, one row per critic.

    Args:
        estimates: the estimates.
        limit: US dollars that all may cost, if there is a limit.
    """
    alike: dict[str, list[str]] = {}
    for row in estimates:
        if row.n_calls:
            alike.setdefault(row.basis, []).append(row.critic)
    lines = [f"{', '.join(critics)}: {basis}." for basis, critics in alike.items()]
    lines.append("At most: a token for every byte read, and max_tokens written.")
    if any(row.cost is None for row in estimates):
        lines.append("?: no price is known (price_in and price_out).")
    if limit is not None:
        lines.append(f"Limit: {dollars(limit)}, what is paid already included.")
    table = Table(title="Nothing is spent yet", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.caption, table.caption_justify = Text("\n".join(lines)), "left"
    table.add_column("critic", overflow="fold")
    for title in ("calls", "cached", "tokens\nin", "tokens\nout", "at\nmost", "paid", "cost", "at\nmost"):
        table.add_column(title, justify="right", no_wrap=True)  # a number is never cut short; names fold
    numbers = [_numbers(row) for row in estimates]
    for row, cells in zip(estimates, numbers, strict=True):
        table.add_row(Text(row.critic), *_cells(cells))
    if len(estimates) > 1:
        table.add_section()
        total = [None if None in column else sum(each or 0 for each in column) for column in zip(*numbers, strict=True)]
        table.add_row("all", *_cells(total), style="bold")
    return table


def _numbers(row: Estimate) -> tuple[float | None, ...]:
    counts = (row.n_calls, row.n_cached, row.tokens_in, row.tokens_out, row.most_tokens_out)
    return (*counts, row.paid, row.cost, row.most_cost)


def _cells(numbers: Sequence[float | None]) -> list[str]:
    money = [
        "?" if amount is None else f"${amount:,.0f}" if amount >= 1000 else dollars(amount) for amount in numbers[5:]
    ]
    return [_count(count or 0) for count in numbers[:5]] + money


def _count(count: float) -> str:
    """As wide as 80 columns allow."""
    return f"{count:,.0f}" if count < 1e5 else f"{count / 1e3:,.0f}k" if count < 1e6 else f"{count / 1e6:,.1f}M"


def critiques_table(rows: Sequence[Critique], ledger: Ledger, *, n_skipped: int) -> Table:
    """What became of all calls, for the terminal."""
    good = [row for row in rows if not row.failure]
    n_cut = sum(row.finish_reason == "length" for row in good)
    failures: dict[str, list[str]] = {}
    for row in rows:
        if row.failure:
            # "http 400: 9000 tokens are too many" and its like differ from row to row.
            failures.setdefault(row.failure.partition(":")[0], []).append(row.failure)
    table = Table("", Column("critiques", justify="right"), title="Critiques")
    table.add_row("written", f"{len(good):,}")
    if n_cut:
        table.add_row("  of them cut at --max-tokens", f"{n_cut:,}")
    for texts in sorted(failures.values(), key=len, reverse=True):
        table.add_row(escape(f"failed: {texts[0]} (--retry-failed asks again)"), f"{len(texts):,}")
    if n_skipped:
        table.add_row("pairs left out by --skip-bad", f"{n_skipped:,}")
    table.add_row("tokens read", f"{sum(row.n_prompt_tokens for row in rows):,}")
    table.add_row("tokens written", f"{sum(row.n_completion_tokens for row in rows):,}")
    if ledger.cost or ledger.cost_cached:
        table.add_row("cost of this run", dollars(ledger.cost))
        table.add_row("cost in all, earlier runs included", dollars(ledger.cost + ledger.cost_cached))
    return table


def dollars(amount: float) -> str:
    """An amount of money, with more places when it is small."""
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.4f}"
