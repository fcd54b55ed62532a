"""Weighted accuracy against the benchmark's own headline, and against plain accuracy where all weigh the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.benchmarks import BENCHMARKS, summarise
from critrm.metrics import paired_difference
from critrm.report_weights import weighted_arm
from critrm.results import accuracy_over_seeds
from critrm.types import NO_CRITIC, PreferencePair, Score


def _scores(ids, right) -> dict[str, Score]:
    return {pair_id: Score(pair_id, float(each), 0.5) for pair_id, each in zip(ids, right, strict=True)}


def test_the_mean_of_sections_is_the_benchmarks_headline():
    table = BENCHMARKS["rewardbench"]
    subsets = ["alpacaeval-easy", "mt-bench-hard", "llmbar-natural", "math-prm", "hep-cpp", "xstest-should-refuse"]
    pairs = [
        PreferencePair(id=f"{subset}-{i}", prompt=(), chosen="a", rejected="b", subset=subset)
        for subset in subsets
        for i in range(5)
    ]
    scores = [Score(pair.id, float(i % 3 != 0 or i < 9), 0.5) for i, pair in enumerate(pairs)]
    expected = summarise(pairs, scores, benchmark="rewardbench", model="m", critic=NO_CRITIC)
    strata = []
    for section in table.sections.values():
        present = [subset for subset in section if subset in subsets]
        total = sum(table.weights[subset] for subset in present)
        for subset in present:
            ids = [pair.id for pair in pairs if pair.subset == subset]
            strata.append((ids, table.weights[subset] / total / 4))
    found = weighted_arm({NO_CRITIC: [{score.pair_id: score for score in scores}]}, NO_CRITIC, strata=strata)
    assert found["mean"] == pytest.approx(expected.headline_value)
    assert found["low"] < found["mean"] < found["high"]


@given(right=st.lists(st.booleans(), min_size=1, max_size=30))
def test_one_part_has_the_plain_accuracy_and_interval(right):
    ids = [str(i) for i in range(len(right))]
    scores = _scores(ids, right)
    found = weighted_arm({NO_CRITIC: [scores]}, NO_CRITIC, strata=[(ids, 1.0)])
    plain = accuracy_over_seeds([[score.outcome for score in scores.values()]])
    for name in ("mean", "low", "high"):
        assert found[name] == pytest.approx(plain[name], abs=1e-6)


def test_the_difference_of_one_part_is_the_paired_one():
    ids = [str(i) for i in range(80)]
    a = [[i % 4 != 0 for i in range(80)], [i % 5 != 0 for i in range(80)]]
    b = [[i % 2 == 0 for i in range(80)], [i % 3 == 0 for i in range(80)]]
    arms = {"critic": [_scores(ids, row) for row in a], NO_CRITIC: [_scores(ids, row) for row in b]}
    found = weighted_arm(arms, "critic", strata=[(ids, 1.0)])["difference"]
    plain = paired_difference(a, b)
    assert found["value"] == pytest.approx(plain.value)
    assert (found["low"], found["high"]) == pytest.approx((plain.low, plain.high), abs=0.02)
    assert found["p_value"] == pytest.approx(plain.p_value, abs=0.01)


def test_parts_weigh_as_told_and_unscored_pairs_take_no_part():
    nan = float("nan")
    scores = {"a": Score("a", 1.0, 0.0), "b": Score("b", 0.0, 1.0), "c": Score("c", nan, nan)}
    found = weighted_arm({NO_CRITIC: [scores]}, NO_CRITIC, strata=[(["a", "c"], 0.75), (["b"], 0.25)])
    assert found["mean"] == 0.75
    assert found["n_unscored"] == 1
    nothing = weighted_arm({NO_CRITIC: [scores], "x": [scores]}, "x", strata=[(["c"], 1.0)])
    assert nothing["mean"] is None is nothing["difference"]


def test_a_few_pairs_cannot_carry_a_small_p():
    ids = [str(i) for i in range(3)]
    arms = {"critic": [_scores(ids, [1, 1, 1])], NO_CRITIC: [_scores(ids, [0, 0, 0])]}
    assert weighted_arm(arms, "critic", strata=[(ids, 1.0)])["difference"]["p_value"] == 0.25
