"""What a critique is worth in plain pairs: the curve without critiques, inverted at an arm's accuracy (section 5.2).

The share right without critiques is fitted to the number of training pairs, logit(share) = a + b ln(pairs), by
binomial regression over all sizes. An arm trained on n critiqued pairs is worth as many plain pairs as the curve needs
for the arm's share right. The interval is a bootstrap over items and seeds. Nothing is read off the curve beyond the
sizes that it was measured at: there the answer is "more than" the largest or "less than" the smallest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from critrm.errors import DataError
from critrm.metrics import Difference, paired_difference

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

N_RESAMPLES = 2_000

Runs = Sequence[Sequence[float]]
"""Strict correctness (`metrics.correctness`) of shape (n_seeds, n_items)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """How many plain pairs the critiqued pairs of an arm are worth."""

    n_train: int
    """Critiqued pairs that the arm was trained on."""
    accuracy: float
    plain_accuracy: float
    """Of the arm without critiques on the same pairs."""
    difference: Difference
    plain_pairs: float
    """What the curve needs for the arm's accuracy, kept within the sizes that it was measured at."""
    low: float
    high: float
    """The ends of the 95 % interval, kept within them as well."""
    smallest: int
    largest: int
    """The sizes that the curve was measured at."""
    slope: float
    """b of the curve; not above 0, more pairs do not help."""
    share_above: float
    """Of the resamples, in which the arm is beyond the largest size."""

    @property
    def rate(self) -> float:
        """Plain pairs per critiqued pair."""
        return self.plain_pairs / self.n_train

    @property
    def is_significant(self) -> bool:
        """Whether the arm differs from no critiques on the same pairs (p below 0.05)."""
        return self.difference.p_value < 0.05


def exchange_rate(plain: Mapping[int, Runs], arm: Runs, *, n_train: int, seed: int = 0) -> Exchange | None:
    """How many plain pairs an arm's critiqued pairs are worth; None where no item was scored in all runs.

    Args:
        plain: training pairs without critiques -> the runs on them. All runs are on the same items, in the same order.
        arm: the runs of the arm with critiques.
        n_train: its training pairs; one of the sizes in `plain`, which it is compared with.
        seed: of the resampling.

    Raises:
        DataError: fewer than two sizes, the arm's own is not among them, or the runs differ in length.
    """
    import numpy as np

    if len(plain) < 2 or n_train not in plain:
        raise DataError(
            f"an exchange rate needs a curve of two sizes or more, with {n_train} among them: {sorted(plain)}"
        )
    difference = paired_difference(arm, plain[n_train])
    sizes = sorted(plain)
    runs = [np.atleast_2d(np.asarray(each, dtype=float)) for each in (*(plain[size] for size in sizes), arm)]
    scored = ~np.isnan(np.concatenate(runs)).any(axis=0)
    if difference is None or not scored.any():
        return None
    runs = [each[:, scored] for each in runs]
    n_items = int(scored.sum())
    a, b = _fit(sizes, [float(each.mean()) for each in runs[:-1]], n_items)
    point = _invert(a, b, float(runs[-1].mean()), sizes)
    rng, drawn, above = np.random.default_rng(seed), [], 0
    for _ in range(N_RESAMPLES):
        means = _resample(runs, n_items, rng)
        a_drawn, b_drawn = _fit(sizes, means[:-1], n_items)
        worth = _invert(a_drawn, b_drawn, means[-1], sizes)
        above += worth >= sizes[-1]
        drawn.append(worth)
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    return Exchange(
        n_train=n_train,
        accuracy=float(runs[-1].mean()),
        plain_accuracy=float(runs[sizes.index(n_train)].mean()),
        difference=difference,
        plain_pairs=point,
        low=min(low, point),
        high=max(high, point),
        smallest=sizes[0],
        largest=sizes[-1],
        slope=b,
        share_above=above / N_RESAMPLES,
    )


def _resample(runs: "Sequence[NDArray[numpy.float64]]", n_items: int, rng: "numpy.random.Generator") -> list[float]:
    """Each run's share right on the same drawn items, over drawn seeds (n - 1 of n, as `paired_difference` does)."""
    import numpy as np

    counts = np.bincount(rng.integers(n_items, size=n_items), minlength=n_items)
    means = []
    for run in runs:
        seeds = rng.integers(len(run), size=max(1, len(run) - 1))
        means.append(float((run[seeds] @ counts).mean() / n_items))
    return means


def _fit(sizes: Sequence[int], shares: Sequence[float], n_items: int) -> tuple[float, float]:
    """Return a and b of logit(share) = a + b ln(size), by iteratively reweighted least squares."""
    import numpy as np

    x = np.log(np.asarray(sizes, dtype=float))
    # Half an item off 0 and 1, where the logit has no end.
    y = np.clip(np.asarray(shares), 0.5 / n_items, 1 - 0.5 / n_items)
    center = x.mean()
    design = np.stack([np.ones_like(x), x - center], axis=1)
    beta = np.array([math.log(y.mean() / (1 - y.mean())), 0.0])
    for _ in range(25):
        mean = 1 / (1 + np.exp(-design @ beta))
        weight = mean * (1 - mean)
        step = np.linalg.solve(design.T @ (design * weight[:, None]), design.T @ (y - mean))
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    return float(beta[0] - beta[1] * center), float(beta[1])


def _invert(a: float, b: float, share: float, sizes: Sequence[int]) -> float:
    """The size at which the curve reaches a share, kept within the sizes; where it does not rise, it never does."""
    smallest, largest = sizes[0], sizes[-1]
    top, bottom = (1 / (1 + math.exp(-(a + b * math.log(size)))) for size in (largest, smallest))
    if share >= max(top, bottom):
        return float(largest)
    if b <= 0:
        # It falls or stays level: the arm is no better than plain pairs of any number.
        return float(smallest)
    if share <= bottom:
        return float(smallest)
    return float(math.exp((math.log(share / (1 - share)) - a) / b))


def in_words(found: Exchange, *, arm: str, where: str) -> str:
    """One sentence that claims no more than was measured.

    Args:
        found: the exchange rate.
        arm: the critic's name.
        where: the test set.
    """
    gain = (
        f"{found.accuracy:.3f} against {found.plain_accuracy:.3f} without critiques (p {found.difference.p_value:.2g})"
    )
    start = f"{where}: with {arm}'s critiques, {found.n_train} pairs give {gain}"
    if not found.is_significant:
        return f"{start}. That is no significant difference: a critique is not shown to be worth anything here."
    if found.difference.value < 0:
        return f"{start}. These critiques do harm."
    if found.plain_pairs >= found.largest:
        sure = f" (in {found.share_above:.0%} of resamples)" if found.share_above < 0.995 else ""
        if found.slope <= 0:
            return (
                f"{start}. Without critiques, no number of pairs up to {found.largest} reaches that{sure}, and "
                "accuracy does not rise with it: plain pairs are no substitute here."
            )
        return (
            f"{start}. Without critiques, {found.largest} pairs do not reach that{sure}: "
            f"a critiqued pair is worth more than {found.largest / found.n_train:.1f} plain ones."
        )
    high = f"more than {found.largest}" if found.high >= found.largest else f"{found.high:.0f}"
    return (
        f"{start}. Without critiques that takes about {found.plain_pairs:.0f} pairs [{found.low:.0f}, {high}]: "
        f"a critiqued pair is worth {found.rate:.1f} plain ones."
    )
