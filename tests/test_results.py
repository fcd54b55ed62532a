"""Arms side by side: groups, paired differences, null baselines."""

import math

import pytest

from critrm.baselines import CRITIQUES_ONLY, LONGER, LONGER_CRITIQUE, SENTIMENT, UNTRAINED_ALONE, UNTRAINED_WHOLE
from critrm.errors import DataError
from critrm.results import ALL, baseline_notes, blend, compare_arms
from critrm.types import NO_CRITIC, Message, Outcome, PreferencePair, Score


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


def test_a_blend_weighs_both_readings_alike_and_uses_no_label():
    a = [Score("x", 3.0, 0.0), Score("y", 0.0, 4.0)]
    b = [Score("y", 0.2, 0.1), Score("x", 0.0, 0.7)]
    size_a, size_b = math.sqrt(12.5), math.sqrt(0.25)
    margins = [score.chosen - score.rejected for score in blend(a, b)]
    assert margins == pytest.approx([3 / size_a - 0.7 / size_b, -4 / size_a + 0.1 / size_b])
    turned = [
        [Score(each.pair_id, each.rejected, each.chosen) if each.pair_id == "y" else each for each in scores]
        for scores in (a, b)
    ]
    turned_margins = [score.chosen - score.rejected for score in blend(*turned)]
    assert turned_margins == pytest.approx([margins[0], -margins[1]]), "which is chosen makes no difference"


def test_identical_completions_tie_in_a_blend_and_what_is_unscored_stays_so():
    a = [Score("x", 1.0, 1.0), Score("y", math.nan, 0.0), Score("z", 2.0, 1.0)]
    b = [Score("x", 0.3, 0.3), Score("y", 1.0, 0.0), Score("z", 0.0, 0.0)]
    assert [score.outcome for score in blend(a, b)] == [Outcome.TIE, Outcome.UNSCORED, Outcome.RIGHT]


def test_a_blend_is_compared_with_its_own_arm():
    pairs = _pairs(["x"] * 4)
    arm, other = _scores(pairs, {0, 1}), _scores(pairs, {0, 1, 2, 3})
    found = compare_arms(pairs, {"c": [arm]}, blends={"x": {"c": [other]}})[ALL]["blends"]["x"]["c"]
    assert (found["mean"], found["difference"]["value"]) == (1.0, 0.5)


def test_an_ensemble_is_one_model_and_is_compared_with_that_of_no_critiques():
    pairs = _pairs(["x"] * 6)
    arms = {NO_CRITIC: [_scores(pairs, {0}), _scores(pairs, {0, 1})], "c": [_scores(pairs, {0, 1, 2})] * 2}
    together = {critic: blend(*seeds) for critic, seeds in arms.items()}
    # Where two models contradict each other by as much, neither is right.
    assert [score.outcome for score in together[NO_CRITIC]][:2] == [Outcome.RIGHT, Outcome.TIE]
    blended = {"c": _scores(pairs, set(range(6)))}
    found = compare_arms(pairs, arms, ensembles={"all": together, "all and x": blended})[ALL]["ensembles"]
    assert found["all"][NO_CRITIC]["mean"] == pytest.approx(1 / 6) and found["all"][NO_CRITIC]["difference"] is None
    assert found["all"]["c"]["difference"]["value"] == pytest.approx(2 / 6)
    assert found["all and x"]["c"]["difference"]["value"] == pytest.approx(5 / 6)
    assert found["all and x"]["c"]["difference"]["p_value"] == pytest.approx(2 * 0.5**5), "McNemar's"


def test_a_blend_may_have_any_number_of_readings():
    readings = [[Score("x", float(i), 0.0), Score("y", 0.0, 1.0)] for i in range(1, 4)]
    margins = [score.chosen - score.rejected for score in blend(*readings)]
    sizes = [math.sqrt((i * i + 1) / 2) for i in range(1, 4)]
    expected = [sum(i / size for i, size in enumerate(sizes, 1)), sum(-1 / size for size in sizes)]
    assert margins == pytest.approx(expected)


def test_sections_of_a_benchmark_are_groups_over_their_items():
    pairs = _pairs(["llmbar-natural"] + ["llmbar-neighbor"] * 2 + ["llmbar-manual"])
    groups = compare_arms(pairs, {NO_CRITIC: [_scores(pairs, {0, 1})]}, benchmark="llmbar")
    assert groups["Adversarial"]["n"] == 3
    assert groups["Adversarial"]["arms"][NO_CRITIC]["mean"] == pytest.approx(1 / 3)
    assert "Natural" not in groups, "a section of one subset would repeat that subset"


