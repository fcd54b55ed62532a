"""Which files of critiques are read: our own, and existing ones by pair id and side."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from critrm.critique_files import critiqued_pairs, read_critiques
from critrm.errors import ConfigError, DataError
from critrm.preferences import read_pairs
from critrm.store import write_records
from critrm.types import Verdict

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
    assert {r.key for r in rows} == {""}  # no call of ours
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert read_critiques(path.rename(moved / path.name)) == rows


def test_a_given_name_wins(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "file.jsonl", row(critic="own"))
    assert read_critiques(path)[0].critic == "own"
    assert read_critiques(path, critic="mine")[0].critic == "mine"


def test_a_judges_verdicts_are_critiques_with_its_ratings_as_scores(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    write_records(
        path,
        [
            Verdict(pair_id="a", side="chosen", judge="gpt", likert=8.0, critique="Right.", critic="gpt"),
            Verdict(pair_id="a", side="rejected", judge="gpt", likert=None, critique="Vague.", unscored="no score"),
            Verdict(pair_id="b", side="chosen", judge="gpt", likert=None, unscored="http 500"),
            Verdict(pair_id="b", side="rejected", judge="gpt", likert=3.0, critique="Rude.", critic="human"),
        ],
    )
    found = [(each.critic, each.text, each.score, each.failure) for each in read_critiques(path)]
    assert found == [
        ("gpt", "Right.", 8.0, ""),
        ("gpt", "Vague.", None, ""),
        ("gpt", "", None, "http 500"),
        ("human", "Rude.", 3.0, ""),
    ]
    write_records(path, [Verdict(pair_id="a", side="chosen", judge="gpt", likert=8.0, reply="8")])
    with pytest.raises(DataError, match="a rating alone: run `critrm judge --with-critique`"):
        read_critiques(path)
    # Only a verdict is by its judge.
    write_lines(path, row(judge="somebody"))
    assert read_critiques(path)[0].critic == "verdicts"


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
        (row(sample=-1), "sample", "whole number"),
        (row(sample="1"), "sample", "whole number"),
        (row(sample=True), "sample", "whole number"),
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


def test_several_samples_of_a_place(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", row(), row(sample=1), row(sample=2, side="rejected"))
    rows = read_critiques(path)
    assert [(r.side, r.sample) for r in rows] == [("chosen", 0), ("chosen", 1), ("rejected", 2)]
    write_lines(path, row(sample=1), row(sample=1, critique="Other."))
    with pytest.raises(DataError, match="sample 1: keep one, or number them"):
        read_critiques(path)


# Files with pairs and critiques ---------------------------------------------------------------------------------------

CLOUD = {"id": "q1", "prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}


def test_a_file_with_pairs_gives_pairs_and_critiques_that_fit(tmp_path: Path) -> None:
    rows = [
        CLOUD | {"id": name, "chosen_feedback": f"Kind {name}.", "rejected_feedback": "Rude."} for name in ("a", 7, "")
    ]
    path = write_lines(tmp_path / "oracle.jsonl", *rows)
    pairs, critiques = critiqued_pairs(path)
    assert [pair.id for pair in pairs] == ["a", "7", "oracle-00003"]
    # The same file read as pairs and read as critiques.
    assert pairs == read_pairs(path).pairs
    assert critiques == read_critiques(path) == read_critiques(path, dialect="cloud")
    assert [(r.pair_id, r.side, r.text, r.critic) for r in critiques[:2]] == [
        ("a", "chosen", "Kind a.", "oracle"),
        ("a", "rejected", "Rude.", "oracle"),
    ]
    assert {r.critic for r in read_critiques(path, critic="human")} == {"human"}


def test_responses_to_one_prompt_in_several_rows(tmp_path: Path) -> None:
    made = [("Hi", "Hello!", 5), ("Bye", "Bye!", 5), ("Hi", "What?", 1), ("Hi", "Hey", 5), ("Hi", "Hello!", 2)]
    rows = [{"question": q, "answer": a, "feedback": f"About {a}", "rating": n} for q, a, n in made]
    pairs, critiques = critiqued_pairs(write_lines(tmp_path / "f.jsonl", *rows))
    # Equal grades and equal texts are no pair; a prompt with one response neither.
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == [
        ("f-00001-0-1", "Hello!", "What?"),
        ("f-00001-0-2", "Hey", "Hello!"),
        ("f-00001-1-2", "Hey", "What?"),
    ]
    assert [(r.text, r.score, r.sample) for r in critiques if r.pair_id == "f-00001-0-2"] == [
        ("About Hey", 5, 0),
        ("About Hello!", 5, 0),
        ("About Hello!", 2, 1),
    ]


def test_critics_who_rate_the_same_responses_make_pairs_of_their_own(tmp_path: Path) -> None:
    rows = [
        {
            "id": 7,
            "prompt": "Hi",
            "response": response,
            "feedback": f"{critic} on {response}",
            "rating": n,
            "critic": critic,
        }
        for critic, grades in (("x", (5, 1)), ("y", (2, 4)))
        for response, n in zip(("A", "B"), grades, strict=True)
    ]
    pairs, critiques = critiqued_pairs(write_lines(tmp_path / "f.jsonl", *rows))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("A", "B"), ("B", "A")]
    assert len({pair.id for pair in pairs}) == 2
    assert {r.critic for r in critiques if r.pair_id == pairs[0].id} == {"x"}


@pytest.mark.parametrize(
    ("bad", "field", "reason"),
    [
        (CLOUD | {"chosen_feedback": "Kind."}, "rejected_feedback", "missing"),
        (CLOUD | {"chosen_feedback": ["Kind.", " "], "rejected_feedback": "Rude."}, "chosen_feedback", "empty"),
        (CLOUD | {"chosen_feedback": "Kind.", "rejected_feedback": 3}, "rejected_feedback", "must be text"),
        (
            CLOUD | {"chosen_feedback": "a", "rejected_feedback": "b", "chosen_score": "high", "critic": "c"},
            "chosen_score",
            "no number",
        ),
        (CLOUD | {"chosen_feedback": "a", "rejected_feedback": "b", "prompt": None}, "prompt", "missing"),
        (CLOUD | {"chosen_feedback": "a", "rejected_feedback": "b", "chosen": " "}, "response", "empty"),
        (CLOUD | {"chosen_feedback": "a", "rejected_feedback": "b", "prompt": ""}, "prompt", "empty"),
        (CLOUD | {"chosen_feedback": "a", "rejected_feedback": "b"}, "id", "second pair"),
        ("{not json", "", "malformed"),
    ],
)
def test_a_bad_row_of_a_file_with_pairs_is_named(tmp_path: Path, bad: Any, field: str, reason: str) -> None:
    good = CLOUD | {"chosen_feedback": "Kind.", "rejected_feedback": "Rude."}
    path = write_lines(tmp_path / "bad.jsonl", good, bad)
    with pytest.raises(DataError, match=reason) as caught:
        critiqued_pairs(path)
    assert (caught.value.path, caught.value.line, caught.value.field) == (str(path), 2, field)


def test_a_file_without_pairs_says_so(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f.jsonl", {"question": "Hi", "answer": "Hello!", "feedback": "Kind.", "rating": 5})
    with pytest.raises(DataError, match="no pair in it"):
        critiqued_pairs(path)
    with pytest.raises(DataError, match="no file with pairs and critiques"):
        critiqued_pairs(write_lines(tmp_path / "own.jsonl", row()))
    with pytest.raises(ConfigError, match="no dialect 'cloudy'.*auto, critrm, cloud"):
        read_critiques(path, dialect="cloudy")
