"""The bottom line claims what the numbers show, and no more."""

import pytest

from critrm.report_data import read_report
from critrm.report_words import bottom_line, comparisons, most_telling
from report_study import made_pairs, made_study


def _report(folder, gains, grids=None, **options):
    return read_report(made_study(folder, gains=gains, grids=grids or {"all": {"sizes": [40]}}, **options))


def test_a_gain_and_a_harm_are_told_with_their_intervals(tmp_path):
    report = _report(tmp_path, {"good": 3.0, "bad": -3.0}, pairs=made_pairs(300))
    line = bottom_line(report)
    assert "Of 2 comparisons" in line
    assert "1 came out better, 1 worse, and 0 without" in line
    assert "Most is gained with good's critiques" in line
    assert "Most is lost with bad's critiques" in line
    assert "One seed" not in line
    assert most_telling(comparisons(report)).critic == "good"


def test_nothing_is_claimed_without_a_significant_difference(tmp_path):
    line = bottom_line(_report(tmp_path, {"same": 0.0}, pairs=made_pairs(40)))
    assert "make no difference that could be shown" in line
    assert "Most is" not in line
    assert "40 pairs: only large differences" in line


def test_what_a_critique_is_worth_is_the_best_that_was_shown(tmp_path):
    grids = {"all": {"sizes": [40, 400]}}
    line = bottom_line(_report(tmp_path, {"good": 0.7}, grids, pairs=made_pairs(400), seeds=(0,)))
    assert "What a critique is worth, over all pairs of rewardbench: with good's critiques, 40 pairs" in line
    assert "plain ones" in line
    assert "One seed was trained" in line


def test_of_arms_beyond_the_plain_curve_the_one_that_gains_most_is_told(tmp_path):
    grids = {"all": {"sizes": [40, 400]}}
    gains = {"good": 1.5, "best": 3.0}
    line = bottom_line(_report(tmp_path, gains, grids, pairs=made_pairs(400), seeds=(0,)))
    assert "What a critique is worth, over all pairs of rewardbench: with best's critiques, 40 pairs" in line


def test_without_several_sizes_no_worth_is_told(tmp_path):
    assert "was not measured" in bottom_line(_report(tmp_path, {"good": 2.0}))


def test_without_critics_only_the_accuracy_is_told(tmp_path):
    grids = {"plain": {"sizes": [40], "critics": []}}
    line = bottom_line(_report(tmp_path, {"unused": 1.0}, grids))
    assert line.startswith("After 40 training pairs ")
    assert line.endswith("so nothing is said about them.")


def test_a_null_baseline_that_is_not_beaten_is_told(tmp_path):
    report = _report(tmp_path, {"good": 2.0})
    arms = report.cells[0].tests["rewardbench"]["all"]
    null = {"mean": 0.99, "difference": {"value": -0.2, "p_value": 0.01}}
    arms["baselines"] = {"good": {"bag of words, critiques": null}}
    line = bottom_line(report)
    assert "A caution: rewardbench: good (" in line
    assert "does not beat bag of words, critiques (0.990, p 0.01)" in line


def test_p_values_are_adjusted_over_all_comparisons(tmp_path):
    found = comparisons(_report(tmp_path, {"a": 1.0, "b": 1.5, "c": 0.2}))
    assert len(found) == 3
    assert all(each.p_adjusted >= each.difference["p_value"] for each in found)
    assert any(each.p_adjusted > each.difference["p_value"] for each in found)
    assert found[0].plain == pytest.approx(found[1].plain)
