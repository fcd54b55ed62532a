"""LLMBar (Zeng et al., 2024): 419 pairs that test instruction following; four of the five subsets are adversarial.

Source: github.com/princeton-nlp/LLMBar, `Dataset/LLMBar`. RewardBench's Chat Hard contains the same pairs, under the names
`llmbar-natural` and `llmbar-adver-*`; both spellings are read here.
"""

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
