"""The paper's numbers as data, checked against its text."""

import os
import re
from pathlib import Path

import pytest

from critrm.config import load_recipe
from critrm.critics import complete_critics
from critrm.paper_tables import (
    CHECKPOINTS,
    NO_CRITIQUES,
    PAPER,
    SECTIONS,
    paper_gains,
    readings,
    same_name,
    table1,
    table2,
    table4,
)


@pytest.fixture(scope="module")
def paper() -> str:
    folder = Path(os.environ.get("CRITRM_PAPER") or Path(__file__).parents[1] / "../shared/paper").resolve()
    files = sorted(folder.glob("*.txt"))
    if not files:
        pytest.skip(f"the paper's text is not in {folder} (CRITRM_PAPER)")
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r"</?[bu]>", "", text)


def _lines(paper: str, before: str) -> list[list[str]]:
    """The table above its caption, as rows of cells."""
    part = paper[: paper.index(before)]
    return [line.split("\t") for line in part.splitlines() if "\t" in line]


def test_table_1_is_the_papers(paper):
    found = _lines(paper, "Table 1:")
    for row in table1():
        assert [row.dataset, f"{row.n_examples:,}"] in [line[:2] for line in found]
    assert sum(row.n_examples for row in table1() if row.benchmark == "RewardBench") == 2985


def test_table_2_is_the_papers_number_for_number(paper):
    part = paper[paper.index("Chat (358)\t") : paper.index("Table 2: Test")]
    checkpoint, expected = "", []
    for line in part.splitlines():
        cells = line.strip("\t").split("\t")
        if len(cells) == 1 and line:
            checkpoint = cells[0].removesuffix(" Ckpt")
        elif len(cells) == 6:
            expected.append([checkpoint, *cells])
    assert len(expected) == 25
    ours = [
        [row.checkpoint, row.critic, *("-" if each is None else f"{each:.4f}" for each in row.accuracy.values())]
        for row in table2()
    ]
    assert ours == expected


def test_table_4_is_the_papers(paper):
    part = paper[paper.index("Meta-Precision\t") : paper.index("Table 4: Meta")]
    expected = [line.split("\t") for line in part.splitlines()[1:] if line]
    assert [[row.critic, *(f"{each:.4f}" for each in (row.precision, row.recall, row.f1))] for row in table4()] == (
        expected
    )


def test_every_reading_is_in_the_papers_words(paper):
    text = re.sub(r"\s+", " ", paper.replace("*", "").replace("REWARD BENCH", "REWARDBENCH"))
    for row in readings():
        assert row.quote in text, row.quote
        value, points = row.value, row.value * 100
        spelled = {f"{value:g}", f"{value:.2f}", f"{value / 1000:.0f}k", f"{points:.0f} points"}
        assert any(each in row.quote for each in spelled), row


def test_the_csv_files_hold_no_more_than_is_read():
    assert sorted(path.name for path in PAPER.iterdir()) == ["readings.csv", "table1.csv", "table2.csv", "table4.csv"]


def test_gains_are_those_of_the_average_over_sections():
    gains = paper_gains()
    assert set(gains) == {row.critic for row in table4()} | {"GPT4-Turbo"}
    assert all(tuple(each) == CHECKPOINTS for each in gains.values())
    assert gains["GPT4-Turbo"]["Command-35B Base"] == pytest.approx(
        (0.3827 + 0.7961 + 0.6878 + 0.8527 - 0.2486 - 0.6930 - 0.6000 - 0.7178) / 4
    )
    assert gains["LLaMA2-7B-Chat"]["LLaMA-7B Base"] < 0 < gains["Command R+"]["LLaMA-7B Base"]


def test_names_are_the_same_however_they_are_spelled():
    critics = complete_critics(load_recipe("bundled:paper.yaml").critique, backbone="some/model")
    theirs = [row.critic for row in table2() if row.checkpoint == CHECKPOINTS[0] and row.critic != NO_CRITIQUES]
    assert [sum(same_name(name, each) for each in theirs) for name in critics] == [1] * len(theirs)
    assert not same_name("command-r", "Command R+")
    assert same_name("chat_hard", SECTIONS[1])


def test_what_the_page_on_the_paper_says_of_its_numbers_is_so():
    gains = paper_gains()
    assert sum(value > 0 for each in gains.values() for value in each.values()) == 12
    assert sum(each["Command R-35B"] < 0 for each in gains.values()) == 5
    counts = {row.dataset: row.n_examples for row in table1()}
    rows = {(row.checkpoint, row.critic): row.accuracy for row in table2()}

    def over_pairs(checkpoint, critic):
        return sum(rows[checkpoint, critic][name] * counts[name] for name in SECTIONS) / 2985

    stated = {(each.checkpoint, each.critic): each.value for each in readings() if each.section == "5.1"}
    for (checkpoint, critic), by_sections, by_pairs in (
        (("LLaMA-7B Base", "GPT4-Turbo"), 0.083, 0.119),
        (("Command-35B Base", "GPT4-Turbo"), 0.115, 0.118),
        (("LLaMA-7B Base", "Command R+"), 0.050, 0.081),
        (("Command-35B Base", "Command R+"), 0.049, 0.061),
    ):
        assert gains[critic][checkpoint] == pytest.approx(by_sections, abs=6e-4)
        gain = over_pairs(checkpoint, critic) - over_pairs(checkpoint, NO_CRITIQUES)
        assert gain == pytest.approx(by_pairs, abs=6e-4)
        is_near = abs(gain - stated[checkpoint, critic]) < 0.002
        assert is_near == ((checkpoint, critic) == ("Command-35B Base", "Command R+"))


def test_the_page_on_the_paper_names_modules_and_tests_that_are_there():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "paper.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+\.py)`", page):
        folder = root / "tests" if name.startswith("test_") else root / "src" / "critrm"
        assert (folder / name).is_file(), name
