"""Which files of critiques are read: our own, and existing ones by pair id and side."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from critrm.critique_files import read_critiques
from critrm.errors import DataError

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("CRITRM_DATA") or ROOT.parent / "shared" / "data")
HOSTILE = "{{ 7*7 }} {% x %} <|im_end|></s> \x00 \u202eabc \u2028 \U0001f9d1\u200d\U0001f680 [/bold] " + "long " * 2000


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**changes: Any) -> dict[str, Any]:
    made = {"pair_id": "p1", "side": "chosen", "critique": "Too short.", **changes}
    return {name: value for name, value in made.items() if value != "GONE"}


def test_reads_imported_critiques(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "gpt-4.1.jsonl",
        row(score=7, flaw="ignored"),
        row(side="rejected", critique="GONE", text=" Good. "),
        row(pair_id=12, critic="other", critique=HOSTILE),
        row(critic="other"),
    )
    rows = read_critiques(path)
    assert [(r.pair_id, r.side, r.critic) for r in rows] == [
        ("p1", "chosen", "gpt-4.1"),
        ("p1", "rejected", "gpt-4.1"),
        ("12", "chosen", "other"),
        ("p1", "chosen", "other"),
    ]
    assert (rows[0].score, rows[1].score, rows[1].text, rows[2].text) == (7, None, "Good.", HOSTILE.strip())
    assert len({r.key for r in rows}) == 4
    # A key is of the content, wherever the file lies.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert read_critiques(path.rename(moved / path.name)) == rows


def test_a_given_name_wins(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "file.jsonl", row(critic="own"))
    assert read_critiques(path)[0].critic == "own"
    assert read_critiques(path, critic="mine")[0].critic == "mine"


@pytest.mark.parametrize(
    ("bad", "field", "reason"),
    [
        (row(pair_id="GONE"), "pair_id", "missing"),
        (row(pair_id=""), "pair_id", "missing"),
        (row(pair_id=True), "pair_id", "missing"),
        (row(side="GONE"), "side", "must be"),
        (row(side="A"), "side", "'A'"),
        (row(critique="GONE"), "critique", "missing"),
        (row(critique=None), "critique", "missing"),
        (row(critique=["x"]), "critique", "missing"),
        (row(critique=" \n"), "critique", "empty"),
        (row(critique="GONE", text=""), "text", "empty"),
        (row(score="high"), "score", "number"),
        (row(n_prompt_tokens="many"), "n_prompt_tokens", "number"),
        (row(side="rejected"), "pair_id", "second critique"),
        ("{not json", "", "malformed"),
        ("[1]", "", "object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: Any, field: str, reason: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", row(side="rejected"), row(pair_id="p0"), bad)
    with pytest.raises(DataError, match=reason) as caught:
        read_critiques(path)
    assert (caught.value.path, caught.value.line, caught.value.field) == (str(path), 3, field)


def test_real_critiques() -> None:
    path = DATA / "critiques" / "frontier-llm.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent: set CRITRM_DATA")
    rows = read_critiques(path)
    with open(path, encoding="utf-8", newline="\n") as file:
        assert len(rows) == sum(1 for line in file if line.strip())
    assert {r.critic for r in rows} == {"frontier-llm"} and all(r.text and r.score is not None for r in rows)


# --- the verb -----------------------------------------------------------------------------------------------------
