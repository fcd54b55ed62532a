"""The benchmarks: for each, which subsets make up a section, how it is weighted, and the headline number."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from critrm.benchmarks import llmbar, pandalm, rewardbench
from critrm.errors import ConfigError, DataError
from critrm.metrics import section_scores, tally
from critrm.types import EvalResult, Outcome, PreferencePair, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark's tables."""

    title: str
    sections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: Mapping[str, int] | None = None
    """Weight of a subset in its section; the number of scored pairs when None."""
    n_pairs: Mapping[str, int] = field(default_factory=dict)
    """Pairs in each subset of the whole benchmark; anything else is called partial. Empty where any pairs will do."""
    headline: str = "accuracy on all pairs"
    averages_sections: bool = False
    """Whether the headline is the plain mean of the sections, not the accuracy on all pairs."""
    subset_name: Callable[[str], str] = str
    """From the spellings of a subset in the field to the one in these tables."""

    def subset_of(self, pair: PreferencePair) -> str:
        """The subset that a pair is counted in: its own, else its source."""
        return self.subset_name(pair.subset or pair.source) or "all"


BENCHMARKS: dict[str, Benchmark] = {
    "pairs": Benchmark(title="Pairs"),
    "llmbar": Benchmark(
        title="LLMBar",
        sections=llmbar.SECTIONS,
        n_pairs=llmbar.N_PAIRS,
        headline=llmbar.HEADLINE,
        subset_name=llmbar.subset_name,
    ),
    "pandalm": Benchmark(title="PandaLM", headline=pandalm.HEADLINE),
    "rewardbench": Benchmark(
        title="RewardBench",
        sections=rewardbench.SECTIONS,
        weights=rewardbench.EXAMPLE_COUNTS,
        n_pairs=rewardbench.N_PAIRS,
        headline=rewardbench.HEADLINE,
        averages_sections=True,
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ConfigError: there is none; names those there are.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark {name!r}; there is {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def summarise(
    pairs: Sequence[PreferencePair], scores: Sequence[Score], *, benchmark: str = "pairs", model: str, critic: str
) -> EvalResult:
    """Count outcomes by subset and section, and name the headline number (section 4.1).

    A pair without a score is unscored. A benchmark that lacks pairs is called partial; its headline says which.

    Args:
        pairs: the benchmark's pairs.
        scores: at most one per pair, in any order.
        benchmark: whose tables to use.
        model: the reward model's name, for the record.
        critic: whose critiques it read, for the record.

    Raises:
        ConfigError: no such benchmark.
        DataError: ids are repeated, scores are of other pairs, or no pair belongs to the benchmark.
    """
    table = find_benchmark(benchmark)
    by_subset = {name: tally(outcomes) for name, outcomes in _outcomes(pairs, scores, table).items()}
    if pairs and table.n_pairs and not table.n_pairs.keys() & by_subset.keys():
        raise DataError(
            f"no pair is of {table.title}: these are {', '.join(by_subset)}, its subsets {', '.join(table.n_pairs)}",
            field="subset",
        )
    overall = tally(_by_pair(pairs, scores).values())
    sections = section_scores(by_subset, table.sections, weights=table.weights)
    if table.averages_sections:
        value = sum(sections.values()) / len(sections) if sections else None
    else:
        value = overall.accuracy.value if overall.accuracy else None
    lacks = _lacks(pairs, table)
    return EvalResult(
        benchmark=f"{table.title} (partial)" if lacks else table.title,
        model=model,
        critic=critic,
        overall=overall,
        subsets=by_subset,
        sections=sections,
        headline="; ".join([table.headline, *lacks]),
        headline_value=value,
    )


def _by_pair(pairs: Sequence[PreferencePair], scores: Sequence[Score]) -> dict[str, Outcome]:
    """Pair id -> outcome, in the order of the pairs."""
    for kind, ids in (("pairs", [pair.id for pair in pairs]), ("scores", [score.pair_id for score in scores])):
        repeated = [each for each, count in Counter(ids).items() if count > 1]
        if repeated:
            raise DataError(f"two {kind} have the id {repeated[0]!r}; ids must be unique", field="id")
    outcomes = {pair.id: Outcome.UNSCORED for pair in pairs}
    for score in scores:
        if score.pair_id not in outcomes:
            raise DataError(f"a score of {score.pair_id!r}, which is none of the pairs", field="pair_id")
        outcomes[score.pair_id] = score.outcome
    return outcomes


def _outcomes(pairs: Sequence[PreferencePair], scores: Sequence[Score], table: Benchmark) -> dict[str, list[Outcome]]:
    """Subset -> outcomes; the table's subsets first and in its order."""
    by_pair = _by_pair(pairs, scores)
    found: dict[str, list[Outcome]] = {name: [] for name in table.n_pairs}
    for pair in pairs:
        found.setdefault(table.subset_of(pair), []).append(by_pair[pair.id])
    return {name: outcomes for name, outcomes in found.items() if outcomes}


def _lacks(pairs: Sequence[PreferencePair], table: Benchmark) -> list[str]:
    """What keeps these pairs from being the whole benchmark, in words."""
    counts = Counter(table.subset_of(pair) for pair in pairs)
    missing = [name for name in table.n_pairs if not counts[name]]
    uneven = [f"{name} {counts[name]} of {n}" for name, n in table.n_pairs.items() if counts[name] not in (0, n)]
    other = [name for name in counts if name not in table.n_pairs] if table.n_pairs else []
    titled = (("missing", missing), ("incomplete", uneven), ("not in the benchmark", other))
    return [f"{title}: {', '.join(names)}" for title, names in titled if names]
