"""Tables 2 and 3, and how tables are written in Markdown and LaTeX."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.report_data import read_report
from critrm.report_markup import ReportTable, TableCell, latex, markdown
from critrm.report_tables import accuracy_table, example_table
from critrm.report_texts import arm_texts, example
from report_study import made_critiques, made_pairs, made_study


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    grids = {"all": {"sizes": [40]}, "other": {"sizes": [40], "backbones": ["b/other"]}}
    return read_report(made_study(folder, gains={"weak": -0.5, "strong": 2.0}, grids=grids))


def test_table_2_has_a_row_per_backbone_and_arm_and_marks_the_best(report):
    table = accuracy_table(report)
    assert table.titles[:5] == ("backbone", "critiques", "average of sections (60)", "difference", "p")
    assert [title.partition(" (")[0] for title in table.titles[5:]] == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    assert [(row[0].text, row[1].text) for row in table.rows] == [
        (backbone, arm) for backbone in ("other", "backbone-7b") for arm in ("no critiques", "weak", "strong")
    ]
    for rows in (table.rows[:3], table.rows[3:]):
        for column in (2, 5, 6, 7, 8):
            best = max(row[column].value for row in rows)
            assert all((row[column].mark == "best") == (row[column].value == best) for row in rows)
    assert re.fullmatch(r"0\.\d{3} ±0\.\d{3} \[\.\d\d, 1?\.\d\d\]", table.rows[2][2].text)


def test_table_3_has_what_each_critic_says_of_one_response(report):
    pair, texts = example(report)
    table = example_table(texts, pair)
    assert [row[0].text for row in table.rows] == ["weak", "strong"]
    assert all(pair.id in row[1].text and "right" in row[1].text for row in table.rows)
    assert pair.chosen in table.caption


def test_the_example_is_one_that_every_critic_has_written_of(tmp_path):
    pairs = made_pairs(12)
    kept = {"a": made_critiques(pairs[6:], "a")}
    study = made_study(tmp_path, gains={"a": 1.0}, grids={"all": {"sizes": [20]}}, pairs=pairs, critiques=kept)
    found = read_report(study)
    pair, texts = example(found)
    assert pair.id in texts["a"]
    assert set(arm_texts(found.cells[0], "rewardbench")["a"]) == {each.id for each in pairs[6:]}


def _table(*texts: str) -> ReportTable:
    rows = (tuple(TableCell(text=text, mark="best") for text in texts),)
    return ReportTable(key="t", title="T", caption="C", titles=tuple("x" for _ in texts), rows=rows, n_text=len(texts))


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_stays_in_its_cell(text):
    row = markdown(_table(text, "end")).rstrip("\n").split("\n")[-1]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3
    assert row.endswith("**end** |")
    assert "<" not in row.replace("<br>", "")
    lines = latex(_table(text, "end")).split("\n")
    body = lines[lines.index(r"\midrule") + 1]
    assert len(re.findall(r"(?<!\\)&", body)) == 1
    assert body.endswith(r"\textbf{end} \\")


def test_hostile_texts_are_escaped_in_both_forms():
    hostile = "a|b <script>x</script> $x$ 50% \\input{x} *s* `c` [l](u) _u_ & #1 {y} ~ ^\nnext \x00"
    shown = markdown(_table(hostile)).splitlines()[-1]
    assert "<script>" not in shown
    assert r"a\|b" in shown
    assert r"\*s\*" in shown
    assert "<br>next" in shown
    assert "\x00" not in shown
    body = latex(_table(hostile))
    assert r"\textbackslash{}input\{x\}" in body
    assert r"50\%" in body
    assert r"\$x\$" in body
    assert "\x00" not in body


def test_latex_has_a_rule_between_backbones_and_room_for_long_texts(report):
    body = latex(accuracy_table(report))
    assert body.count(r"\midrule") == 2
    assert r"\textbf{" in body
    assert r"\underline{" in body
    pair, texts = example(report)
    assert r"p{0.75\linewidth}" in latex(_table("critic", "long " * 40))
    assert "begin{tabular}{ll}" in latex(example_table(texts, pair))
