"""JudgeBench (Tan et al., 2025): pairs of which exactly one response is objectively correct.

Source: github.com/ScalerLab/JudgeBench, `data/`, or the hub's ScalerLab/JudgeBench. The 350 pairs of GPT-4o are the
benchmark whose numbers are published; the 270 of Claude 3.5 Sonnet are a second set (`source` holds the model).
"""

N_PAIRS: dict[str, int] = {"mmlu-pro": 154, "livebench-reasoning": 98, "livebench-math": 56, "livecodebench": 42}
"""Pairs in each subset of the GPT-4o set."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "Knowledge": ("mmlu-pro",),
    "Reasoning": ("livebench-reasoning",),
    "Math": ("livebench-math",),
    "Coding": ("livecodebench",),
}

HEADLINE = "accuracy on all pairs"


def subset_name(name: str) -> str:
    """The subset's name here; MMLU-Pro's come with their discipline: `mmlu-pro-law` -> `mmlu-pro`."""
    return "mmlu-pro" if name.startswith("mmlu-pro") else name
