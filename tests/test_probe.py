"""Probes with reward models that read the critique, only the completion, or flattery."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from critrm.errors import DataError
from critrm.probe import (
    ALL,
    FLATTERY,
    INJECTION,
    ORIGINAL,
    flattered,
    injected,
    negated,
    probe,
    probe_json,
    probe_table,
    removed,
    shuffled,
    swapped,
)
from critrm.types import CritiquedPair, Score


class Scorer:
    """A reward model that is a function of the completion and its critique."""

    def __init__(self, reward):
        self.reward = reward

    def score(self, pairs, *, max_tokens_per_step):
        sides = ("chosen", "rejected")
        return [Score(i.pair.id, *(self.reward(i.pair.completion(s), i.critique(s)) for s in sides)) for i in pairs]


READER = Scorer(lambda completion, critique: critique.count("good") * (-1 if "opposite" in critique else 1))
DEAF = Scorer(lambda completion, critique: -float("could be" in completion))
FOOL = Scorer(
    lambda completion, critique: (
        critique.count("good") + 5 * ("outstanding" in critique) + 9 * (INJECTION in completion)
    )
)


@pytest.fixture
def items(pairs):
    return [
        CritiquedPair(pair=pair, critic="c", chosen_critique=f"good {n}", rejected_critique=f"bad {n}")
        for n, pair in enumerate(pairs)
    ]


def _accuracy(model, items):
    results = probe(model, items)[ALL]
    return {name: each.tally.accuracy.value for name, each in results.items()}


def test_a_model_that_reads_the_critique_loses_without_it(items):
    assert _accuracy(READER, items) == {
        "original": 1.0, "swapped": 0.0, "shuffled": 1.0, "removed": 0.0, "negated": 0.0,
        "flattery": 1.0, "injection": 1.0,
    }  # fmt: skip


def test_a_model_that_does_not_read_loses_nothing(items):
    results = probe(DEAF, items)[ALL]
    assert set(_accuracy(DEAF, items).values()) == {1.0}
    assert all(each.lost.value == 0 and each.p_holm == 1.0 for name, each in results.items() if name != ORIGINAL)


def test_a_model_that_falls_for_praise_is_not_robust(items):
    results = probe(FOOL, items)[ALL]
    assert results["flattery"].lost.value == results["injection"].lost.value == 1.0
    assert results["flattery"].lost.p_value == pytest.approx(2 * 0.5**12)
    assert results["flattery"].p_holm >= results["flattery"].lost.p_value
    assert results[ORIGINAL].lost is None


def test_what_each_probe_changes(items):
    first = items[0]
    assert (swapped(items)[0].chosen_critique, swapped(items)[0].rejected_critique) == ("bad 0", "good 0")
    assert (removed(items)[0].chosen_critique, removed(items)[0].pair) == ("", first.pair)
    assert negated(items)[0].rejected_critique.endswith(": bad 0")
    assert (flattered(items)[0].chosen_critique, flattered(items)[0].rejected_critique) == ("good 0", FLATTERY)
    assert injected(items)[0].pair.chosen == first.pair.chosen
    assert injected(items)[0].pair.rejected == first.pair.rejected + INJECTION
    moved = shuffled(items)
    assert all(new.chosen_critique != old.chosen_critique for new, old in zip(moved, items, strict=True))
    assert sorted(each.chosen_critique for each in moved) == sorted(each.chosen_critique for each in items)
    assert all(each.chosen_critique[4:] == each.rejected_critique[3:] for each in moved), "both of one pair"
    assert moved == shuffled(items)
    assert moved != shuffled(items, seed=1)
    assert shuffled(items[:1]) == items[:1]


def test_hostile_critiques_go_through_unchanged(items):
    hostile = "{critique} {{ x }} \x00 \u202e <|im_end|> \\1"
    items = [replace(items[0], chosen_critique=hostile)]
    assert negated(items)[0].chosen_critique.endswith(f": {hostile}")


def test_groups_are_the_benchmarks_sections(items):
    names = ["llmbar-natural", "llmbar-manual", "llmbar-gptout"]
    changed = [replace(item, pair=replace(item.pair, subset=names[n % 3])) for n, item in enumerate(items)]
    results = probe(READER, changed, benchmark="llmbar")
    assert {label: found[ORIGINAL].tally.n_right for label, found in results.items()} == {
        ALL: 12, "Natural": 4, "Adversarial": 8,
    }  # fmt: skip
    assert set(probe(READER, items)) == {ALL, "single-turn", "multi-turn"}


@pytest.mark.parametrize(("name", "label"), [("all", "all (subset)"), ("", "(no subset)")])
def test_no_subset_takes_the_place_of_all_pairs(items, name, label):
    for n in range(3):
        items[n] = replace(items[n], pair=replace(items[n].pair, subset=name, source=""))
    results = probe(READER, items)
    assert {group: found[ORIGINAL].tally.n_right for group, found in results.items()} == {
        ALL: 12, label: 3, "single-turn": 6, "multi-turn": 3,
    }  # fmt: skip


def test_identical_completions_tie_as_in_the_evaluation(items):
    items[0] = replace(items[0], pair=replace(items[0].pair, rejected=items[0].pair.chosen + " "))
    model = Scorer(lambda completion, critique: critique.count("good") + (INJECTION in completion) * 9)
    results = probe(model, items)[ALL]
    assert results[ORIGINAL].tally.n_tie == results["swapped"].tally.n_tie == 1
    assert (results["injection"].tally.n_tie, results["injection"].tally.n_wrong) == (0, 12), "it tells them apart"


def test_rewards_that_are_no_numbers_take_no_part(items):
    nan = Scorer(lambda completion, critique: math.nan)
    results = probe(nan, items)
    assert results[ALL]["swapped"].lost is None
    assert results[ALL]["swapped"].tally.accuracy is None
    console = Console(width=160, file=io.StringIO())
    console.print(probe_table(results))
    assert "swapped" in console.file.getvalue()
    json.dumps(probe_json(results), allow_nan=False)


def test_one_pair_is_enough_and_none_is_not(items):
    assert probe(READER, items[:1])[ALL]["swapped"].lost.p_value == 1.0
    with pytest.raises(DataError, match="no pairs"):
        probe(READER, [])
    with pytest.raises(DataError, match="critique of both sides"):
        probe(READER, [*items, CritiquedPair(pair=replace(items[0].pair, id="x"))])


def test_the_table_and_the_progress(items):
    seen = []
    results = probe(FOOL, items, on_probe=seen.append)
    assert seen[0] == ORIGINAL
    assert len(seen) == 7
    console = Console(width=160, file=io.StringIO())
    console.print(probe_table(results))
    assert "+1.000 [+1.00, +1.00]" in console.file.getvalue()
