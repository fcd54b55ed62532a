"""Outcomes -> numbers: accuracy, sections, intervals and paired tests; the only place that weighs a tie.

Accuracy is strict, as in section 4.1: right only if the chosen completion's reward is strictly higher. A tie is scored
and not right; an unscored comparison (a reward that is not a number) is left out and counted apart.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from critrm.errors import DataError
from critrm.types import Interval, Outcome, Tally

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

CHUNK = 500
"""Bootstrap resamples drawn at a time; bounds memory at CHUNK x n_items counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much better one arm is than another, on the same items."""

    value: float
    """Accuracy of the first arm minus that of the second, in [-1, 1]."""
    low: float
    high: float
    """The ends of the 95 % interval."""
    p_value: float
    """Two-sided; the hypothesis is that the arms are equally accurate."""
    n: int
    """Items scored in every run of both arms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The same number measured with several seeds."""

    mean: float
    std: float | None
    """Sample standard deviation (n - 1); None for one seed."""
    n: int


def tally(outcomes: Iterable[Outcome]) -> Tally:
    """Count outcomes and give their strict accuracy with its 95 % Wilson interval.

    The accuracy is right / (right + wrong + tie), and None when nothing was scored.
    """
    counts = Counter(outcomes)
    n_scored = counts[Outcome.RIGHT] + counts[Outcome.WRONG] + counts[Outcome.TIE]
    return Tally(
        n_right=counts[Outcome.RIGHT],
        n_wrong=counts[Outcome.WRONG],
        n_tie=counts[Outcome.TIE],
        n_unscored=counts[Outcome.UNSCORED],
        accuracy=_wilson(counts[Outcome.RIGHT], n_scored) if n_scored else None,
    )


def _wilson(n_right: int, n_scored: int) -> Interval:
    from scipy.stats import binomtest

    ends = binomtest(n_right, n_scored).proportion_ci(confidence_level=0.95, method="wilson")
    value = n_right / n_scored
    # Rounding may put an end past the estimate by one unit in the last place (0 of n, n of n).
    return Interval(value=value, low=min(max(float(ends.low), 0.0), value), high=max(min(float(ends.high), 1.0), value))


def n_scored(tally: Tally) -> int:
    """How many comparisons an accuracy rests on."""
    return tally.n_right + tally.n_wrong + tally.n_tie


def half_credit(tally: Tally) -> float | None:
    """Accuracy when a tie counts one half, as a coin would get; None when nothing was scored."""
    n = n_scored(tally)
    return (tally.n_right + tally.n_tie / 2) / n if n else None


def section_scores(
    tallies: Mapping[str, Tally], sections: Mapping[str, Sequence[str]], *, weights: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Accuracy per section: the mean over its subsets, weighted by a table or else by the number of scored pairs.

    Subsets that are absent or have no scored pair take no part; a section left with none is left out.
    """
    scores = {}
    for section, subsets in sections.items():
        parts = []
        for subset in subsets:
            found = tallies.get(subset)
            if found is not None and found.accuracy is not None:
                parts.append((found.accuracy.value, weights[subset] if weights else n_scored(found)))
        if parts:
            total = sum(weight for _, weight in parts)
            scores[section] = math.fsum(value * weight for value, weight in parts) / total
    return scores


def correctness(outcomes: Iterable[Outcome]) -> list[float]:
    """Strict correctness of each outcome: 1 right, 0 wrong or tie, not-a-number unscored."""
    return [math.nan if each is Outcome.UNSCORED else float(each is Outcome.RIGHT) for each in outcomes]


def _exact_p(differences: Iterable[float]) -> float:
    """Exact two-sided McNemar test: of the items that exactly one arm got right, is one arm's share above one half?"""
    from scipy.stats import binomtest

    signs = [difference > 0 for difference in differences if difference]
    return float(binomtest(sum(signs), len(signs)).pvalue) if signs else 1.0


