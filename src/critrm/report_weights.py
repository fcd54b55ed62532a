"""Accuracy over parts that weigh differently: RewardBench's sections, and the mean of them, with intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from critrm.metrics import correctness, seed_spread
from critrm.types import NO_CRITIC, Score

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Parts = list[NDArray[numpy.float64]]

Strata = list[tuple[list[str], float]]
"""Each part's pair ids and its weight; the weights come to 1."""
N_RESAMPLES = 10_000
CHUNK = 500
"""Resamples drawn at a time; bounds memory."""


def weighted_arm(
    arms: Mapping[str, Sequence[Mapping[str, Score]]], critic: str, *, strata: Strata, compare: bool = True
) -> dict[str, Any]:
    """An arm's weighted accuracy, as `results.compare_arms` gives that of plain groups.

    The interval is Wilson's at the number of equally weighted items that would vary as much. The difference from no
    critiques is from a paired bootstrap over items within their part, and over seeds (`metrics.paired_difference`
    says how those are drawn). Unscored pairs take no part.

    Args:
        arms: critic -> scores by pair id, one mapping per seed.
        critic: the arm.
        strata: the parts.
        compare: with no critiques, which takes its time.
    """
    import numpy as np

    runs = _parts(arms[critic], strata)
    weights = [weight for _, weight in strata]
    by_seed = [_mean([part[seed] for part in runs], weights) for seed in range(len(arms[critic]))]
    spread = seed_spread([each for each in by_seed if each is not None])
    n_unscored = sum(int(np.isnan(part).sum()) for part in runs)
    found: dict[str, Any] = {
        "mean": spread.mean if spread else None,
        "std": spread.std if spread else None,
        "by_seed": by_seed,
        "n_unscored": n_unscored,
        **_interval(runs, weights, spread.mean if spread else None),
        "difference": None,
    }
    if compare and critic != NO_CRITIC and NO_CRITIC in arms and spread:
        found["difference"] = _difference(runs, _parts(arms[NO_CRITIC], strata), weights)
    return found


def _parts(seeds: Sequence[Mapping[str, Score]], strata: Strata) -> "Parts":
    """Strict correctness of each part, of shape (n_seeds, n_items)."""
    import numpy as np

    return [
        np.array([correctness(scores[pair_id].outcome for pair_id in ids) for scores in seeds]) for ids, _ in strata
    ]


def _mean(parts: "Parts", weights: Sequence[float]) -> float | None:
    import numpy as np

    known = [(float(np.nanmean(part)), weight) for part, weight in zip(parts, weights, strict=True) if _scored(part)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if known else None


def _scored(part: "NDArray[numpy.float64]") -> bool:
    import numpy as np

    return bool((~np.isnan(part)).any())


def _interval(parts: "Parts", weights: Sequence[float], mean: float | None) -> dict[str, float | None]:
    """Wilson's interval at the effective number of items."""
    import numpy as np

    if mean is None:
        return {"low": None, "high": None}
    variance = n_items = 0.0
    for part, weight in zip(parts, weights, strict=True):
        if _scored(part):
            share, n = float(np.nanmean(part)), int((~np.isnan(part)).any(axis=0).sum())
            variance += weight**2 * share * (1 - share) / n
            n_items += n
    n_effective = mean * (1 - mean) / variance if variance else n_items
    z = 1.959964
    middle = (mean + z**2 / (2 * n_effective)) / (1 + z**2 / n_effective)
    half = z / (1 + z**2 / n_effective) * (mean * (1 - mean) / n_effective + z**2 / (4 * n_effective**2)) ** 0.5
    return {"low": min(max(0.0, middle - half), mean), "high": max(min(1.0, middle + half), mean)}


def _resampled(
    runs: "Sequence[NDArray[numpy.float64]]",
    seeds: "Sequence[NDArray[numpy.int64]]",
    rng: "numpy.random.Generator",
) -> "list[NDArray[numpy.float64]]":
    """Each arm's share right over drawn items, the same for both, and drawn seeds; of shape (N_RESAMPLES,)."""
    import numpy as np

    n_items, shares = runs[0].shape[1], []
    for start in range(0, N_RESAMPLES, CHUNK):
        n = min(CHUNK, N_RESAMPLES - start)
        drawn = rng.integers(n_items, size=(n, n_items)) + n_items * np.arange(n)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n * n_items).reshape(n, n_items)
        shares.append([counts @ run.T / n_items for run in runs])
    return [
        np.take_along_axis(np.concatenate(by_seed), drawn_seeds, axis=1).mean(axis=1)
        for by_seed, drawn_seeds in zip(zip(*shares, strict=True), seeds, strict=True)
    ]


def _difference(a: "Parts", b: "Parts", weights: Sequence[float]) -> dict[str, float] | None:
    import numpy as np

    rng = np.random.default_rng(0)
    seeds = [rng.integers(len(arm[0]), size=(N_RESAMPLES, max(1, len(arm[0]) - 1))) for arm in (a, b)]
    value, draws, total, n_items, n_differ = 0.0, np.zeros(N_RESAMPLES), 0.0, 0, 0
    for part_a, part_b, weight in zip(a, b, weights, strict=True):
        scored = ~(np.isnan(part_a).any(axis=0) | np.isnan(part_b).any(axis=0))
        n = int(scored.sum())
        if not n:
            continue
        runs = (part_a[:, scored], part_b[:, scored])
        means = _resampled(runs, seeds, rng)
        by_item = runs[0].mean(axis=0) - runs[1].mean(axis=0)
        value, draws = value + weight * float(by_item.mean()), draws + weight * (means[0] - means[1])
        total, n_items, n_differ = total + weight, n_items + n, n_differ + int(np.count_nonzero(by_item))
    if not n_items:
        return None
    draws = np.round(draws / total, 12)
    far = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    # A few items that differ cannot carry a small p (as in `metrics.paired_difference`).
    p_value = min(1.0, max(2 * (far + 1) / (N_RESAMPLES + 1), 2.0 ** (1 - n_differ)))
    low, high = (float(end) for end in np.quantile(draws, [0.025, 0.975]))
    return {"value": value / total, "low": low, "high": high, "p_value": p_value, "n": n_items}
