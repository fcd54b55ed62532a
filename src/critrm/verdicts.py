"""Verdicts that exist already, and what a judge's verdicts come to: scores, a result, a table.

Point-wise ones are ratings recorded beside critiques. Pairwise ones are PandaLM's files of what GPT-3.5 and PandaLM-7B
preferred, beside the human labels; such a judge saw both responses and named one, or a tie. Source:
github.com/WeOpenML/PandaLM, `data/`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from critrm.errors import DataError
from critrm.likert import BEST
from critrm.metrics import half_credit
from critrm.store import read_rows
from critrm.types import SIDES, Critique, EvalResult, Outcome, Score, Side, Tally, Verdict

TIE = 0
"""Which response is better: 1, 2, or neither."""

_SPELLINGS: Mapping[object, int] = {0: 0, 1: 1, 2: 2, "0": 0, "1": 1, "2": 2, "tie": 0}


def recorded_verdicts(critiques: Iterable[Critique]) -> list[Verdict]:
    """The verdicts of critics who rated what they criticised: the `score` of each critique."""
    verdicts = []
    for critique in critiques:
        score = critique.score
        reason = critique.failure or ("no score" if score is None else "" if 0 <= score <= BEST else "out of range")
        verdicts.append(
            Verdict(
                pair_id=critique.pair_id,
                side=critique.side,
                likert=None if reason or score is None else float(score),
                judge=critique.critic,
                critique=critique.text,
                critic=critique.critic,
                unscored=reason,
                key=critique.key,
            )
        )
    return verdicts


def verdict_scores(verdicts: Iterable[Verdict]) -> list[Score]:
    """Put the two verdicts of each pair together; a missing or unscored one is not-a-number, so the pair is unscored.

    Raises:
        DataError: there are two verdicts about one completion.
    """
    found: dict[str, dict[Side, float]] = {}
    for verdict in verdicts:
        sides = found.setdefault(verdict.pair_id, {})
        if verdict.side in sides:
            where = f"{verdict.pair_id!r}, {verdict.side}"
            raise DataError(f"two verdicts about {where}: give those of one judge", field="pair_id")
        sides[verdict.side] = math.nan if verdict.likert is None else verdict.likert
    return [Score(pair_id, *(sides.get(side, math.nan) for side in SIDES)) for pair_id, sides in found.items()]


def result_json(result: EvalResult, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The result as `critrm evaluate` writes it, and beside it half credit and why completions are unscored."""
    half = {"overall": half_credit(result.overall)} | {
        name: half_credit(found) for name, found in result.subsets.items()
    }
    return asdict(result) | {"half_credit": half, "unscored_completions": dict(_reasons(verdicts))}


def _reasons(verdicts: Iterable[Verdict]) -> list[tuple[str, int]]:
    return Counter(verdict.unscored for verdict in verdicts if verdict.likert is None).most_common()


def judge_table(result: EvalResult, verdicts: Sequence[Verdict]) -> Table:
    """A judge's result for the terminal: strict accuracy as the headline, half credit beside it."""
    table = Table(title=f"{escape(result.benchmark)}, judge {escape(result.model)}, critiques {escape(result.critic)}")
    for index, title in enumerate(("subset", "right", "tie", "wrong", "unscored", "strict accuracy", "half")):
        table.add_column(title, justify="left" if index == 0 else "right")
    for name, found in result.subsets.items():
        table.add_row(escape(name), *_cells(found))
    for name, value in result.sections.items():
        table.add_row(f"section {escape(name)}", *[""] * 4, f"{value:.3f}", "", style="cyan")
    table.add_row("all pairs", *_cells(result.overall), style="bold")
    number = "-" if result.headline_value is None else f"{result.headline_value:.3f}"
    lines = [f"{number} {escape(result.headline)}", "\\[95 % Wilson interval]; a tie is not right, or one half"]
    lines += [f"{count} completions unscored: {escape(reason)}" for reason, count in _reasons(verdicts)]
    table.caption = "\n".join(lines)
    return table


