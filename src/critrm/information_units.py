"""What MetaCritique counts: atomic information units, which hold, and the scores (Appendix E; Sun et al., 2024).

    precision   how many of the units of a critique are true
    recall      how many of the units of a reference critique it also states
    F1          their harmonic mean; 0 when either is 0

A verdict that cannot be read is unscored: it counts neither as true nor as false. What has no scored unit is undefined,
takes no part in a mean, and is counted. The means are over critiques, as in Sun et al.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from critrm.errors import DataError
from critrm.store import read_rows
from critrm.types import Interval, Message, Side

Labels = tuple[bool | None, ...]
"""One verdict per unit: true, false, or None for one that cannot be read."""

CHUNK = 500
"""Bootstrap resamples drawn at a time."""
_BULLET = re.compile(r"^[ \t]*(?:[-*•–]|[0-9]{1,3}[.)])[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_VERDICT = re.compile(r"^[ \t*_#-]*(?:final\s+)?verdict[*_\"' \t]*[:=](.*)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One critique to be graded, with all that its units are checked against."""

    pair_id: str
    side: Side
    critic: str
    prompt: tuple[Message, ...]
    response: str
    critique: str
    answer: str
    """The reference answer."""
    units: tuple[str, ...] = ()
    reference_units: tuple[str, ...] = ()
    no_precision: str = ""
    """Why its units cannot be checked."""
    no_recall: str = ""
    """Why those of the reference critique cannot be looked for in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What became of one critique's units and of its reference's."""

    pair_id: str
    side: Side
    critic: str
    units: tuple[str, ...]
    reference_units: tuple[str, ...]
    precision_labels: Labels
    """Of each unit, whether it is true."""
    recall_labels: Labels
    """Of each reference unit, whether the critique states it."""
    no_precision: str = ""
    no_recall: str = ""

    @property
    def precision(self) -> float | None:
        """Share of the scored units that are true; None without any."""
        return _share(self.precision_labels)

    @property
    def recall(self) -> float | None:
        """Share of the scored reference units that the critique states; None without any."""
        return _share(self.recall_labels)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None when either is undefined."""
        if self.precision is None or self.recall is None:
            return None
        if self.precision == 0 or self.recall == 0:
            return 0.0
        return 2 / (1 / self.precision + 1 / self.recall)


def _share(labels: Labels) -> float | None:
    scored = [label for label in labels if label is not None]
    return sum(scored) / len(scored) if scored else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaResult:
    """One critic's critiques, graded: the means over critiques with 95 % bootstrap intervals (Table 4)."""

    critic: str
    n_critiques: int
    n_units: int
    n_reference_units: int
    n_unscored: int
    """Verdicts that could not be read, on units of either kind."""
    precision: Interval | None
    recall: Interval | None
    f1: Interval | None
    undefined: dict[str, int]
    """Critiques without precision, recall and F1."""
    reasons: dict[str, int]
    """Why critiques could not be graded -> how many."""


def read_units(reply: str) -> tuple[str, ...]:
    """The units in a grader's reply: one per line, repetitions left out; none when it says NONE."""
    if re.fullmatch(r"\W*none\W*", reply, re.IGNORECASE):
        return ()
    # With bullets, a line without one is talk around the list.
    found = _BULLET.findall(reply) or [line.strip() for line in reply.splitlines() if not line.strip().endswith(":")]
    return tuple(dict.fromkeys(unit for unit in found if re.search(r"\w", unit)))


def read_truth(reply: str) -> bool | None:
    """The verdict at the end of a grader's reply, `Verdict: true`; None unless it is exactly one of true and false.

    One word alone is a verdict too, and so is one at the beginning, before the reasons.
    """
    text = reply.strip()
    verdicts = list(_VERDICT.finditer(text))
    if not verdicts:
        return _truth(text)
    last = verdicts[-1]
    if text[: last.start()].strip() and re.search(r"\w", text[last.end() :]):
        return None
    return _truth(last[1])


def _truth(text: str) -> bool | None:
    word = re.fullmatch(r"[\W_]*(true|false)[\W_]*", text, re.IGNORECASE)
    return word[1].lower() == "true" if word else None


def summarise_grades(grades: Sequence[Grade], *, n_resamples: int = 10_000, seed: int = 0) -> list[MetaResult]:
    """Each critic's means, in the order in which the critics come.

    The intervals are from a bootstrap over pairs, since a pair's two critiques are not independent.

    Args:
        grades: the graded critiques.
        n_resamples: bootstrap resamples.
        seed: of the resampling; the same grades give the same numbers.
    """
    results = []
    for critic in dict.fromkeys(grade.critic for grade in grades):
        own = [grade for grade in grades if grade.critic == critic]
        scores: dict[str, list[float | None]] = {
            "precision": [grade.precision for grade in own],
            "recall": [grade.recall for grade in own],
            "f1": [grade.f1 for grade in own],
        }
        pair_ids = [grade.pair_id for grade in own]
        means = {name: _mean(values, pair_ids, n_resamples=n_resamples, seed=seed) for name, values in scores.items()}
        labels = [label for grade in own for label in grade.precision_labels + grade.recall_labels]
        reasons = Counter(reason for grade in own for reason in {grade.no_precision, grade.no_recall} if reason)
        results.append(
            MetaResult(
                critic=critic,
                n_critiques=len(own),
                n_units=sum(len(grade.units) for grade in own),
                n_reference_units=sum(len(grade.reference_units) for grade in own),
                n_unscored=labels.count(None),
                undefined={name: values.count(None) for name, values in scores.items()},
                reasons=dict(reasons.most_common()),
                **means,
            )
        )
    return results


