"""RewardBench (Lambert et al., 2024): 2,985 pairs in 23 subsets and four sections.

The tables are those of the official scorer (github.com/allenai/reward-bench, `rewardbench/constants.py`), so that our
numbers can be laid beside the leaderboard's. The paper reports the four sections and their plain mean (section 4.1).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from critrm.types import SIDES, PreferencePair, Score

SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}

N_PAIRS: dict[str, int] = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    "math-prm": 447,
    "hep-cpp": 164,
    "hep-go": 164,
    "hep-java": 164,
    "hep-js": 164,
    "hep-python": 164,
    "hep-rust": 164,
}
"""Pairs in each subset of the released data; their sums are Table 1 of the paper."""

EXAMPLE_COUNTS: dict[str, int] = N_PAIRS | {"math-prm": 984}
"""The official weight of each subset inside its section: its pairs, but math as much as all code (6 x 164).

Until September 2024 the official table gave XSTest's two subsets each other's weight. The Safety of results from before
is ours plus (should-refuse - should-respond) * 96 / 740.
"""

HEADLINE = "average of the four sections"


def official_files(
    pairs: Sequence[PreferencePair], scores: Sequence[Score], *, model: str
) -> dict[str, dict[str, Any]]:
    """The results in the two forms that RewardBench's own script writes, for tools that read those.

    Returns:
        `eval-set`: accuracy by subset; `eval-set-scores`: one column per field, one entry per pair. As in the official
        script a pair counts 1 only if the chosen reward is strictly higher, and unscored pairs count 0 here.
    """
    found = {score.pair_id: score for score in scores}
    rewards = [found.get(pair.id, Score(pair.id, math.nan, math.nan)) for pair in pairs]
    facts = {"model": model, "model_type": "Seq. Classifier", "chat_template": "critrm"}
    by_subset: dict[str, list[int]] = {}
    results = [int(score.chosen > score.rejected) for score in rewards]
    for pair, result in zip(pairs, results, strict=True):
        by_subset.setdefault(pair.subset or pair.source, []).append(result)
    columns: Mapping[str, list[Any]] = {
        "id": [int(pair.id) if pair.id.isdecimal() else pair.id for pair in pairs],
        "subset": [pair.subset or pair.source for pair in pairs],
        "results": results,
        "scores_chosen": [_json_number(score.chosen) for score in rewards],
        "scores_rejected": [_json_number(score.rejected) for score in rewards],
        **{f"text_{side}": [_conversation(pair, pair.completion(side)) for pair in pairs] for side in SIDES},
    }
    return {
        "eval-set": facts | {name: sum(each) / len(each) for name, each in by_subset.items()},
        "eval-set-scores": {**facts, **columns},
    }


def _json_number(reward: float) -> float | None:
    return reward if math.isfinite(reward) else None


def _conversation(pair: PreferencePair, completion: str) -> list[dict[str, str]]:
    turns = [{"role": message.role, "content": message.content} for message in pair.prompt]
    return [*turns, {"role": "assistant", "content": completion}]
