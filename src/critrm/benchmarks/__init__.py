"""The benchmarks: for each, which subsets make up a section, and how a section is weighted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from critrm.benchmarks import llmbar, rewardbench


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark's tables."""

    title: str
    sections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: Mapping[str, int] | None = None
    """Weight of a subset in its section; the number of scored pairs when None."""
    headline: str = "accuracy on all pairs"
    subset_name: Callable[[str], str] = str


BENCHMARKS: dict[str, Benchmark] = {
    "pairs": Benchmark(title="Pairs"),
    "llmbar": Benchmark(
        title="LLMBar", sections=llmbar.SECTIONS, headline=llmbar.HEADLINE, subset_name=llmbar.subset_name
    ),
    "rewardbench": Benchmark(
        title="RewardBench",
        sections=rewardbench.SECTIONS,
        weights=rewardbench.EXAMPLE_COUNTS,
        headline=rewardbench.HEADLINE,
    ),
}