def _same_items(runs: Iterable[Sequence[object]]) -> None:
    lengths = sorted({len(run) for run in runs})
    if len(lengths) > 1:
        raise DataError(f"runs to compare must cover the same pairs in the same order, but have {lengths} of them")


def paired_difference(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, n_resamples: int = 10_000, seed: int = 0
) -> Difference | None:
    """The accuracy of arm `a` minus that of arm `b`, by a paired bootstrap over items and seeds.

    Args:
        a: Strict correctness (see `correctness`) of shape (n_seeds, n_items); one row per training seed.
        b: The same items in the same order; it may have another number of seeds.
        n_resamples: Bootstrap resamples.
        seed: Seed of the resampling; the same input gives the same numbers.

    Each resample draws the items once for both arms (they are paired) and the seeds of each arm on their own. Of n
    seeds n - 1 are drawn, because drawing all n would understate the spread of so few (Rao and Wu, 1988); an arm with
    one seed carries no seed variance, so its interval speaks of that one model, not of the method.

    The p-value is the exact McNemar test for one seed per arm. For more it is the share of resamples on the far side
    of zero, doubled, but never below what an exact test of the items that differ could reach: a few items cannot
    carry a small p. Items unscored in any run are left out of all; None when no item remains.

    Raises:
        DataError: the runs differ in length.
    """
    import numpy as np

    _same_items([*a, *b])
    if not a or not b:
        return None
    # atleast_2d keeps the two axes when there are no items at all.
    arm_a, arm_b = np.atleast_2d(np.asarray(a, dtype=float)), np.atleast_2d(np.asarray(b, dtype=float))
    scored = ~(np.isnan(arm_a).any(axis=0) | np.isnan(arm_b).any(axis=0))
    n_items = int(scored.sum())
    if n_items == 0:
        return None
    arm_a, arm_b = arm_a[:, scored], arm_b[:, scored]
    by_item = arm_a.mean(axis=0) - arm_b.mean(axis=0)
    draws = _bootstrap(arm_a, arm_b, n_resamples=n_resamples, seed=seed)
    low, high = (float(end) for end in np.quantile(draws, [0.025, 0.975]))
    if len(arm_a) == len(arm_b) == 1:
        p_value = _exact_p(by_item.tolist())
    else:
        far = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        floor = 2.0 ** (1 - int(np.count_nonzero(by_item)))
        p_value = min(1.0, max(2 * (far + 1) / (n_resamples + 1), floor))
    return Difference(value=float(by_item.mean()), low=low, high=high, p_value=p_value, n=n_items)


def _bootstrap(
    arm_a: "NDArray[numpy.float64]", arm_b: "NDArray[numpy.float64]", *, n_resamples: int, seed: int
) -> "NDArray[numpy.float64]":
    """Differences of shape (n_resamples,) from arms of shape (n_seeds, n_items)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    n_items = arm_a.shape[1]
    parts = []
    for start in range(0, n_resamples, CHUNK):
        n = min(CHUNK, n_resamples - start)
        drawn = rng.integers(n_items, size=(n, n_items)) + n_items * np.arange(n)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n * n_items).reshape(n, n_items)
        means = []
        for arm in (arm_a, arm_b):
            by_seed = counts @ arm.T / n_items  # (n, n_seeds)
            seeds = rng.integers(len(arm), size=(n, max(1, len(arm) - 1)))
            means.append(np.take_along_axis(by_seed, seeds, axis=1).mean(axis=1))
        parts.append(means[0] - means[1])
    # Rounding, or equal arms would seem to differ by 1e-17.
    return np.round(np.concatenate(parts), 12)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjustment of several p-values, in the order given; controls the chance of any false finding."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def seed_spread(values: Iterable[float]) -> Spread | None:
    """Mean and sample standard deviation over seeds; not-a-number is left out, None when nothing remains."""
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return None
    std = statistics.stdev(kept) if len(kept) > 1 else None
    return Spread(mean=statistics.fmean(kept), std=std, n=len(kept))
