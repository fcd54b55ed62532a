"""The benchmarks: for each, which subsets make up a section, how it is weighted, and the headline number."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from critrm.benchmarks import best_of_n, judgebench, llmbar, pandalm, rewardbench, rewardbench2, rmbench
from critrm.config import PairSource, data_path
from critrm.errors import ConfigError, DataError
from critrm.list_dialects import RMB_LISTS
from critrm.metrics import section_scores, tally
from critrm.preferences import PairSet, read_pairs
from critrm.types import EvalResult, Outcome, PreferencePair, Score

NO_SUBSET = "(no subset)"
"""The subset of pairs that name neither a subset nor a source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark's tables."""

    title: str
    sections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: Mapping[str, int] | None = None
    """Weight of a subset in its section; the number of scored pairs when None."""
    n_pairs: Mapping[str, int] = field(default_factory=dict)
    """Pairs (or lists) in each subset of the whole benchmark; anything else is called partial. Empty: any will do."""
    headline: str | Callable[[Sequence[PreferencePair]], str] = "accuracy on all pairs"
    averages_sections: bool = False
    """Whether the headline is the plain mean of the sections, not the accuracy on all pairs."""
    counts_lists: bool = False
    """Whether what is counted is a list (`best_of_n`), of which each pair is a part."""
    extra_sections: Callable[[Sequence[PreferencePair], Mapping[str, Score]], dict[str, float]] | None = None
    """Scores with a formula of their own; one of a section's name takes the section's place."""
    subset_name: Callable[[str], str] = str
    """From the spellings of a subset in the field to the one in these tables."""

    def subset_of(self, pair: PreferencePair) -> str:
        """The subset that a pair is counted in: its own, else its source."""
        return self.subset_name(pair.subset or pair.source) or NO_SUBSET


