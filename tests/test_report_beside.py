"""The paper's numbers beside a report's own."""

import dataclasses
import json

import pytest

from critrm.paper_tables import readings
from critrm.report_beside import counts_table, gains_table, paper_accuracy_table, quality_table, readings_table, worth
from critrm.report_data import read_report
from report_study import made_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    grids = {"all": {"sizes": [40]}, "more": {"sizes": [80, 320], "critics": []}}
    return made_study(folder, gains={"command-r-plus": 2.0, "somebody": 0.1}, grids=grids)


def test_gains_of_the_papers_critics_are_beside_ours(study):
    table = gains_table(read_report(study))
    rows = {row[0].text: row for row in table.rows}
    assert len(rows) == 7
    assert rows["command-r-plus"][1].value > 0
    assert [cell.text for cell in rows["command-r-plus"][2:]] == ["+0.050", "+0.049", "-0.084"]
    assert [cell.text for cell in rows["somebody"][2:]] == ["-"] * 3
    assert rows["GPT4-Turbo"][1].text == "-"


def test_readings_have_ours_where_the_critic_is_the_same(study):
    report = read_report(study)
    table = readings_table(report)
    ours = {(row[1].text.strip("“”"), row[3].value): row[2].text for row in table.rows}
    assert len(table.rows) == len(readings())
    for reading in readings():
        found = ours[reading.quote, reading.value]
        if reading.measure in ("plain_pairs", "gain") and reading.critic == "Command R+":
            assert "command-r-plus" in found or "backbone-7b" in found
        elif reading.measure != "rate":
            assert found == "not measured"


def test_counts_are_beside_the_papers_for_its_test_sets_only(study, tmp_path):
    rows = {row[0].text: row[1:] for row in counts_table(read_report(study)).rows}
    assert rows["rewardbench"][0].value == 60
    assert rows["rewardbench: Chat"][1].value == 358
    other = made_study(tmp_path, gains={"a": 1.0}, grids={"all": {"sizes": [20]}}, benchmark="pairs", test="Chat")
    assert all(row[2].text == "-" for row in counts_table(read_report(other)).rows)


def test_critique_quality_is_shown_where_it_was_measured(study):
    assert quality_table(read_report(study)) is None
    score = {"value": 0.7, "low": 0.6, "high": 0.8}
    result = {"critic": "command-r-plus", "n_critiques": 9, "precision": score, "recall": score, "f1": None}
    (study / "graded").mkdir()
    path = study / "graded" / "metacritique.json"
    path.write_text(json.dumps({"grader": "gpt", "results": [result]}))
    table = quality_table(read_report(study))
    path.unlink()
    assert [cell.text for cell in table.rows[0]] == [
        "command-r-plus",
        "gpt",
        "9",
        "0.700 [0.60, 0.80]",
        "0.7667",
        "0.700 [0.60, 0.80]",
        "0.6065",
        "-",
        "0.6422",
    ]


def test_the_papers_table_2_is_there_whole():
    assert len(paper_accuracy_table().rows) == 25


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"is_significant": False}, "no worth shown"),
        ({"difference": {"value": -0.1}}, "they do harm"),
        ({"plain_pairs": 400}, "more than 400 plain pairs"),
        ({"plain_pairs": 400, "slope": -0.1}, "no number of plain pairs up to 400"),
        ({}, "200 plain pairs [150, 300], 5.0 each"),
        ({"high": 400}, "200 plain pairs [150, more than 400], 5.0 each"),
    ],
)
def test_a_worth_says_no_more_than_was_measured(changed, said):
    rate = {
        "is_significant": True,
        "difference": {"value": 0.1},
        "plain_pairs": 200,
        "low": 150,
        "high": 300,
        "largest": 400,
        "slope": 0.3,
        "rate": 5.0,
    }
    assert worth(rate | changed) == said


def test_a_best_rate_answers_the_papers_forty(study):
    report = read_report(study)
    nothing = dataclasses.replace(report, exchange=())
    forty = next(row for row in readings_table(nothing).rows if row[3].value == 40)
    assert forty[2].text == "not measured"
    weak = dataclasses.replace(report, exchange=tuple(each | {"is_significant": False} for each in report.exchange))
    forty = next(row for row in readings_table(weak).rows if row[3].value == 40)
    assert forty[2].text == "no critique is shown to be worth a plain pair"
