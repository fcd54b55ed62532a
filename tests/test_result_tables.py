"""What a run's tables show, in the terminal and in Markdown."""

import io

import pytest
from rich.console import Console

from critrm.baselines import CRITIQUES_ONLY, LEAKED, LONGER, OWN_SCORE, UNTRAINED_WHOLE
from critrm.result_tables import (
    baselines_table,
    blends_table,
    costs_table,
    ensembles_table,
    results_markdown,
    results_table,
)
from critrm.results import ALL_SEEDS, compare_arms
from critrm.types import NO_CRITIC, Message, Outcome, PreferencePair, Score


def _pairs(n):
    return [
        PreferencePair(id=f"p{i}", prompt=(Message("user", "q"),), chosen="a", rejected="b", subset="xy"[i % 2])
        for i in range(n)
    ]


def _scores(pairs, n_right):
    return [Score(pair.id, 1.0 if i < n_right else 0.0, 0.5) for i, pair in enumerate(pairs)]


def _outcomes(n, n_right):
    return [Outcome.RIGHT if i < n_right else Outcome.WRONG for i in range(n)]


@pytest.fixture
def results():
    pairs = _pairs(40)
    arms = {NO_CRITIC: [_scores(pairs, 10)], "c[/x]": [_scores(pairs, 22)]}
    nulls = {
        NO_CRITIC: {LONGER: _outcomes(40, 5)},
        "c[/x]": {
            LONGER: _outcomes(40, 5),
            CRITIQUES_ONLY: _outcomes(40, 30),
            LEAKED: [Outcome.UNSCORED] * 40,
        },
    }
    blends = {UNTRAINED_WHOLE: {}, OWN_SCORE: {"c[/x]": [_scores(pairs, 30)]}}
    return {
        "n_train": 7,
        "seeds": [0],
        "backbone": "b",
        "learning_rates": {NO_CRITIC: 8e-5, "c[/x]": 5e-5},
        "tests": {"mini": compare_arms(pairs, arms, baselines=nulls, blends=blends)},
        "seconds": {"critique c[/x]": 12.0, "train c[/x]": 30.0},
        "tokens": {"c[/x]": {"critic_read": 1234, "critic_wrote": 56, "train": 789}},
    }


def shown(table, *, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_every_arm_and_group_is_shown(results):
    text = shown(results_table(results))
    for expected in ("no critiques", "c[/x]", "0.250 [", "0.550 [", "7 training pairs, 1 seed;"):
        assert expected in text
    assert LONGER not in text, "null baselines have a table of their own"


def test_numbers_stay_whole_on_a_narrow_terminal(results):
    for table in (results_table(results), baselines_table(results)):
        assert "[.40, .69]" in shown(table, width=80) or "[.60, .86]" in shown(table, width=80)


def test_null_baselines_are_shown_with_the_notes_and_those_that_never_apply_are_not(results):
    text = " ".join(shown(baselines_table(results)).split())
    assert LONGER in text and "0.125 [" in text and "0.750 [.60, .86]" in text
    assert LEAKED not in text
    assert f"mini: c[/x] (0.550) does not beat {CRITIQUES_ONLY} (0.750, p" in text


def test_without_baselines_there_is_no_table(results):
    groups = {label: {**group, "baselines": {}} for label, group in results["tests"]["mini"].items()}
    assert baselines_table(results | {"tests": {"mini": groups}}) is None
    assert "null" not in results_markdown(results | {"tests": {"mini": groups}}).lower()


def test_a_blend_is_shown_with_its_reading_where_there_is_one(results):
    text = " ".join(shown(blends_table(results)).split())
    assert f"mini, 40 pairs, with {OWN_SCORE}" in text and "c[/x] 0.750 [.60, .86] +0.200 [" in text
    assert UNTRAINED_WHOLE not in text, "nothing was blended with it"
    without = {label: {**group, "blends": {OWN_SCORE: {}}} for label, group in results["tests"]["mini"].items()}
    assert blends_table(results | {"tests": {"mini": without}}) is None


def test_an_ensemble_is_shown_where_there_are_seeds(results):
    assert ensembles_table(results) is None
    pairs = _pairs(40)
    arms = {NO_CRITIC: _scores(pairs, 10), "c[/x]": _scores(pairs, 22)}
    groups = compare_arms(pairs, {critic: [scores] for critic, scores in arms.items()}, ensembles={ALL_SEEDS: arms})
    seeded = results | {"tests": {"mini": groups}}
    text = " ".join(shown(ensembles_table(seeded)).split())
    assert f"mini, 40 pairs, with {ALL_SEEDS}" in text and "c[/x] 0.550 [.40, .69] +0.300 [" in text
    assert f"| {ALL_SEEDS} |  |" in results_markdown(seeded)


def test_what_it_took(results):
    text = shown(costs_table(results))
    assert "1,234" in text and "789" in text


def test_markdown_has_both_tables(results):
    markdown = results_markdown(results)
    assert markdown.count("| mini |") == 2
    assert (
        f"| {OWN_SCORE} |  |" in markdown and "&nbsp;&nbsp;mini | - | - | - | 0.750 [.60, .86] | +0.200 [" in markdown
    )
    assert "+0.300 [" in markdown, "the arm against no critiques"
    assert f"&nbsp;&nbsp;{CRITIQUES_ONLY} | - | - | - | 0.750 [.60, .86] | -0.200 [" in markdown
    assert f"- mini: c[/x] (0.550) does not beat {CRITIQUES_ONLY}" in markdown
    assert "c[/x] 5e-05" in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