@pytest.mark.parametrize(("name", "label"), [("all", "all (subset)"), ("", "(no subset)")])
def test_no_subset_takes_the_place_of_all_pairs(name, label):
    pairs = _pairs([name] * 2 + ["x"] * 3)
    groups = compare_arms(pairs, {NO_CRITIC: [_scores(pairs, {0})]})
    assert {label: (group["kind"], group["n"]) for label, group in groups.items()} == {
        ALL: ("all", 5), label: ("subset", 2), "x": ("subset", 3),
    }  # fmt: skip


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


def _outcomes(n, right):
    return [Outcome.RIGHT if i in right else Outcome.WRONG for i in range(n)]


def _with_baselines(n_arm, null, *, n=40, name=CRITIQUES_ONLY):
    pairs = _pairs(["x", "y"] * (n // 2))
    arms = {NO_CRITIC: [_scores(pairs, range(10))], "c": [_scores(pairs, range(n_arm))]}
    nulls = {"c": {name: _outcomes(n, range(null))}, NO_CRITIC: {LONGER: _outcomes(n, range(5))}, "other": {}}
    return compare_arms(pairs, arms, baselines=nulls)


def test_a_null_baseline_stands_in_every_group_with_the_arms_difference_from_it():
    groups = _with_baselines(30, 20)
    null = groups[ALL]["baselines"]["c"][CRITIQUES_ONLY]
    assert (null["mean"], null["difference"]["value"]) == (0.5, 0.25)
    assert null["difference"]["p_value"] == pytest.approx(2 * 0.5**10)
    assert groups["x"]["baselines"]["c"][CRITIQUES_ONLY]["mean"] == 0.5
    assert groups[ALL]["baselines"][NO_CRITIC][LONGER]["mean"] == 0.125
    assert [groups[label]["kind"] for label in (ALL, "x")] == ["all", "subset"]
    assert groups[ALL]["arms"]["c"]["half"] == 0.75


@pytest.mark.parametrize(
    ("n_arm", "null", "is_said"), [(30, 20, False), (22, 20, True), (20, 20, True), (10, 30, True)]
)
def test_the_table_says_so_where_an_arm_does_not_beat_its_critiques_unread(n_arm, null, is_said):
    notes = baseline_notes({"mini": _with_baselines(n_arm, null)})
    assert any(f"mini: c ({n_arm / 40:.3f}) does not beat {CRITIQUES_ONLY}" in note for note in notes) == is_said
    assert len(notes) == is_said, "once for all pairs, not for each subset"


@pytest.mark.parametrize("name", [LONGER_CRITIQUE, SENTIMENT])
def test_all_that_see_only_critiques_are_to_be_beaten_and_a_missing_bag_of_words_is_said(name):
    notes = baseline_notes({"mini": _with_baselines(10, 30, name=name)})
    assert "was not compared with a bag of words" in notes[0]
    assert f"does not beat {name}" in notes[1]
    assert baseline_notes({"mini": _with_baselines(10, 30, name=LONGER)})[1:] == [], "it sees the completions"


@pytest.mark.parametrize("name", [UNTRAINED_ALONE, UNTRAINED_WHOLE])
def test_it_is_said_where_an_arm_does_not_beat_its_backbone_untrained(name):
    (_, note) = baseline_notes({"mini": _with_baselines(10, 30, name=name)})
    assert f"does not beat {name} (0.750" in note and "nothing that its backbone did not know" in note
    assert baseline_notes({"mini": _with_baselines(30, 5, name=name)})[1:] == []


def test_an_unscored_baseline_is_no_defeat():
    pairs = _pairs(["x", "x"])
    arms = {NO_CRITIC: [_scores(pairs, {0})], "c": [_scores(pairs, {0})]}
    nulls = {"c": {CRITIQUES_ONLY: [Outcome.UNSCORED] * 2}}
    groups = compare_arms(pairs, arms, baselines=nulls)
    assert groups[ALL]["baselines"]["c"][CRITIQUES_ONLY]["mean"] is None
    assert baseline_notes({"mini": groups}) == []


def test_a_baseline_of_other_pairs_is_refused():
    pairs = _pairs(["x", "x"])
    with pytest.raises(DataError, match="has 1 outcomes for 2 pairs"):
        compare_arms(pairs, {NO_CRITIC: [_scores(pairs, {0})]}, baselines={NO_CRITIC: {LONGER: [Outcome.TIE]}})


def test_an_arm_without_the_no_critiques_arm_has_no_difference_from_it():
    pairs = _pairs(["x", "x"])
    assert compare_arms(pairs, {"c": [_scores(pairs, {0})]})[ALL]["arms"]["c"]["difference"] is None