def _cells(found: Tally) -> tuple[str, ...]:
    counts = (str(each) for each in (found.n_right, found.n_tie, found.n_wrong, found.n_unscored))
    accuracy, half = found.accuracy, half_credit(found)
    if accuracy is None or half is None:
        return (*counts, "-", "-")
    return (*counts, f"{accuracy.value:.3f} \\[{accuracy.low:.2f}, {accuracy.high:.2f}]", f"{half:.3f}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairwiseVerdict:
    """What a pairwise judge says about two responses."""

    id: str
    preferred: int | None
    """1 or 2 for a response, 0 for a tie, None for a reply that nobody could read."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A pairwise judge beside the human labels."""

    outcomes: dict[str, Outcome]
    """Of the items that the humans decided: right, wrong, tie or unscored."""
    counts: dict[tuple[int, int | None], int]
    """(human label, verdict) -> items, the humans' ties included."""

    @property
    def n_agree(self) -> int:
        """Items on which both say the same, ties included."""
        return sum(n for (label, verdict), n in self.counts.items() if label == verdict)


def read_pairwise_verdicts(path: str | Path) -> list[PairwiseVerdict]:
    """Read a judge's verdicts: rows with `idx`, `<judge>_result` (1, 2, tie) and perhaps `<judge>_reason`.

    A result of any other wording, such as the files' own "garbage", is unscored.

    Raises:
        DataError: a row lacks a field, or an id is repeated; names file and line.
    """
    verdicts: dict[str, PairwiseVerdict] = {}
    for number, row in read_rows(path):
        item = _new_id(row, verdicts, path=path, line=number)
        names = [name for name in row if name.endswith("_result")]
        if len(names) != 1:
            raise DataError("one column has to be called <judge>_result", path=str(path), line=number, field="_result")
        reason = row.get(names[0].removesuffix("_result") + "_reason")
        preferred = _spelt(row[names[0]])
        verdicts[item] = PairwiseVerdict(id=item, preferred=preferred, reason=reason if isinstance(reason, str) else "")
    return list(verdicts.values())


def read_human_labels(path: str | Path) -> dict[str, int]:
    """Read PandaLM's test set: id -> what a majority of the three annotators prefers; no majority is a tie.

    Raises:
        DataError: a row lacks a field, or an id is repeated; names file and line.
    """
    labels: dict[str, int] = {}
    for number, row in read_rows(path):
        item = _new_id(row, labels, path=path, line=number)
        votes = [_spelt(row.get(f"annotator{n}")) for n in (1, 2, 3)]
        if None in votes:
            reason = "the annotators' votes must be 0, 1 or 2"
            raise DataError(reason, path=str(path), line=number, field=f"annotator{votes.index(None) + 1}")
        label, n_votes = Counter(votes).most_common(1)[0]
        labels[item] = label if label is not None and n_votes > 1 else TIE
    return labels


def _new_id(row: Mapping[str, Any], known: Mapping[str, object], *, path: str | Path, line: int) -> str:
    value = row.get("idx")
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise DataError("missing: which item is it about?", path=str(path), line=line, field="idx")
    if str(value) in known:
        raise DataError(f"a second row of item {value!r}: keep one", path=str(path), line=line, field="idx")
    return str(value)


def _spelt(value: object) -> int | None:
    key = value.strip().lower() if isinstance(value, str) else value
    return None if isinstance(key, bool) or not isinstance(key, (int, str)) else _SPELLINGS.get(key)


def compare(verdicts: Iterable[PairwiseVerdict], labels: Mapping[str, int]) -> Agreement:
    """Lay a judge's verdicts beside the human labels; a label without a verdict is unscored.

    Raises:
        DataError: a verdict is about an item that has no label.
    """
    by_id = {verdict.id: verdict.preferred for verdict in verdicts}
    if unknown := by_id.keys() - labels.keys():
        raise DataError(f"a verdict about {min(unknown)!r}, which has no human label", field="idx")
    outcomes = {item: _outcome(label, by_id.get(item)) for item, label in labels.items() if label != TIE}
    return Agreement(
        outcomes=outcomes, counts=dict(Counter((label, by_id.get(item)) for item, label in labels.items()))
    )


def _outcome(label: int, preferred: int | None) -> Outcome:
    if preferred is None:
        return Outcome.UNSCORED
    if preferred == TIE:
        return Outcome.TIE
    return Outcome.RIGHT if preferred == label else Outcome.WRONG
