"""Known values, and properties that hold for any outcomes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from critrm.errors import DataError
from critrm.metrics import (
    correctness,
    half_credit,
    holm,
    n_scored,
    paired_difference,
    section_scores,
    seed_spread,
    tally,
)
from critrm.types import Outcome

RIGHT, WRONG, TIE, UNSCORED = Outcome.RIGHT, Outcome.WRONG, Outcome.TIE, Outcome.UNSCORED
OUTCOMES = st.lists(st.sampled_from(list(Outcome)), max_size=60)
unhurried = settings(max_examples=40, deadline=None)  # the machine may be busy, and scipy loads in the first example
PAIRED = st.lists(st.tuples(st.sampled_from(list(Outcome)), st.sampled_from(list(Outcome))), max_size=40)


def test_wilson_interval_of_8_in_10():
    found = tally([RIGHT] * 8 + [WRONG] * 2).accuracy
    assert (found.value, found.low, found.high) == (
        0.8,
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )


def test_a_tie_is_scored_and_not_right_and_unscored_is_neither():
    found = tally([RIGHT, WRONG, TIE, TIE, UNSCORED])
    assert (found.n_right, found.n_wrong, found.n_tie, found.n_unscored) == (1, 1, 2, 1)
    assert found.accuracy.value == 0.25
    assert half_credit(found) == 0.5
    assert n_scored(found) == 4


@pytest.mark.parametrize("outcomes", [[], [UNSCORED], [UNSCORED] * 3])
def test_nothing_scored_has_no_accuracy(outcomes):
    found = tally(outcomes)
    assert found.accuracy is None
    assert half_credit(found) is None
    assert found.n_unscored == len(outcomes)


def test_all_ties_are_zero_right_and_half_credit_a_half():
    found = tally([TIE] * 7)
    assert (found.accuracy.value, found.accuracy.low) == (0.0, 0.0)
    assert found.accuracy.high > 0.3
    assert half_credit(found) == 0.5


@unhurried
@given(OUTCOMES)
def test_a_tally_counts_everything_once_and_its_interval_holds_the_value(outcomes):
    found = tally(outcomes)
    assert found.n_right + found.n_wrong + found.n_tie + found.n_unscored == len(outcomes)
    if found.accuracy is not None:
        assert 0 <= found.accuracy.low <= found.accuracy.value <= found.accuracy.high <= 1
        assert found.accuracy.value <= half_credit(found) <= 1


@unhurried
@given(OUTCOMES, st.integers(0, 5))
def test_unscored_pairs_change_no_accuracy(outcomes, n):
    assert tally(outcomes + [UNSCORED] * n).accuracy == tally(outcomes).accuracy


def test_a_section_is_weighted_and_a_plain_mean_would_differ():
    tallies = {"big": tally([RIGHT] * 9 + [WRONG]), "small": tally([RIGHT, WRONG]), "empty": tally([UNSCORED])}
    sections = {"s": ("big", "small", "empty", "absent"), "none": ("empty", "absent")}
    assert section_scores(tallies, sections) == {"s": pytest.approx(10 / 12)}
    weights = {"big": 1, "small": 3, "empty": 5, "absent": 7}
    assert section_scores(tallies, sections, weights=weights) == {"s": pytest.approx((0.9 + 3 * 0.5) / 4)}


def test_correctness_is_strict():
    assert correctness([RIGHT, WRONG, TIE]) == [1.0, 0.0, 0.0]
    assert math.isnan(correctness([UNSCORED])[0])


def _p_value(a, b):
    return paired_difference([correctness(a)], [correctness(b)], n_resamples=100).p_value


def test_mcnemar_of_1_against_9():
    a = [RIGHT] * 1 + [WRONG] * 9 + [RIGHT] * 20 + [TIE] * 5
    b = [WRONG] * 1 + [RIGHT] * 9 + [RIGHT] * 20 + [WRONG] * 5
    assert _p_value(a, b) == pytest.approx(0.021484375)
    assert _p_value(b, a) == _p_value(a, b)


@pytest.mark.parametrize(("a", "b"), [([RIGHT], [RIGHT]), ([TIE] * 4, [TIE] * 4), ([TIE] * 4, [WRONG] * 4)])
def test_mcnemar_without_a_deciding_item_is_one(a, b):
    assert _p_value(a, b) == 1.0


def test_runs_of_different_length_are_refused():
    with pytest.raises(DataError, match="same pairs"):
        paired_difference([[1.0], [1.0, 0.0]], [[1.0]])


@unhurried
@given(PAIRED)
def test_the_p_value_of_one_seed_is_mcnemars(paired):
    a, b = [first for first, _ in paired], [second for _, second in paired]
    found = paired_difference([correctness(a)], [correctness(b)], n_resamples=200)
    both = [(x, y) for x, y in paired if UNSCORED not in (x, y)]
    if not both:
        assert found is None
        return
    assert found.n == len(both)
    only_a, only_b = (sum(x is RIGHT and y is not RIGHT for x, y in each) for each in (both, [(y, x) for x, y in both]))
    exact = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert found.p_value == pytest.approx(exact)
    assert found.value == pytest.approx(sum((x is RIGHT) - (y is RIGHT) for x, y in both) / len(both))
    assert -1 <= found.low <= found.high <= 1


@unhurried
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=6), min_size=1, max_size=12),
)
def test_swapping_the_arms_flips_the_difference(n_a, n_b, items):
    a, b = [[item[s] for item in items] for s in range(n_a)], [[item[3 + s] for item in items] for s in range(n_b)]
    one, other = paired_difference(a, b, n_resamples=100), paired_difference(b, a, n_resamples=100)
    assert one.value == pytest.approx(-other.value)
    assert 0 < one.p_value <= 1
    assert paired_difference(a, b, n_resamples=100) == one, "the same input gives the same numbers"
    same = paired_difference(a, a, n_resamples=100)
    assert same.value == 0
    assert same.p_value == 1.0


@pytest.mark.parametrize("arm", [[], [[]], [[math.nan, math.nan]]])
def test_no_item_to_compare_gives_no_difference(arm):
    assert paired_difference(arm, arm) is None


def test_items_unscored_in_any_run_are_left_out():
    a, b = [[1.0, 1.0, math.nan], [1.0, math.nan, 1.0]], [[0.0, 1.0, 1.0]]
    found = paired_difference(a, b)
    assert (found.n, found.value) == (1, 1.0)


def test_one_item_carries_no_small_p():
    assert paired_difference([[1.0]] * 3, [[0.0]] * 3).p_value == 1.0
    assert paired_difference([[1.0] * 4] * 3, [[0.0] * 4] * 3).p_value == pytest.approx(2 * 0.5**4)


def test_the_interval_agrees_with_the_formula_for_paired_items():
    rng = np.random.default_rng(3)
    a, b = (rng.random(400) < 0.8).astype(float), (rng.random(400) < 0.7).astype(float)
    found = paired_difference([a.tolist()], [b.tolist()])
    half = 1.96 * (a - b).std() / 20
    assert found.low == pytest.approx((a - b).mean() - half, abs=0.006)
    assert found.high == pytest.approx((a - b).mean() + half, abs=0.006)


def test_seeds_that_disagree_widen_the_interval():
    rng = np.random.default_rng(4)
    base = (rng.random(300) < 0.5).astype(float).tolist()
    steady = [(rng.random(300) < 0.7).astype(float).tolist() for _ in range(3)]
    moody = [(rng.random(300) < share).astype(float).tolist() for share in (0.5, 0.7, 0.9)]
    widths = [found.high - found.low for found in (paired_difference(arm, [base]) for arm in (steady, moody))]
    assert widths[1] > 1.5 * widths[0]


def test_arms_that_do_not_differ_are_rarely_called_different():
    rng = np.random.default_rng(5)
    p_values = []
    for _ in range(100):
        hard = rng.random(120)
        a, b = ([(rng.random(120) < hard).astype(float).tolist() for _ in range(3)] for _ in range(2))
        p_values.append(paired_difference(a, b, n_resamples=400).p_value)
    assert sum(p < 0.05 for p in p_values) <= 12


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([]) == ()
    assert holm([0.9, 0.8]) == (1.0, 1.0)


@unhurried
@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    in_order = [adjusted[index] for index in sorted(range(len(p_values)), key=p_values.__getitem__)]
    assert in_order == sorted(in_order)


def test_seed_spread():
    found = seed_spread([0.5, 0.7, 0.9, math.nan])
    assert (found.mean, found.std, found.n) == (pytest.approx(0.7), pytest.approx(0.2), 3)
    assert seed_spread([0.4]).std is None
    assert seed_spread([]) is None
    assert seed_spread([math.nan]) is None
