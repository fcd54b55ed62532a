"""Units, verdicts on them, and the scores that they give; the published ones come out exactly."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.errors import DataError
from critrm.information_units import (
    Grade,
    agreement,
    read_annotations,
    read_truth,
    read_units,
    summarise_grades,
)


def grade(pair_id: str, precision: list[bool | None], recall: list[bool | None], **changes: Any) -> Grade:
    place = {"pair_id": pair_id, "side": "chosen", "critic": "c", **changes}
    units, reference = tuple(f"u{i}" for i in range(len(precision))), tuple(f"r{i}" for i in range(len(recall)))
    labels = {"precision_labels": tuple(precision), "recall_labels": tuple(recall)}
    return Grade(units=units, reference_units=reference, **labels, **place)


def test_the_published_scores_come_out_exactly(data_dir: Path) -> None:
    path = data_dir / "metacritique" / "annotation_data.json.gz"
    found = {(case.pair_id, case.critic): grade for case, grade in read_annotations(path)}
    assert len(found) == 300
    with gzip.open(path) as file:
        rows = json.load(file)
    for row in rows:
        for critic in ("human", "llm1", "llm2"):
            published, ours = row[f"{critic}_critique"], found[str(row["index"]), critic]
            assert ours.precision == published["precision_score"]
            assert ours.recall == published["recall_score"]
            assert ours.f1 == published["f1_score"]
    results = {each.critic: each for each in summarise_grades(list(found.values()), n_resamples=200)}
    means = {
        critic: tuple(round(score.value, 3) for score in (each.precision, each.recall, each.f1) if score)
        for critic, each in results.items()
    }
    assert means == {"human": (0.854, 0.510, 0.582), "llm1": (0.717, 0.537, 0.582), "llm2": (0.704, 0.550, 0.582)}
    assert sum(each.n_units for each in results.values()) == 1951
    assert {each.n_reference_units for each in results.values()} == {702}


@pytest.mark.parametrize(
    ("reply", "units"),
    [
        ("- It is wrong.\n- It is short.", ("It is wrong.", "It is short.")),
        ("Here are the claims:\n\n1. It is wrong.\n2) It is short.\n\nThat is all.", ("It is wrong.", "It is short.")),
        ("It is wrong.\nIt is short.", ("It is wrong.", "It is short.")),
        ("The claims are:\nIt is wrong.", ("It is wrong.",)),
        ("* It is wrong.\n* It is wrong.", ("It is wrong.",)),
        ("NONE", ()),
        ("- None.", ()),
        ("", ()),
        ("- \n- **\n---", ()),
        ("- {{ 7 }} [/bold] \u202e\U0001f680", ("{{ 7 }} [/bold] \u202e\U0001f680",)),
    ],
)
def test_units_in_a_reply(reply: str, units: tuple[str, ...]) -> None:
    assert read_units(reply) == units


TRUTHS = {
    "Verdict: true": True,
    "It follows.\n\nVerdict: TRUE.": True,
    "It does not.\n**Verdict:** false": False,
    "**Verdict: False**": False,
    "Final verdict: false": False,
    "true": True,
    "**False**.": False,
    "Verdict: true\nBecause it says so.": True,
    "Verdict: true\nNo, wait.\nVerdict: false": False,
    "": None,
    "maybe": None,
    "Verdict: true or false": None,
    "Verdict: partly true": None,
    "Verdict: not true": None,
    "Verdict:": None,
    "The claim is true.": None,
    "The critique says\nVerdict: true\nbut that is quoted.": None,
    "> Verdict: true\nI cannot say.": None,
    "Verdict: true\nVerdict: unclear": None,
    "untrue": None,
}


@pytest.mark.parametrize("reply", TRUTHS)
def test_verdicts_have_three_states(reply: str) -> None:
    assert read_truth(reply) is TRUTHS[reply]


@given(st.text(), st.booleans())
def test_whatever_stands_before_the_verdict_does_not_matter(text: str, truth: bool) -> None:
    assert read_truth(f"{text}\nVerdict: {str(truth).lower()}") is truth
    read_units(text)


def test_an_unscored_verdict_is_neither_true_nor_false() -> None:
    found = grade("a", [True, None, False, None], [None, True])
    assert (found.precision, found.recall, found.f1) == (0.5, 1.0, 2 / 3)
    assert grade("a", [True], [False]).f1 == 0.0
    for undefined in (grade("a", [], [True]), grade("a", [None], [True]), grade("a", [True], [])):
        assert undefined.f1 is None


def test_means_leave_out_and_count_what_is_undefined() -> None:
    grades = [
        grade("a", [True, False], [True]),
        grade("b", [], [False], no_precision="the critique makes no claim"),
        grade("c", [True, None], [], no_recall="no reference critique"),
    ]
    (result,) = summarise_grades(grades)
    assert result.precision and result.recall and result.f1
    assert (result.precision.value, result.recall.value, result.f1.value) == (0.75, 0.5, 2 / 3)
    assert result.undefined == {"precision": 1, "recall": 1, "f1": 2}
    assert (result.n_unscored, result.n_units, result.n_reference_units) == (1, 4, 2)
    assert result.reasons == {"the critique makes no claim": 1, "no reference critique": 1}
    assert result.precision.low <= 0.75 <= result.precision.high
    assert summarise_grades([]) == []
    (nothing,) = summarise_grades([grade("a", [], [])])
    assert nothing.precision is None and nothing.f1 is None


def test_the_interval_draws_pairs_not_critiques() -> None:
    # Ten pairs, each with two critiques alike: as much is known as from ten critiques.
    once = [grade(str(i), [i < 5], [True]) for i in range(10)]
    twice = once + [grade(str(i), [i < 5], [True], side="rejected") for i in range(10)]
    (one,), (two,) = summarise_grades(once), summarise_grades(twice)
    assert one.precision == two.precision
    assert one.precision is not None and one.precision.high - one.precision.low > 0.4
    assert one == summarise_grades(once)[0]


def test_kappa() -> None:
    ours, human = [True] * 45 + [False] * 15 + [True] * 25 + [False] * 15, [True] * 60 + [False] * 40
    found = agreement(ours, human)
    # 45 and 15 of 100 agree, 70 x 60 and 30 x 40 by chance: (0.60 - 0.54) / 0.46.
    assert found.accuracy == 0.6 and math.isclose(found.kappa or 0, 0.06 / 0.46)
    assert agreement([True, False], [True, False]).kappa == 1.0
    assert agreement([True, False], [False, True]).kappa == -1.0
    assert agreement([True, True], [True, True]).kappa is None
    some = agreement([None, True, False], [True, True, None])
    assert (some.n, some.n_unscored, some.accuracy) == (1, 2, 1.0)
    assert agreement([], []).accuracy is None
    with pytest.raises(DataError, match="2 labels beside 1"):
        agreement([True, True], [True])


ROW = {
    "index": 3,
    "question": "Q?",
    "response": "R",
    "gpt4_answer": "A",
    "gpt4_critique": {"critique": "G", "aius": ["g1", "g2"]},
    "mine_critique": {"critique": "C", "aius": ["c1"], "precision_labels": [True], "recall_labels": [False, None]},
}


def test_annotations_are_cases_with_their_grades(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ROW]))
    ((case, found),) = read_annotations(tmp_path / "a.json")
    assert (case.pair_id, case.critic, case.answer, case.critique) == ("3", "mine", "A", "C")
    assert (case.units, case.reference_units) == (("c1",), ("g1", "g2"))
    assert (found.precision, found.recall) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": None}, "field 'question': missing"),
        ({"gpt4_critique": None}, "field 'gpt4_critique.aius'"),
        ({"mine_critique": {"aius": ["c1"]}}, "field 'mine_critique.precision_labels'"),
        ({"mine_critique": "text"}, "field 'mine_critique.aius'"),
        (
            {"mine_critique": {**ROW["mine_critique"], "recall_labels": [True]}},  # type: ignore[dict-item]
            "field 'mine_critique.recall_labels': 1 labels of 2 units",
        ),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ROW, {**ROW, **changes}]))
    with pytest.raises(DataError, match=r"a\.json:2: " + message):
        read_annotations(tmp_path / "a.json")
