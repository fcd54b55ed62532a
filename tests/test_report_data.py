"""A study's and a run's folder as a report reads them."""

import json
import shutil

import pytest

from critrm.errors import DataError
from critrm.report_data import AVERAGE, headline, label_of, main_cells, parts, read_report
from critrm.types import NO_CRITIC
from report_study import made_critiques, made_pairs, made_study

GRIDS = {
    "critics": {"sizes": [40]},
    "other": {"sizes": [40], "backbones": ["other/backbone-13b"]},
    "more": {"sizes": [80, 160], "critics": ["strong"]},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return made_study(tmp_path_factory.mktemp("made"), gains={"weak": -0.5, "strong": 2.0}, grids=GRIDS)


def test_a_study_is_read_with_the_benchmarks_headline(study):
    report = read_report(study)
    assert report.name == "made-up"
    assert report.benchmarks == {"rewardbench": "rewardbench"}
    assert len(report.pairs["rewardbench"]) == 60
    groups = report.cells[0].tests["rewardbench"]
    assert headline(groups) == AVERAGE
    assert parts(groups) == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    sections = [groups[name]["arms"]["strong"]["mean"] for name in parts(groups)]
    assert groups[AVERAGE]["arms"]["strong"]["mean"] == pytest.approx(sum(sections) / 4)
    assert not report.notes


def test_the_rows_of_table_2_are_the_cells_with_the_most_arms(study):
    main = main_cells(read_report(study).cells)
    assert [(cell.backbone_name, cell.n_train, cell.critics) for cell in main] == [
        ("backbone-13b", 40, ("weak", "strong")),
        ("backbone-7b", 40, ("weak", "strong")),
    ]
    assert [label_of(cell, main) for cell in main] == ["backbone-13b", "backbone-7b"]
    for cell in main:
        assert cell.tests["rewardbench"][AVERAGE]["arms"]["strong"]["difference"]["value"] > 0


def test_a_study_may_have_been_moved(study, tmp_path):
    moved = shutil.copytree(study, tmp_path / "moved")
    content = json.loads((moved / "study.json").read_text())
    for cell in content["cells"]:
        cell["folder"] = "/gone/" + "/".join(cell["folder"].split("/")[-3:])
    (moved / "study.json").write_text(json.dumps(content))
    report = read_report(moved)
    assert all(cell.folder.is_relative_to(moved) for cell in report.cells)
    assert len(report.pairs["rewardbench"]) == 60


def test_a_run_is_a_study_of_one_cell(study):
    folder = study / "critics" / "backbone-7b" / "pairs-40"
    report = read_report(folder)
    assert [cell.folder for cell in report.cells] == [folder]
    assert len(report.pairs["rewardbench"]) == 60
    assert report.exchange == ()


def test_only_pairs_that_every_cell_scored_are_compared(tmp_path):
    pairs = made_pairs(20)
    kept = {"a": made_critiques(pairs, "a"), "b": made_critiques(pairs[:15], "b")}
    grids = {"a": {"sizes": [20], "critics": ["a"]}, "b": {"sizes": [40], "critics": ["b"]}}
    study = made_study(
        tmp_path, gains={"a": 1.0, "b": 1.0}, grids=grids, pairs=pairs, critiques=kept, benchmark="pairs"
    )
    report = read_report(study)
    assert [cell.tests["rewardbench"]["all"]["n"] for cell in report.cells] == [15, 15]
    assert "5 pairs" in report.notes[0]
    assert set(report.cells[0].tests["rewardbench"]["all"]["arms"]) >= {NO_CRITIC}


def test_without_scores_the_numbers_are_the_runs_own(study, tmp_path):
    folder = shutil.copytree(study / "critics" / "backbone-7b" / "pairs-40", tmp_path / "run")
    shutil.rmtree(folder / "evaluate")
    report = read_report(folder)
    assert report.pairs == {"rewardbench": ()}
    assert "no explorer" in report.notes[0]
    assert report.cells[0].tests["rewardbench"]["all"]["arms"]["strong"]["mean"] > 0.5


@pytest.mark.parametrize("name", ["study.json", "results.json"])
@pytest.mark.parametrize("content", ["[1]", "{", '{"other": 1}'])
def test_other_files_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        read_report(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match="critrm study"):
        read_report(tmp_path)
