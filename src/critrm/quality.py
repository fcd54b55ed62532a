"""The quality gate between the critic and the reward model: which critiques are unusable, and which leak a grade.

The detectors are in `flaws.py` and `leaked_scores.py`. Nothing is dropped unless it is asked for, and a critique that
is dropped stays a row with its reason, so that `augment` counts it.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from critrm import leaked_scores
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError
from critrm.flaws import (
    UNREADABLE,
    find_boilerplate,
    guess_language,
    is_dialogue,
    is_echo,
    is_generic,
    is_loop,
    is_refusal,
    is_truncated,
)
from critrm.metrics import n_scored, tally
from critrm.preferences import read_pairs
from critrm.prompts import load_template, render_conversation
from critrm.store import write_text
from critrm.types import SIDES, Critique, Outcome, PreferencePair, Score, Side, Tally

REASONS = {
    "refusal": "declines to write a critique",
    "dialogue": "plays on the conversation",
    "echo": "copies what it was shown",
    "loop": "repeats itself",
    "truncated": "breaks off at the token limit",
    "boilerplate": "fits any response, or is the same for many",
    "language": "is in another language than the critic's others, or unreadable",
    "score": "gives away a grade",
}
"""Reason -> what a critique with this flag does; in the order in which one of several is named."""

Place = tuple[str, str, Side, int]
"""Critic, pair id, side, sample: which critique of which completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticQuality:
    """What was found in one critic's critiques."""

    critic: str
    n: int
    """Critiques checked: those that did not fail."""
    n_failed: int
    n_flagged: int
    """Critiques with at least one flag."""
    counts: dict[str, int]
    """Reason -> critiques with that flag; a critique may have several."""
    leaked: Tally
    """How often the leaked grades alone rank a pair right; unscored where a side leaks none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """The flags of each critique, and the counts by critic."""

    flags: dict[Place, tuple[str, ...]]
    """Only critiques that have one."""
    critics: tuple[CriticQuality, ...]


def place_of(critique: Critique) -> Place:
    """Which critique of which completion this is."""
    return critique.critic, critique.pair_id, critique.side, critique.sample


def check_critiques(pairs: Sequence[PreferencePair], critiques: Sequence[Critique]) -> QualityReport:
    """Look for flaws in critiques, each critic's on their own.

    Args:
        pairs: what the critiques are about; of other pairs' critiques only the text is checked.
        critiques: of one critic or several; failed ones are counted and have no flags.
    """
    by_id = {pair.id: pair for pair in pairs}
    by_critic: dict[str, list[Critique]] = {}
    for critique in critiques:
        by_critic.setdefault(critique.critic, []).append(critique)
    flags: dict[Place, tuple[str, ...]] = {}
    found = []
    for critic, rows in by_critic.items():
        good = [row for row in rows if not row.failure]
        flagged = _flags(by_id, good)
        flags |= flagged
        found.append(
            CriticQuality(
                critic=critic,
                n=len(good),
                n_failed=len(rows) - len(good),
                n_flagged=len(flagged),
                counts=dict(Counter(reason for reasons in flagged.values() for reason in reasons)),
                leaked=tally(_outcomes(by_id, good, _leaked).values()),
            )
        )
    return QualityReport(flags=flags, critics=tuple(found))


def _flags(pairs: dict[str, PreferencePair], critiques: Sequence[Critique]) -> dict[Place, tuple[str, ...]]:
    languages = [guess_language(row.text) for row in critiques]
    known = Counter(language for language in languages if language not in ("", UNREADABLE))
    usual = known.most_common(1)[0][0] if known else ""
    repeated = _repeated(pairs, critiques)
    flags = {}
    for row, language in zip(critiques, languages, strict=True):
        shown = _shown(pairs.get(row.pair_id), row.side)
        is_flagged = {
            "refusal": is_refusal(row.text),
            "dialogue": is_dialogue(row.text),
            "echo": is_echo(row.text, *shown),
            "loop": is_loop(row.text),
            "truncated": is_truncated(row.text, row.finish_reason),
            "boilerplate": row.text in repeated or is_generic(row.text),
            "language": language not in ("", usual),
            "score": leaked_scores.leaked_score(row.text) is not None,
        }
        if any(is_flagged.values()):
            flags[place_of(row)] = tuple(reason for reason in REASONS if is_flagged[reason])
    return flags


def _shown(pair: PreferencePair | None, side: Side) -> tuple[str, ...]:
    question = load_template("critique").source
    return (question,) if pair is None else (question, render_conversation(pair.prompt), pair.completion(side))


def _repeated(pairs: dict[str, PreferencePair], critiques: Sequence[Critique]) -> set[str]:
    """Boiler-plate texts. A completion counts once: its copies and samples may well get the same critique."""
    once = {
        (pairs[row.pair_id].completion(row.side) if row.pair_id in pairs else place_of(row), row.text)
        for row in critiques
    }
    texts = [text for _, text in once]
    return {text for text, is_repeated in zip(texts, find_boilerplate(texts), strict=True) if is_repeated}


def _leaked(critique: Critique) -> float | None:
    return leaked_scores.leaked_score(critique.text)


def _outcomes(
    pairs: dict[str, PreferencePair], critiques: Sequence[Critique], grade: Callable[[Critique], float | None]
) -> dict[tuple[str, int], Outcome]:
    """Whether the grades of the two sides rank a pair right, by pair id and sample; unscored without both."""
    grades: dict[tuple[str, int], dict[Side, float | None]] = {}
    for row in critiques:
        if row.pair_id in pairs:
            grades.setdefault((row.pair_id, row.sample), {})[row.side] = grade(row)
    outcomes = {}
    for place, sides in grades.items():
        chosen, rejected = (math.nan if (value := sides.get(side)) is None else value for side in SIDES)
        outcomes[place] = Score(place[0], chosen, rejected).outcome
    return outcomes


def gate_critiques(
    critiques: Sequence[Critique], report: QualityReport, *, drop: Sequence[str] = (), strip_scores: bool = False
) -> list[Critique]:
    """Fail the critiques that have one of the named flags, and take leaked grades out of the others.

    Args:
        critiques: those that the report is about, in any order; none is left out of the result.
        report: of `check_critiques`.
        drop: reasons of `REASONS`; such a critique becomes a failed row, its failure `quality: echo`.
        strip_scores: remove leaked grades; a critique that was only a grade fails as `quality: score`.

    Raises:
        ConfigError: there is no such reason.
    """
    unknown = [reason for reason in drop if reason not in REASONS]
    if unknown:
        raise ConfigError(f"cannot drop critiques for {', '.join(unknown)}; there is {', '.join(REASONS)}")
    gated = []
    for row in critiques:
        flags = report.flags.get(place_of(row), ())
        reason = next((flag for flag in flags if flag in drop), "")
        text = row.text
        if strip_scores and not reason and "score" in flags:
            text = leaked_scores.strip_scores(text)
            reason = "" if text else "score"
        gated.append(
            dataclasses.replace(row, text="", failure=f"quality: {reason}")
            if reason
            else dataclasses.replace(row, text=text)
        )
    return gated


def find_contradictions(
    pairs: Sequence[PreferencePair], critiques: Sequence[Critique], *, split: str
) -> frozenset[str]:
    """Training pairs whose critiques grade the rejected completion higher than the chosen one.

    Grades are those that both texts leak, else the critic's own `score` of both. A pair without grades does not count,
    nor does a tie; of several samples each counts.

    Args:
        pairs: training pairs.
        critiques: their critiques, by one critic.
        split: what the pairs are; has to be `train`.

    Returns:
        The ids of the pairs.

    Raises:
        ConfigError: the pairs are not, or not all, training pairs. Test pairs that are chosen by their label would
            make any accuracy look better than it is.
    """
    others = sorted({pair.split for pair in pairs if pair.split and not pair.split.startswith("train")})
    if split != "train" or others:
        raise ConfigError(
            f"only training pairs may be dropped for contradicting their label, not those of "
            f"{', '.join(others) or split or 'an unnamed split'}"
        )
    by_id = {pair.id: pair for pair in pairs}
    good = [row for row in critiques if not row.failure]
    own = _outcomes(by_id, good, lambda row: row.score)
    leaked = {place: found for place, found in _outcomes(by_id, good, _leaked).items() if found is not Outcome.UNSCORED}
    return frozenset(pair_id for (pair_id, _), found in (own | leaked).items() if found is Outcome.WRONG)


def command(
    pairs: Path, *, critiques: Path, out: Path | None = None, examples: int = 1, skip_bad: bool = False
) -> None:
    """Check critiques for flaws before money is spent on training: echoes, refusals, leaked grades and others.

    Args:
        pairs: the preference pairs, in any dialect that `critrm preferences` reads.
        critiques: the critiques of their completions.
        out: write the counts and the flags of each critique here, as JSON.
        examples: how many examples of each flaw are shown.
        skip_bad: leave out pairs that cannot be read instead of stopping at the first.
    """
    rows = read_critiques(critiques)
    report = check_critiques(read_pairs(pairs, skip_bad=skip_bad, allow_empty=True).pairs, rows)
    console = Console()
    for found in report.critics:
        console.print(_table(found, report, [row for row in rows if row.critic == found.critic], examples))
        console.print(_leaks(found.leaked), highlight=False)
    if out is not None:
        flags = [
            {"critic": critic, "pair_id": pair_id, "side": side, "sample": sample, "reasons": reasons}
            for (critic, pair_id, side, sample), reasons in report.flags.items()
        ]
        facts = {"critics": [dataclasses.asdict(found) for found in report.critics], "flags": flags}
        write_text(out, json.dumps(facts, indent=2) + "\n")
        console.print(f"Report: {out}", soft_wrap=True, markup=False)


def _table(found: CriticQuality, report: QualityReport, rows: Sequence[Critique], n_examples: int) -> Table:
    failed = f", {found.n_failed:,} failed calls" if found.n_failed else ""
    table = Table(title=Text(f"{found.critic}: {found.n_flagged:,} of {found.n:,} critiques have a flaw{failed}"))
    table.add_column("reason")
    table.add_column("critiques", justify="right")
    table.add_column("share", justify="right")
    if n_examples:
        table.add_column("for example")
    for reason, meaning in REASONS.items():
        count = found.counts.get(reason, 0)
        texts = dict.fromkeys(row.text for row in rows if reason in report.flags.get(place_of(row), ()))
        quoted = Text("\n".join(f"“{_short(text, reason)}”" for text in list(texts)[:n_examples]))
        cells = (Text(f"{reason}: {meaning}"), f"{count:,}", f"{count / found.n:.1%}" if found.n else "")
        table.add_row(*cells, *([quoted] if n_examples else []))
    return table


def _short(text: str, reason: str) -> str:
    if reason == "score":
        text = text[max(0, leaked_scores.find_leaks(text)[-1].start - 40) :]
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:99] + "…"


def _leaks(leaked: Tally) -> str:
    if leaked.accuracy is None:
        return "No pair has a leaked grade on both sides."
    low, high = leaked.accuracy.low, leaked.accuracy.high
    return (
        f"Leaked grades alone: {leaked.accuracy.value:.1%} right of {n_scored(leaked):,} pairs "
        f"({low:.1%} to {high:.1%}; {leaked.n_right:,} right, {leaked.n_wrong:,} wrong, {leaked.n_tie:,} tied)."
    )
