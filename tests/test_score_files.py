"""Rewards and results on disk; what `evaluate` does with them is tested there."""

import json
import math

import pytest

from critrm.errors import DataError
from critrm.score_files import read_result, read_scores, saved_scores, score_row
from critrm.store import write_records
from critrm.types import Score


def test_rows_are_read_back_and_not_a_number_is_null(tmp_path):
    scores = [Score("a", 1.5, -0.1), Score("b", math.nan, 2.0), Score("c", math.inf, 0.0)]
    write_records(tmp_path / "s.jsonl", [score_row(score, "x", f"k{score.pair_id}") for score in scores])
    found = read_scores(tmp_path / "s.jsonl")
    assert (found[0], found[2]) == (scores[0], scores[2])
    assert math.isnan(found[1].chosen)
    assert json.loads((tmp_path / "s.jsonl").read_text().splitlines()[1])["chosen"] is None
    assert set(saved_scores(tmp_path / "s.jsonl")) == {"ka", "kb", "kc"}


@pytest.mark.parametrize(
    "content", [None, "", "{", '{"pair_id": "a", "chosen": 1}\n', '{"pair_id": "a", "chosen": [], "rejected": 1}\n']
)
def test_what_cannot_be_read_is_made_anew_or_named(tmp_path, content):
    path = tmp_path / "s.jsonl"
    if content is not None:
        path.write_text(content)
    assert saved_scores(path) == {}
    with pytest.raises(DataError, match=r"s\.jsonl"):
        read_scores(path)


def test_no_result_is_named(tmp_path):
    (tmp_path / "r.json").write_text('{"benchmark": "x"}')
    with pytest.raises(DataError, match="not a result"):
        read_result(tmp_path / "r.json")