BENCHMARKS: dict[str, Benchmark] = {
    "pairs": Benchmark(title="Pairs"),
    "llmbar": Benchmark(
        title="LLMBar",
        sections=llmbar.SECTIONS,
        n_pairs=llmbar.N_PAIRS,
        headline=llmbar.HEADLINE,
        subset_name=llmbar.subset_name,
    ),
    "pandalm": Benchmark(title="PandaLM", headline=pandalm.headline),
    "rewardbench": Benchmark(
        title="RewardBench",
        sections=rewardbench.SECTIONS,
        weights=rewardbench.EXAMPLE_COUNTS,
        n_pairs=rewardbench.N_PAIRS,
        headline=rewardbench.HEADLINE,
        averages_sections=True,
    ),
    "rewardbench2": Benchmark(
        title="RewardBench 2",
        sections=rewardbench2.SECTIONS,
        n_pairs=rewardbench2.N_LISTS,
        headline=rewardbench2.HEADLINE,
        averages_sections=True,
        counts_lists=True,
        extra_sections=rewardbench2.extra_sections,
    ),
    "rmbench": Benchmark(
        title="RM-Bench",
        sections=rmbench.SECTIONS,
        weights=rmbench.WEIGHTS,
        n_pairs=rmbench.N_PAIRS,
        headline=rmbench.HEADLINE,
        averages_sections=True,
        extra_sections=rmbench.extra_sections,
    ),
    "judgebench": Benchmark(
        title="JudgeBench",
        sections=judgebench.SECTIONS,
        n_pairs=judgebench.N_PAIRS,
        headline=judgebench.HEADLINE,
        subset_name=judgebench.subset_name,
    ),
    "best-of-n": Benchmark(title="Best of n", headline=best_of_n.HEADLINE, counts_lists=True),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ConfigError: there is none; names those there are.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark {name!r}; there is {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read_benchmark(path: str | Path, *, benchmark: str, **options: Any) -> PairSet:
    """Read pairs to be evaluated by a benchmark, as `read_pairs` does and with its options.

    Empty completions and identical pairs are kept, since published counts hold them, except for `pairs`. Where lists
    are counted, RMB's pairs are read as its lists.
    """
    options["allow_empty"] = benchmark != "pairs"
    if find_benchmark(benchmark).counts_lists and read_pairs(path, **options | {"limit": 1}).dialect == "rmb":
        options["dialect"] = RMB_LISTS
    return read_pairs(path, **options)


def read_source(source: PairSource, *, for_training: bool = False) -> PairSet:
    """Read the pairs that a recipe names.

    Args:
        source: which pairs.
        for_training: they are no benchmark's, and have to be usable.

    Raises:
        DataError: a row cannot be used; names file, line and field. Or no pair is left.
        ConfigError: a variable in the path is not set, or there is no such dialect or benchmark.
    """
    options = {name: getattr(source, name) for name in ("dialect", "split", "source", "subset", "limit", "skip_bad")}
    path = str(data_path(source.path))
    found = read_benchmark(path, benchmark="pairs" if for_training else source.benchmark, **options)
    return replace(found, pairs=tuple(replace(pair, id=source.id_prefix + pair.id) for pair in found.pairs))


def summarise(
    pairs: Sequence[PreferencePair], scores: Sequence[Score], *, benchmark: str = "pairs", model: str, critic: str
) -> EvalResult:
    """Count outcomes by subset and section, and name the headline number (section 4.1).

    A pair without a score is unscored. A benchmark that lacks pairs is called partial; its headline says which.

    Args:
        pairs: the benchmark's pairs. Where lists are counted, also those that could not be scored: a list that lacks a
            completion is easier.
        scores: at most one per pair, in any order.
        benchmark: whose tables to use.
        model: the reward model's name, for the record.
        critic: whose critiques it read, for the record.

    Raises:
        ConfigError: no such benchmark.
        DataError: ids are repeated, scores are of other pairs, or no pair belongs to the benchmark.
    """
    table = find_benchmark(benchmark)
    found = _by_id(pairs, scores)
    groups, outcomes = _items(pairs, found, table)
    by_subset = {name: tally(outcomes[item] for item in items) for name, items in groups.items()}
    if pairs and table.n_pairs and not table.n_pairs.keys() & by_subset.keys():
        raise DataError(
            f"no pair is of {table.title}: these are {', '.join(by_subset)}, its subsets {', '.join(table.n_pairs)}",
            field="subset",
        )
    overall = tally(outcomes.values())
    sections = section_scores(by_subset, table.sections, weights=table.weights)
    if table.extra_sections and any(outcome is not Outcome.UNSCORED for outcome in outcomes.values()):
        sections |= table.extra_sections(pairs, found)
    if table.averages_sections:
        averaged = [value for name, value in sections.items() if name in table.sections]
        value = sum(averaged) / len(averaged) if averaged else None
    else:
        value = overall.accuracy.value if overall.accuracy else None
    lacks = _lacks({name: len(items) for name, items in groups.items()}, table)
    headline = table.headline if isinstance(table.headline, str) else table.headline(pairs)
    return EvalResult(
        benchmark=f"{table.title} (partial)" if lacks else table.title,
        model=model,
        critic=critic,
        overall=overall,
        subsets=by_subset,
        sections=sections,
        headline="; ".join([headline, *lacks]),
        headline_value=value,
    )


def level_identical(pairs: Sequence[PreferencePair], scores: Sequence[Score]) -> list[Score]:
    """The scores, with equal rewards where both completions are the same text: a tie, whatever the rounding."""
    same = {pair.id for pair in pairs if pair.chosen.strip() == pair.rejected.strip()}
    return [Score(each.pair_id, each.chosen, each.chosen) if each.pair_id in same else each for each in scores]


def _by_id(pairs: Sequence[PreferencePair], scores: Sequence[Score]) -> dict[str, Score]:
    """Pair id -> its score, where it has one."""
    for kind, ids in (("pairs", [pair.id for pair in pairs]), ("scores", [score.pair_id for score in scores])):
        repeated = [each for each, count in Counter(ids).items() if count > 1]
        if repeated:
            raise DataError(f"two {kind} have the id {repeated[0]!r}; ids must be unique", field="id")
    known = {pair.id for pair in pairs}
    for score in scores:
        if score.pair_id not in known:
            raise DataError(f"a score of {score.pair_id!r}, which is none of the pairs", field="pair_id")
    return {score.pair_id: score for score in scores}


def _items(
    pairs: Sequence[PreferencePair], scores: Mapping[str, Score], table: Benchmark
) -> tuple[dict[str, list[str]], dict[str, Outcome]]:
    """Subset -> what is counted in it (pairs or lists), the table's subsets first; and the outcome of each."""
    groups: dict[str, dict[str, None]] = {name: {} for name in table.n_pairs}
    for pair in pairs:
        item = best_of_n.list_id(pair.id) if table.counts_lists else pair.id
        groups.setdefault(table.subset_of(pair), {})[item] = None
    if table.counts_lists:
        lists = best_of_n.by_list(pairs, scores)
        outcomes = {name: best_of_n.list_score(name, found).outcome for name, found in lists.items()}
    else:
        outcomes = {pair.id: scores[pair.id].outcome if pair.id in scores else Outcome.UNSCORED for pair in pairs}
    return {name: list(items) for name, items in groups.items() if items}, outcomes


def _lacks(counts: Mapping[str, int], table: Benchmark) -> list[str]:
    """What keeps these pairs from being the whole benchmark, in words."""
    missing = [name for name in table.n_pairs if name not in counts]
    uneven = [f"{name} {counts[name]} of {n}" for name, n in table.n_pairs.items() if counts.get(name, n) != n]
    other = [name for name in counts if name not in table.n_pairs] if table.n_pairs else []
    titled = (("missing", missing), ("incomplete", uneven), ("not in the benchmark", other))
    return [f"{title}: {', '.join(names)}" for title, names in titled if names]
