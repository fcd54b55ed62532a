"""`critrm report`: what it writes for a study and for a run, twice the same, and what it refuses."""

import json

import pytest

from critrm.errors import ConfigError, DataError
from critrm.report import command, write_report
from report_study import made_pairs, made_study

pytest.importorskip("matplotlib", reason="figures need the extra 'report'")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    grids = {"all": {"sizes": [40]}, "more": {"sizes": [80], "critics": ["strong"]}}
    return made_study(tmp_path_factory.mktemp("made"), gains={"weak": -0.5, "strong": 2.0}, grids=grids)


def _files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_study_gets_its_tables_figures_and_page(study, tmp_path):
    written = write_report(study, out=tmp_path / "report")
    files = _files(tmp_path / "report")
    expected = {f"tables/{key}.{kind}" for key in written.tables for kind in ("md", "tex")}
    expected |= {f"figures/{key}.{kind}" for key in written.figures for kind in ("svg", "png")}
    assert set(files) == expected | {"report.html", "report.md"}
    assert set(written.tables) == {"table1", "table2", "table3", "gains", "readings", "paper-table2"}
    assert written.figures == ("figure2", "figure3", "figure4", "figure6", "figure7", "quality")
    assert [note.partition(" is")[0] for note in written.notes] == ["Table 4"]
    text = files["report.md"].decode()
    assert written.bottom_line.split(" (")[0] in text
    assert "(figures/figure3.svg)" in text


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    for name in ("a", "b"):
        write_report(study, out=tmp_path / name)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_a_run_gets_what_can_be_drawn_from_it(study):
    folder = study / "all" / "backbone-7b" / "pairs-40"
    written = write_report(folder)
    assert written.folder == folder / "report"
    assert written.figures == ("figure2", "figure7", "quality")
    assert sum("Figure" in note for note in written.notes) == 3
    assert "was not measured" in written.bottom_line


def test_the_results_of_a_run_alone_are_enough(study, tmp_path):
    results = (study / "all" / "backbone-7b" / "pairs-40" / "results.json").read_text()
    (tmp_path / "results.json").write_text(results)
    written = write_report(tmp_path)
    assert "table3" not in written.tables
    assert any("no explorer" in note for note in written.notes)
    assert 'id="explorer"' not in (tmp_path / "report" / "report.html").read_text()


def test_an_earlier_reports_files_do_not_linger(study, tmp_path):
    graded = study / "graded" / "metacritique.json"
    graded.parent.mkdir()
    score = {"value": 0.7, "low": 0.6, "high": 0.8}
    result = {"critic": "strong", "n_critiques": 9, "precision": score, "recall": score, "f1": score}
    graded.write_text(json.dumps({"grader": "gpt", "results": [result]}))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "mine.md").write_text("mine")
    assert "table4" in write_report(study, out=tmp_path).tables
    graded.unlink()
    write_report(study, out=tmp_path)
    assert not (tmp_path / "tables" / "table4.md").exists()
    assert (tmp_path / "tables" / "mine.md").read_text() == "mine"


def test_pairs_without_subsets_and_a_test_without_critics(tmp_path):
    grids = {"plain": {"sizes": [20], "critics": []}}
    pairs = made_pairs(15, subsets=())
    study = made_study(tmp_path, gains={"unused": 1.0}, grids=grids, pairs=pairs, benchmark="pairs")
    written = write_report(study)
    assert written.figures == ()
    assert "gains" not in written.tables
    assert "critrm attribute" not in (study / "report" / "report.html").read_text()


def test_the_command_says_the_bottom_line_and_what_is_missing(study, tmp_path, capsys):
    command(study, out=tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "Of 2 comparisons with no critiques" in said
    assert "Note: Table 4 is left out" in said
    assert "report.html" in said


def test_what_cannot_be_reported_is_refused(study, tmp_path):
    with pytest.raises(DataError, match="critrm study"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="at least 0"):
        write_report(study, n_pairs=-1)
