"""The figures: which can be drawn, that their numbers are in them, and the same bytes each time."""

import re
import xml.etree.ElementTree as ET

import pytest

from critrm.report_data import read_report
from critrm.report_figures import curve_families, figures
from report_study import made_pairs, made_study

pytest.importorskip("matplotlib")
HOSTILE = 'a"<b>&$x_1$\x0b漢字\u202e'
GRIDS = {"all": {"sizes": [40]}, "more": {"sizes": [80, 160], "critics": ["strong"]}}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return made_study(folder, gains={"weak": -0.5, "strong": 2.0, HOSTILE: 0.5}, grids=GRIDS)


@pytest.fixture(scope="module")
def drawn(study):
    return figures(read_report(study))


def test_all_figures_of_a_whole_study_are_drawn(drawn):
    found, missing = drawn
    assert [figure.key for figure in found] == ["figure2", "figure3", "figure4", "figure6", "figure7", "quality"]
    assert missing == []
    for figure in found:
        assert figure.png.startswith(b"\x89PNG")
        assert ET.fromstring(figure.svg).tag.endswith("svg")


def test_their_words_are_text_and_hostile_names_stay_names(drawn):
    found, _ = drawn
    for figure in found:
        texts = "".join(ET.fromstring(figure.svg).itertext())
        assert "strict accuracy" in texts
        if figure.key != "figure4":
            assert 'a"<b>&$x_1$�漢字' in texts
    curves = {figure.key: "".join(ET.fromstring(figure.svg).itertext()) for figure in found}
    assert "weak (40 pairs)" in curves["figure3"]
    assert "weak" not in curves["figure4"]
    for section in ("Chat", "Chat Hard", "Safety", "Reasoning"):
        assert f"rewardbench: {section}" in curves["figure6"]


def test_the_same_numbers_give_the_same_bytes(study, drawn):
    again, _ = figures(read_report(study))
    assert again == drawn[0]
    assert all("<dc:date>" not in figure.svg for figure in again)


def test_a_run_gets_the_figures_of_one_size(study):
    found, missing = figures(read_report(study / "all" / "backbone-7b" / "pairs-40"))
    assert [figure.key for figure in found] == ["figure2", "figure7", "quality"]
    assert [note.partition(" is")[0] for note in missing] == ["Figure 3", "Figure 4", "Figure 6"]


def test_without_sections_or_critics_the_rest_is_left_out(tmp_path):
    grids = {"plain": {"sizes": [20, 40], "critics": []}}
    pairs = made_pairs(20, subsets=())
    study = made_study(tmp_path, gains={"unused": 1.0}, grids=grids, pairs=pairs, benchmark="pairs")
    found, missing = figures(read_report(study))
    assert [figure.key for figure in found] == ["figure3"]
    assert len(missing) == 5


def test_curves_join_cells_that_differ_in_their_pairs_alone(tmp_path):
    grids = {
        "a": {"sizes": [20, 40]},
        "b": {"sizes": [80], "critics": []},
        "c": {"sizes": [20], "change": {"train": {"critique_dropout": 0.5}}},
        "d": {"sizes": [20], "backbones": ["x/other"]},
    }
    report = read_report(made_study(tmp_path, gains={"k": 1.0}, grids=grids))
    assert [[cell.n_train for cell in cells] for cells in curve_families(report)] == [[20, 40, 80]]


def test_each_critic_has_its_own_colour_and_mark(drawn):
    figure3 = next(figure for figure in drawn[0] if figure.key == "figure3")
    assert len(set(re.findall(r"stroke: (#[0-9a-f]{6}); stroke-width: 1\.3", figure3.svg))) == 2


def test_panels_of_one_backbone_say_which_setting_they_show(tmp_path):
    grids = {
        "as-it-is": {"sizes": [20, 40]},
        "dropped": {"sizes": [20, 40], "change": {"train": {"critique_dropout": 0.5}}},
    }
    found, _ = figures(read_report(made_study(tmp_path, gains={"k": 1.0}, grids=grids)))
    figure3 = next(figure for figure in found if figure.key == "figure3")
    assert all(f"<!-- {name} -->" in figure3.svg or f">{name}<" in figure3.svg for name in grids)
