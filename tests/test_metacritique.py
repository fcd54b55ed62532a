"""The verb: critique files in, grades and their means out; a grader beside human labels."""

import json
from pathlib import Path
from typing import Any

import pytest

from critrm.errors import ConfigError, DataError
from critrm.information_units import Grade
from critrm.metacritique import command, read_answers
from critrm.questions import ModelFlags
from critrm.store import read_records, write_records
from critrm.types import PreferencePair
from scripted_server import completion, serving


def grade_like(body: dict[str, Any]) -> Any:
    text = body["messages"][0]["content"]
    if text.startswith("Below is a critique"):
        return completion("- It is right.\n- It is short.")
    if text.startswith("Below are"):
        return completion(f"Hm.\nVerdict: {str('is right' in text.split('Claim:')[1]).lower()}")
    return completion("The answer.")


def content_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "metacritique.json").read_text())


def test_grades_critique_files(pairs: list[PreferencePair], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs_path, ours, reference = (tmp_path / name for name in ("pairs.jsonl", "ours.jsonl", "ref.jsonl"))
    write_records(pairs_path, pairs)
    for path in (ours, reference):
        places = [(one.id, side) for one in pairs for side in ("chosen", "rejected")]
        write_records(path, [{"pair_id": i, "side": side, "critique": f"{path.stem} {i} {side}"} for i, side in places])
    with serving(grade_like) as server:
        flags = ModelFlags(model="g", base_url=server.url)
        for _ in range(2):
            command(ours, out=tmp_path / "out", pairs=str(pairs_path), reference=reference, limit=2, flags=flags)
        # Of two pairs: 4 + 4 lists of units, 2 answers, 2 checks of each kind for 4 critiques; recall asks twice
        # the same of each critique, once per unit.
        assert len(server.bodies) == 4 + 4 + 2 + 4 * (2 + 2)
    content = content_of(tmp_path / "out")
    (result,) = content["results"]
    assert (content["grader"], result["critic"], result["n_critiques"], result["n_units"]) == ("g", "ours", 4, 8)
    assert result["precision"] == {"value": 0.5, "low": 0.5, "high": 0.5} == result["f1"]
    grades = read_records(tmp_path / "out" / "grades.jsonl", Grade)
    assert grades[0].precision_labels == (True, False) and grades[0].precision == 0.5
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["model"] == "g" and len(manifest["inputs"]) == 3
    assert "ours" in capsys.readouterr().out


def test_recorded_critiques_come_out_as_published(data_dir: Path, tmp_path: Path) -> None:
    command(out=tmp_path, recorded=data_dir / "metacritique" / "annotation_data.json.gz")
    content = content_of(tmp_path)
    assert content["grader"] == "human" and content["agreement_with_human_labels"] == {}
    f1 = {each["critic"]: round(each["f1"]["value"], 3) for each in content["results"]}
    assert f1 == {"human": 0.582, "llm1": 0.582, "llm2": 0.582}
    assert all(each["f1"]["low"] < each["f1"]["value"] < each["f1"]["high"] for each in content["results"])


def test_a_grader_is_compared_with_human_labels(tmp_path: Path) -> None:
    labelled = {"critique": "C", "aius": ["It is right.", "It is short."], "precision_labels": [True, True]}
    row = {
        "question": "Q?",
        "response": "R",
        "gpt4_answer": "A",
        "gpt4_critique": {"critique": "G", "aius": ["It is right.", "It is wrong."]},
        "mine_critique": {**labelled, "recall_labels": [True, False]},
    }
    (tmp_path / "a.json").write_text(json.dumps([{**row, "index": index} for index in range(3)]))
    with serving(grade_like) as server:
        flags = ModelFlags(model="g", base_url=server.url)
        command(out=tmp_path / "out", recorded=tmp_path / "a.json", limit=2, flags=flags)
        assert len(server.bodies) == 4  # the questions are alike, so their checks share calls
    found = content_of(tmp_path / "out")["agreement_with_human_labels"]
    assert found["precision"] == {"n": 4, "n_unscored": 0, "accuracy": 0.5, "kappa": 0.0}
    assert found["recall"] == {"n": 4, "n_unscored": 0, "accuracy": 1.0, "kappa": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name the critiques"),
        ({"critiques": Path("c")}, "name the critiques"),
        ({"recorded": Path("r"), "pairs": "p"}, "its own questions"),
        ({"recorded": Path("r"), "limit": 0}, "limit must be at least 1"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_answers_by_pair_id(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_records(path, [{"pair_id": "a", "answer": "x"}, {"pair_id": 7, "answer": "y"}])
    assert read_answers(path) == {"a": "x", "7": "y"}
    for row, field in (({"pair_id": "a", "answer": "z"}, "pair_id"), ({"pair_id": "b", "answer": " "}, "answer")):
        write_records(path, [{"pair_id": "a", "answer": "x"}, row])
        with pytest.raises(DataError, match=rf"answers\.jsonl:2: field '{field}'"):
            read_answers(path)
