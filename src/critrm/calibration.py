"""Do a reward model's differences mean what they say, and does it prefer what is long?

Under Bradley-Terry a pair with rewards r and s is won by the first with probability sigmoid(r - s). Calibration asks
whether that is so: of the pairs whose favourite should win with 80 %, it should win 80 %.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from critrm.metrics import tally
from critrm.types import Outcome, PreferencePair, Score, Tally

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

N_BINS = 10
HUGE = 1e3
"""Differences beyond it are as sure as can be; it keeps infinite rewards out of sums."""
MATCHED_RATIO = 0.8
"""Completions are matched in length when the shorter has at least so many of the longer's characters."""
TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Pairs of about the same confidence: one row of the reliability table."""

    n: int
    confidence: float
    """Mean probability, 0.5 to 1, that the favourite wins."""
    accuracy: float
    """Share of the favourites that are the chosen completion; a tie counts one half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How far confidence and accuracy lie apart."""

    n: int
    ece: float
    """Expected calibration error: mean distance of accuracy and confidence over the bins, weighted by pairs."""
    temperature: float | None
    """Dividing the differences by it makes the labels likeliest; above 1 the model is too sure. None where no finite
    one is best: it favours the rejected completion on average, or never errs."""
    ece_scaled: float | None
    """The error after dividing by the temperature. The temperature is fitted to the same pairs, which flatters it; it
    makes the labels likeliest and not this error smallest, so the error may also be higher than before."""
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBias:
    """Whether rewards follow length, in characters."""

    correlation: float | None
    """Spearman's, of the difference in reward and the difference in length within pairs; None where one is constant."""
    matched: Tally
    """Pairs whose lengths differ by at most a fifth."""
    chosen_longer: Tally
    chosen_shorter: Tally
    """The other pairs, by which completion is longer."""


def calibrate(scores: Iterable[Score], *, n_bins: int = N_BINS) -> Calibration | None:
    """Reliability, calibration error and temperature of P(chosen wins) = sigmoid(difference).

    Args:
        scores: rewards; pairs whose rewards are not numbers are left out.
        n_bins: bins of equal size; fewer where there are fewer pairs.

    Returns:
        None when no pair is scored.
    """
    import numpy as np

    raw = [score.chosen - score.rejected for score in scores if score.outcome is not Outcome.UNSCORED]
    # Two equal infinities are a tie, and their difference is not a number.
    differences = np.clip(np.nan_to_num(np.asarray(raw, dtype=float), nan=0.0, posinf=HUGE, neginf=-HUGE), -HUGE, HUGE)
    if not len(differences):
        return None
    temperature = _temperature(differences)
    bins = _bins(differences, n_bins)
    return Calibration(
        n=len(differences),
        ece=_error(bins),
        temperature=temperature,
        ece_scaled=None if temperature is None else _error(_bins(differences / temperature, n_bins)),
        bins=bins,
    )


def _bins(differences: "NDArray[numpy.float64]", n_bins: int) -> tuple[Bin, ...]:
    import numpy as np

    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(differences), 700)))
    right = np.where(differences == 0, 0.5, differences > 0)
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(n_bins, len(order)))
    return tuple(
        Bin(n=len(part), confidence=float(confidence[part].mean()), accuracy=float(right[part].mean()))
        for part in parts
    )


def _error(bins: Sequence[Bin]) -> float:
    return sum(each.n * abs(each.accuracy - each.confidence) for each in bins) / sum(each.n for each in bins)


def _temperature(differences: "NDArray[numpy.float64]") -> float | None:
    import numpy as np
    from scipy.optimize import minimize_scalar

    if differences.mean() <= 0 or not (differences < 0).any():
        return None  # the likelihood grows without end as the temperature rises, or falls
    low, high = (math.log(end) for end in TEMPERATURES)
    best = minimize_scalar(
        lambda log_t: float(np.logaddexp(0, -differences / math.exp(log_t)).mean()),
        bounds=(low, high),
        method="bounded",
    )
    return math.exp(float(best.x))


def length_bias(pairs: Sequence[PreferencePair], scores: Mapping[str, Score]) -> LengthBias:
    """Correlation of reward and length, and accuracy where length tells nothing, for and against the longer one.

    Args:
        pairs: the pairs.
        scores: pair id -> rewards; pairs without are left out.
    """
    differences: list[tuple[float, float]] = []
    groups: dict[str, list[Outcome]] = {"matched": [], "longer": [], "shorter": []}
    for pair in pairs:
        score = scores.get(pair.id)
        if score is None or score.outcome is Outcome.UNSCORED:
            continue
        lengths = len(pair.chosen), len(pair.rejected)
        is_matched = min(lengths) >= MATCHED_RATIO * max(lengths)
        groups["matched" if is_matched else "longer" if lengths[0] > lengths[1] else "shorter"].append(score.outcome)
        differences.append((score.chosen - score.rejected, lengths[0] - lengths[1]))
    return LengthBias(
        correlation=_spearman([each for each in differences if math.isfinite(each[0])]),
        matched=tally(groups["matched"]),
        chosen_longer=tally(groups["longer"]),
        chosen_shorter=tally(groups["shorter"]),
    )


def _spearman(points: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    if any(len(set(column)) < 2 for column in zip(*points, strict=True)) or len(points) < 3:
        return None
    # A pair's members have no order: with both orders the result does not depend on which one is called chosen.
    both = [*points, *((-reward, -length) for reward, length in points)]
    return float(spearmanr(both).statistic)