def _mean(values: Sequence[float | None], pair_ids: Sequence[str], *, n_resamples: int, seed: int) -> Interval | None:
    import numpy as np

    by_pair: dict[str, list[float]] = {}
    for value, pair_id in zip(values, pair_ids, strict=True):
        if value is not None:
            by_pair.setdefault(pair_id, []).append(value)
    if not by_pair:
        return None
    sums = np.array([sum(each) for each in by_pair.values()])
    counts = np.array([len(each) for each in by_pair.values()])
    rng, means = np.random.default_rng(seed), []
    for start in range(0, n_resamples, CHUNK):
        drawn = rng.integers(len(sums), size=(min(CHUNK, n_resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    value = float(sums.sum() / counts.sum())
    low, high = (float(end) for end in np.quantile(np.concatenate(means), [0.025, 0.975]))
    # Rounding may put an end past the estimate when all values are equal.
    return Interval(value=value, low=min(low, value), high=max(high, value))


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelAgreement:
    """A grader's labels beside those of humans."""

    n: int
    """Units that both have labelled."""
    n_unscored: int
    accuracy: float | None
    kappa: float | None
    """Cohen's: 0 is chance, 1 perfect; None when both give one and the same label throughout."""


def agreement(labels: Sequence[bool | None], human: Sequence[bool | None]) -> LabelAgreement:
    """Compare labels of the same units in the same order.

    Raises:
        DataError: they differ in number.
    """
    if len(labels) != len(human):
        raise DataError(f"{len(labels)} labels beside {len(human)} human ones: both must be of the same units")
    both = [(ours, theirs) for ours, theirs in zip(labels, human, strict=True) if None not in (ours, theirs)]
    n, n_unscored = len(both), len(labels) - len(both)
    if not n:
        return LabelAgreement(n=0, n_unscored=n_unscored, accuracy=None, kappa=None)
    observed = sum(ours == theirs for ours, theirs in both) / n
    p, q = sum(bool(ours) for ours, _ in both) / n, sum(bool(theirs) for _, theirs in both) / n
    chance = p * q + (1 - p) * (1 - q)
    kappa = None if chance == 1 else (observed - chance) / (1 - chance)
    return LabelAgreement(n=n, n_unscored=n_unscored, accuracy=observed, kappa=kappa)


def read_annotations(path: str | Path) -> list[tuple[Case, Grade]]:
    """Read MetaCritique's human-labelled critiques (`annotation_data.json`): each with the grade that humans gave it.

    A row is one question with a reference critique by GPT-4 (`gpt4_critique`) and critiques in the columns
    `<critic>_critique`. Its `index` is the pair id; the response is on the chosen side, for want of a pair.

    Raises:
        DataError: a field is missing, or labels and units differ in number; names file, row and field.
    """
    found = []
    for number, row in read_rows(path):
        try:
            reference = _texts(row, "gpt4_critique", "aius")
            names = [name for name in row if name.endswith("_critique") and name != "gpt4_critique"]
            found += [_annotated(row, name, reference) for name in names]
        except DataError as error:
            raise DataError(error.reason, path=str(path), line=number, field=error.field) from None
    return found


def _annotated(row: Mapping[str, Any], name: str, reference: tuple[str, ...]) -> tuple[Case, Grade]:
    units = _texts(row, name, "aius")
    precision, recall = _labels(row, name, "precision_labels", units), _labels(row, name, "recall_labels", reference)
    place: dict[str, Any] = {
        "pair_id": str(row.get("index")),
        "side": "chosen",
        "critic": name.removesuffix("_critique"),
    }
    case = Case(
        **place,
        prompt=(Message("user", _text(row, "question")),),
        response=_text(row, "response"),
        critique=_text(row[name], "critique"),
        answer=_text(row, "gpt4_answer"),
        units=units,
        reference_units=reference,
    )
    grade = Grade(**place, units=units, reference_units=reference, precision_labels=precision, recall_labels=recall)
    return case, grade


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise DataError("missing: it must be text", field=field)
    return value


def _texts(row: Mapping[str, Any], column: str, field: str) -> tuple[str, ...]:
    inner = row.get(column)
    values = inner.get(field) if isinstance(inner, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError("missing: it must be a list of texts", field=f"{column}.{field}")
    return tuple(values)


def _labels(row: Mapping[str, Any], column: str, field: str, units: tuple[str, ...]) -> Labels:
    values = row[column].get(field)
    if not isinstance(values, list) or not all(value is None or isinstance(value, bool) for value in values):
        raise DataError("missing: it must be a list of true, false or null", field=f"{column}.{field}")
    if len(values) != len(units):
        raise DataError(f"{len(values)} labels of {len(units)} units", field=f"{column}.{field}")
    return tuple(values)
