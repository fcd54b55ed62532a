"""Exchange rates: known curves are inverted, and nothing is claimed beyond them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.errors import DataError
from critrm.exchange import exchange_rate, in_words

N_ITEMS = 600


def _runs(share: float, *, seeds: int = 3, start: int = 0) -> list[list[float]]:
    """Exactly this share of the items right, others in every seed."""
    n_right = round(share * N_ITEMS)
    return [
        np.random.default_rng(start + seed).permutation([1.0] * n_right + [0.0] * (N_ITEMS - n_right)).tolist()
        for seed in range(seeds)
    ]


def _logistic(size: int) -> float:
    return 1 / (1 + math.exp(-(-2 + 0.4 * math.log(size))))


CURVE = {size: _runs(_logistic(size), start=size) for size in (50, 200, 800, 3200)}


def test_an_arm_on_the_curve_is_worth_the_pairs_of_that_point():
    found = exchange_rate(CURVE, _runs(_logistic(1600), start=7), n_train=200)
    assert found.plain_pairs == pytest.approx(1600, rel=0.06)
    assert found.rate == pytest.approx(8, rel=0.06)
    assert found.low < 1600 < found.high
    assert found.is_significant
    words = in_words(found, arm="critic", where="test")
    assert f"about {found.plain_pairs:.0f} pairs" in words


def test_beyond_the_curve_the_answer_is_more_than():
    found = exchange_rate(CURVE, _runs(0.95, start=7), n_train=200)
    assert found.plain_pairs == found.high == 3200
    assert found.share_above == 1
    assert "worth more than 16.0 plain ones" in in_words(found, arm="critic", where="test")


def test_a_flat_curve_never_reaches_a_better_arm_and_says_so():
    flat = {size: _runs(0.5, start=size) for size in (50, 200, 800)}
    found = exchange_rate(flat, _runs(0.8, start=7), n_train=50)
    assert found.plain_pairs == 800
    assert "no number of pairs up to 800 reaches that" in in_words(found, arm="critic", where="test")


def test_an_arm_that_is_no_better_is_worth_nothing():
    found = exchange_rate(CURVE, _runs(_logistic(200), start=8), n_train=200)
    assert not found.is_significant
    assert "no significant difference" in in_words(found, arm="critic", where="test")


def test_an_arm_that_is_worse_does_harm():
    found = exchange_rate(CURVE, _runs(0.3, start=8), n_train=200)
    assert found.is_significant
    assert found.plain_pairs == found.smallest == 50
    assert "do harm" in in_words(found, arm="critic", where="test")


def test_the_same_input_gives_the_same_interval():
    arm = _runs(0.7, start=7)
    assert exchange_rate(CURVE, arm, n_train=200) == exchange_rate(CURVE, arm, n_train=200)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DataError, match="two sizes"):
        exchange_rate({50: CURVE[50]}, CURVE[200], n_train=50)
    with pytest.raises(DataError, match="200"):
        exchange_rate({50: CURVE[50], 800: CURVE[800]}, CURVE[200], n_train=200)


def test_items_without_a_score_in_any_run_take_no_part():
    nan = float("nan")
    plain = {10: [[0.0, 1.0, nan]], 20: [[1.0, 1.0, 0.0]]}
    found = exchange_rate(plain, [[1.0, 1.0, 1.0]], n_train=10)
    assert found.difference.n == 2
    assert exchange_rate({10: [[nan]], 20: [[1.0]]}, [[1.0]], n_train=10) is None


@settings(max_examples=15, deadline=None)
@given(st.floats(0.02, 0.98), st.lists(st.floats(0.02, 0.98), min_size=2, max_size=4))
def test_the_worth_lies_within_the_sizes_and_its_interval(share, shares):
    n = 40
    plain = {10 * 2**k: [[1.0] * round(each * n) + [0.0] * (n - round(each * n))] for k, each in enumerate(shares)}
    found = exchange_rate(plain, [[1.0] * round(share * n) + [0.0] * (n - round(share * n))], n_train=10)
    assert found.smallest <= found.low <= found.plain_pairs <= found.high <= found.largest
    assert in_words(found, arm="a", where="t")
