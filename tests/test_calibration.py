"""Reliability, temperature and length bias: known cases, and nothing to count."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.calibration import calibrate, length_bias
from critrm.types import Message, PreferencePair, Score

PROMPT = (Message("user", "q"),)


def _scores(differences):
    return [Score(str(n), difference, 0.0) for n, difference in enumerate(differences)]


def _drawn(n, scale, *, seed=0):
    """Rewards under which the chosen completion wins as often as sigmoid(difference / scale) says."""
    rng = np.random.default_rng(seed)
    size = rng.exponential(2.0, n)
    right = rng.random(n) < 1 / (1 + np.exp(-size))
    return _scores((scale * np.where(right, size, -size)).tolist())


def test_a_model_whose_differences_mean_what_they_say_is_calibrated():
    found = calibrate(_drawn(4000, 1.0))
    assert found.ece < 0.03
    assert found.temperature == pytest.approx(1.0, abs=0.1)
    assert [each.n for each in found.bins] == [400] * 10, "bins hold equal numbers of pairs"
    assert [each.confidence for each in found.bins] == sorted(each.confidence for each in found.bins)


def test_a_model_that_is_too_sure_has_a_high_temperature_and_dividing_by_it_helps():
    found = calibrate(_drawn(4000, 3.0))
    assert found.temperature == pytest.approx(3.0, abs=0.3)
    assert found.ece > 0.08
    assert found.ece_scaled < 0.03


def test_the_error_after_scaling_is_no_bound():
    found = calibrate(_scores([0.1, 2.2, 0.1, 0.6, 2.6, 1.9, 3.7, -1.8]), n_bins=2)
    assert found.temperature is not None
    assert found.ece_scaled > found.ece


def test_bins_by_hand():
    found = calibrate(_scores([0.0, 0.0, 100.0, -100.0]), n_bins=2)
    assert [(each.n, each.confidence, each.accuracy) for each in found.bins] == [(2, 0.5, 0.5), (2, 1.0, 0.5)]
    assert found.ece == pytest.approx(0.25)


@pytest.mark.parametrize("scores", [[], [Score("a", math.nan, 0.0)], [Score("a", 0.0, math.nan)] * 3])
def test_nothing_scored_has_no_calibration(scores):
    assert calibrate(scores) is None


def test_all_ties_are_perfectly_unsure_and_have_no_temperature():
    found = calibrate(_scores([0.0] * 5))
    assert (found.ece, found.temperature, found.ece_scaled) == (0.0, None, None)


@pytest.mark.parametrize("differences", [[1.0, 2.0], [-1.0, -2.0], [1.0, -1.0], [3.0]])
def test_without_a_best_temperature_there_is_none(differences):
    assert calibrate(_scores(differences)).temperature is None


def test_infinite_rewards_are_as_sure_as_can_be():
    found = calibrate([Score("a", math.inf, 0.0), Score("b", -math.inf, 0.0), Score("c", math.inf, math.inf)])
    assert found.n == 3
    assert math.isfinite(found.ece)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_every_pair_is_in_one_bin_and_errors_are_shares(differences, n_bins):
    found = calibrate(_scores(differences), n_bins=n_bins)
    assert sum(each.n for each in found.bins) == found.n == len(differences)
    assert 0 <= found.ece <= 1
    assert all(0.5 <= each.confidence <= 1 for each in found.bins)


def _pairs(lengths):
    return [
        PreferencePair(id=str(n), prompt=PROMPT, chosen="x" * chosen, rejected="x" * rejected)
        for n, (chosen, rejected) in enumerate(lengths)
    ]


def test_rewards_that_are_lengths_are_found_out():
    lengths = [(10, 50), (60, 20), (30, 31), (90, 10), (5, 25)]
    scores = {str(n): Score(str(n), float(chosen), float(rejected)) for n, (chosen, rejected) in enumerate(lengths)}
    found = length_bias(_pairs(lengths), scores)
    assert found.correlation == pytest.approx(1.0)
    assert (found.matched.n_right, found.matched.n_wrong) == (0, 1)
    assert (found.chosen_longer.n_right, found.chosen_longer.n_wrong) == (2, 0)
    assert (found.chosen_shorter.n_right, found.chosen_shorter.n_wrong) == (0, 2)
    against = {name: Score(name, each.rejected, each.chosen) for name, each in scores.items()}
    assert length_bias(_pairs(lengths), against).correlation == pytest.approx(-1.0)


def test_no_correlation_where_there_is_nothing_to_correlate():
    lengths = [(4, 4), (7, 7), (9, 9), (0, 0)]
    scores = {str(n): Score(str(n), float(n), 0.0) for n in range(4)}
    found = length_bias(_pairs(lengths), scores)
    assert found.correlation is None
    assert found.matched.n_right == 3
    assert found.chosen_longer.accuracy is None
    assert length_bias([], {}).correlation is None
    nan = {name: Score(name, math.nan, 0.0) for name in scores}
    assert length_bias(_pairs(lengths), nan).matched.accuracy is None
