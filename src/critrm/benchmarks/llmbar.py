"""LLMBar (Zeng et al., 2024): 419 pairs that test instruction following; four of the five subsets are adversarial.

Source: github.com/princeton-nlp/LLMBar, `Dataset/LLMBar`. RewardBench's Chat Hard contains the same pairs, under the
names `llmbar-natural` and `llmbar-adver-*`; both spellings are read here.
"""

from dataclasses import replace
from pathlib import Path

from critrm.preferences import read_pairs
from critrm.types import PreferencePair

FOLDERS: dict[str, str] = {
    "natural": "Natural",
    "neighbor": "Adversarial/Neighbor",
    "gptinst": "Adversarial/GPTInst",
    "gptout": "Adversarial/GPTOut",
    "manual": "Adversarial/Manual",
}
"""Subset -> its folder in the release."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "Natural": ("natural",),
    "Adversarial": ("neighbor", "gptinst", "gptout", "manual"),
}

N_PAIRS: dict[str, int] = {"natural": 100, "neighbor": 134, "gptinst": 92, "gptout": 47, "manual": 46}
"""Pairs in each subset of the released data."""

HEADLINE = "accuracy on all pairs"


def subset_name(name: str) -> str:
    """The subset's name here, from any of its spellings: `llmbar-adver-GPTInst` -> `gptinst`."""
    return name.lower().removeprefix("llmbar-").removeprefix("adver-")


def load(folder: str | Path) -> tuple[PreferencePair, ...]:
    """Read the released data, whose subsets are told apart only by their folders.

    Args:
        folder: the release's `Dataset/LLMBar`, with `Natural` and `Adversarial/*`; files may be gzipped.

    Returns:
        The pairs with `subset` set, and ids such as `llmbar-natural-000`.

    Raises:
        DataError: a subset's file is missing or has a row that cannot be used.
    """
    pairs: list[PreferencePair] = []
    for subset, place in FOLDERS.items():
        path = Path(folder) / place / "dataset.json"
        if not path.exists() and path.with_suffix(".json.gz").exists():
            path = path.with_suffix(".json.gz")
        for number, pair in enumerate(read_pairs(path).pairs):
            pairs.append(
                replace(pair, id=f"llmbar-{subset}-{number:03d}", subset=subset, source="llmbar", split="test")
            )
    return tuple(pairs)
