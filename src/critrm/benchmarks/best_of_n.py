"""Best-of-n lists: a prompt with one best completion (or several right ones) and the others.

Source of the form: RMB (Zhou et al., 2025, github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark) and RewardBench 2.
A list counts as right only if every right completion's reward is higher than every other's. The reader cuts a list into
pairs `<list>#0`, `<list>#1`, ... in which each completion occurs; here they are put together again.
"""

import math
from collections.abc import Mapping, Sequence

from critrm.types import PreferencePair, Score

HEADLINE = "share of lists whose best completion beats all others"


def list_id(pair_id: str) -> str:
    """The list that a pair is part of; a pair of no list is a list of its own."""
    head, mark, _ = pair_id.rpartition("#")
    return head if mark else pair_id


def by_list(pairs: Sequence[PreferencePair], scores: Mapping[str, Score]) -> dict[str, list[Score | None]]:
    """List -> the scores of its pairs; None for a pair without."""
    lists: dict[str, list[Score | None]] = {}
    for pair in pairs:
        lists.setdefault(list_id(pair.id), []).append(scores.get(pair.id))
    return lists


def list_score(name: str, scores: Sequence[Score | None]) -> Score:
    """A list as one comparison: its lowest right reward against its highest other one.

    Not-a-number, and so unscored, where any reward of the list is missing or not a number.
    """
    rewards = [(math.nan, math.nan) if each is None else (each.chosen, each.rejected) for each in scores]
    if any(math.isnan(reward) for both in rewards for reward in both):
        return Score(name, math.nan, math.nan)
    return Score(name, min(chosen for chosen, _ in rewards), max(rejected for _, rejected in rewards))
