"""Arms side by side: groups, paired differences, tables."""

import io
import math

import pytest
from rich.console import Console

from critrm.errors import DataError
from critrm.results import ALL, compare_arms, costs_table, results_markdown, results_table
from critrm.types import NO_CRITIC, Message, PreferencePair, Score


def _pairs(subsets):
    return [
        PreferencePair(id=f"p{n}", prompt=(Message("user", "q"),), chosen="a", rejected="b", subset=subset)
        for n, subset in enumerate(subsets)
    ]


def _scores(pairs, right):
    return [Score(pair.id, 1.0 if n in right else 0.0, 0.5) for n, pair in enumerate(pairs)]


def test_the_difference_is_paired_and_strict():
    pairs = _pairs(["x"] * 5 + ["y"] * 5)
    arms = {NO_CRITIC: [_scores(pairs, {0, 1})], "c": [_scores(pairs, {0, 1, 2, 3, 4, 5, 6, 7})]}
    groups = compare_arms(pairs, arms)
    assert {label: group["n"] for label, group in groups.items()} == {ALL: 10, "x": 5, "y": 5}
    found = groups[ALL]["arms"]["c"]
    assert found["mean"] == pytest.approx(0.8)
    assert found["difference"]["value"] == pytest.approx(0.6)
    assert found["difference"]["p_value"] == pytest.approx(2 * 0.5**6)
    assert groups["x"]["arms"]["c"]["difference"]["p_holm"] >= groups["x"]["arms"]["c"]["difference"]["p_value"]
    assert groups[ALL]["arms"][NO_CRITIC]["difference"] is None


def test_ties_are_not_right_and_nan_is_unscored():
    pairs = _pairs(["x", "x"])
    scores = [Score("p0", 0.5, 0.5), Score("p1", math.nan, 0.0)]
    arm = compare_arms(pairs, {NO_CRITIC: [scores]})[ALL]["arms"][NO_CRITIC]
    assert (arm["mean"], arm["n_tie"], arm["n_unscored"]) == (0.0, 1, 1)


def test_sections_of_a_benchmark_are_groups_over_their_items():
    pairs = _pairs(["llmbar-natural"] + ["llmbar-neighbor"] * 2 + ["llmbar-manual"])
    groups = compare_arms(pairs, {NO_CRITIC: [_scores(pairs, {0, 1})]}, benchmark="llmbar")
    assert groups["Adversarial"]["n"] == 3
    assert groups["Adversarial"]["arms"][NO_CRITIC]["mean"] == pytest.approx(1 / 3)
    assert "Natural" not in groups, "a section of one subset would repeat that subset"


def test_seeds_give_a_spread():
    pairs = _pairs(["x"] * 4)
    arms = {NO_CRITIC: [_scores(pairs, {0}), _scores(pairs, {0, 1, 2})], "c": [_scores(pairs, {0, 1, 2, 3})] * 2}
    arm = compare_arms(pairs, arms)[ALL]["arms"][NO_CRITIC]
    assert arm["by_seed"] == [0.25, 0.75]
    assert arm["std"] == pytest.approx(0.5 / math.sqrt(2))


def test_scores_that_lack_a_pair_are_refused():
    pairs = _pairs(["x", "x"])
    with pytest.raises(DataError, match="lack 1 pairs, such as 'p1'"):
        compare_arms(pairs, {NO_CRITIC: [_scores(pairs, {0})[:1]]})


def test_tables_show_every_arm_and_group():
    pairs = _pairs(["x", "y"])
    arms = {NO_CRITIC: [_scores(pairs, {0})], "c": [_scores(pairs, {0, 1})]}
    results = {
        "n_train": 7,
        "seeds": [0],
        "backbone": "b",
        "learning_rates": {NO_CRITIC: 8e-5, "c": 5e-5},
        "tests": {"mini": compare_arms(pairs, arms)},
        "seconds": {"critique c": 12.0, "train c": 30.0},
        "tokens": {NO_CRITIC: {"critic_read": 0, "critic_wrote": 0, "train": 10},
                   "c": {"critic_read": 1234, "critic_wrote": 56, "train": 789}},
    }  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(results_table(results))
    console.print(costs_table(results))
    text = console.export_text()
    for expected in ("no critiques", "0.500 [", "1,234", "7 training pairs"):
        assert expected in text
    markdown = results_markdown(results)
    assert markdown.count("\n| mini |") == 1
    assert "+0.500 [" in markdown
    assert "c 5e-05" in markdown
