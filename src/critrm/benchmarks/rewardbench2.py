"""RewardBench 2 (Malik et al., 2025): 1,865 prompts in six subsets; the headline is their plain mean.

Source: huggingface.co/datasets/allenai/reward-bench-2; the Ties score follows the official scorer
(github.com/allenai/reward-bench, `rewardbench/utils.py`). In five subsets the chosen completion has to beat three
others. In Ties a prompt has many right answers (`tied:<n>`) or, for reference, one (`ref:<n>`).

One difference: where the best completion shares the highest reward with k - 1 others, the official scorer counts 1/k,
and critrm, which is strict, a tie. Rewards that are not rounded hardly ever tie.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from critrm.benchmarks.best_of_n import by_list, list_score
from critrm.types import Outcome, PreferencePair, Score

TIES = "Ties"

N_LISTS: dict[str, int] = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, TIES: 102}
"""Prompts in each subset of the released data."""

SECTIONS: dict[str, tuple[str, ...]] = {name: (name,) for name in N_LISTS}

HEADLINE = "average of the six subsets"


def extra_sections(pairs: Sequence[PreferencePair], scores: Mapping[str, Score]) -> dict[str, float]:
    """The Ties score in place of the share of its lists that are right; nothing where it cannot be computed."""
    ties = ties_score([pair for pair in pairs if pair.subset == TIES], scores)
    return {} if ties is None else {TIES: ties}


def ties_score(pairs: Sequence[PreferencePair], scores: Mapping[str, Score]) -> float | None:
    """The score of the Ties subset: 60 % accuracy, 40 % margins, and a hundredth that breaks ties.

    With, per prompt, `gap` = lowest right minus highest wrong reward and `spread` = highest minus lowest right reward:

        0.3 share of tied prompts with gap > 0  +  0.3 the same of reference prompts
        + 0.2 share of gap > spread  +  0.2 share of min(gap, gap of the reference) > spread
        + 0.01 mean of tanh(min(gap, gap of the reference) / spread - 1)

    the last three over prompts of both kinds. Prompts with a reward that is not a number are left out.

    Returns:
        The score, at most 1.01 as in the official scorer; None when no prompt of either kind is scored.
    """
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads: dict[str, float] = {}
    for name, found in by_list(pairs, scores).items():
        kind, _, number = name.partition(":")
        worst = list_score(name, found)
        if kind not in gaps or worst.outcome is Outcome.UNSCORED:
            continue
        gaps[kind][number] = worst.chosen - worst.rejected
        if kind == "tied":
            spreads[number] = max(each.chosen for each in found if each) - worst.chosen
    both = [number for number in gaps["tied"] if number in gaps["ref"]]
    if not gaps["ref"] or not gaps["tied"] or not both:
        return None
    hard = {number: min(gaps["tied"][number], gaps["ref"][number]) for number in both}
    return (
        0.3 * fmean(gap > 0 for gap in gaps["tied"].values())
        + 0.3 * fmean(gap > 0 for gap in gaps["ref"].values())
        + 0.2 * fmean(gaps["tied"][number] > spreads[number] for number in both)
        + 0.2 * fmean(hard[number] > spreads[number] for number in both)
        + 0.01 * fmean(_excess(hard[number], spreads[number]) for number in both)
    )


def _excess(gap: float, spread: float) -> float:
    if spread == 0:
        return math.copysign(1.0, gap) if gap else 0.0
    return math.tanh(gap / spread - 1)
