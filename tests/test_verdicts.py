"""Verdicts that exist already: ratings beside critiques, and published pairwise judges beside the human labels."""

import json
from pathlib import Path

import pytest

from critrm.benchmarks import summarise
from critrm.critique_files import read_critiques
from critrm.errors import DataError
from critrm.metrics import half_credit, tally
from critrm.preferences import read_pairs
from critrm.types import Critique, Outcome, Side, Verdict
from critrm.verdicts import (
    PairwiseVerdict,
    compare,
    read_human_labels,
    read_pairwise_verdicts,
    recorded_verdicts,
    verdict_scores,
)

# Subset -> right, tie, wrong of the critic of `frontier-llm.jsonl`.
FRONTIER = {
    "hh-helpful-base": (139, 60, 41),
    "llmbar-natural": (92, 6, 2),
    "llmbar-neighbor": (116, 9, 9),
    "llmbar-gptinst": (81, 4, 7),
    "llmbar-gptout": (42, 3, 2),
    "llmbar-manual": (43, 1, 2),
}


def critique(pair_id: str, side: Side, score: float | None, **changes: str) -> Critique:
    return Critique(key="", pair_id=pair_id, side=side, text="x", critic="c", prompt_version="", score=score, **changes)


def test_recorded_ratings_come_out_as_counted(data_dir: Path) -> None:
    pairs = read_pairs(data_dir / "hh-pairs" / "pairs.jsonl", split="test").pairs
    ids = {pair.id for pair in pairs}
    rows = read_critiques(data_dir / "critiques" / "frontier-llm.jsonl")
    verdicts = recorded_verdicts(row for row in rows if row.pair_id in ids)
    result = summarise(pairs, verdict_scores(verdicts), model="frontier-llm", critic="frontier-llm")
    found = {name: (each.n_right, each.n_tie, each.n_wrong) for name, each in result.subsets.items()}
    assert found == FRONTIER
    assert result.overall.n_unscored == 0
    hh = result.subsets["hh-helpful-base"]
    assert hh.accuracy is not None and round(hh.accuracy.value, 3) == 0.579
    assert round(half_credit(hh) or 0, 3) == 0.704


def test_a_missing_or_senseless_rating_is_unscored_not_a_tie() -> None:
    rows = [
        critique("a", "chosen", 7),
        critique("a", "rejected", None),
        critique("b", "chosen", 11),
        critique("b", "rejected", 4),
        critique("c", "chosen", 5),
        critique("d", "chosen", 0),
        critique("d", "rejected", 0),
        critique("e", "chosen", float("nan")),
        critique("e", "rejected", 1),
    ]
    outcomes = {score.pair_id: score.outcome for score in verdict_scores(recorded_verdicts(rows))}
    unscored = Outcome.UNSCORED
    assert outcomes == {"a": unscored, "b": unscored, "c": unscored, "d": Outcome.TIE, "e": unscored}
    assert [verdict.unscored for verdict in recorded_verdicts(rows)][1:3] == ["no score", "out of range"]


def test_two_judges_of_one_completion_are_an_error() -> None:
    verdict = Verdict(pair_id="a", side="chosen", likert=1, judge="j")
    with pytest.raises(DataError, match="two verdicts about 'a', chosen"):
        verdict_scores([verdict, verdict])


@pytest.mark.parametrize(
    ("judge", "decided", "n_agree"),
    [("gpt-3.5-turbo", (692, 157, 33, 12), 697), ("pandalm-7b", (635, 184, 75, 0), 667)],
)
def test_published_pairwise_verdicts(data_dir: Path, judge: str, decided: tuple[int, ...], n_agree: int) -> None:
    folder = data_dir / "pandalm"
    labels = read_human_labels(folder / "testset-v1.json.gz")
    verdicts = read_pairwise_verdicts(folder / f"{judge}-testset-v1.json.gz")
    found = compare(verdicts, labels)
    counts = tally(found.outcomes.values())
    assert (counts.n_right, counts.n_wrong, counts.n_tie, counts.n_unscored) == decided
    assert sum(decided) == 894  # the rows that a majority decides
    assert (found.n_agree, sum(found.counts.values())) == (n_agree, 999)
    assert verdicts[0].reason


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_results_in_other_words_are_unscored(tmp_path: Path) -> None:
    words = ["1", 2, "Tie", "0", "garbage", "3", None, True, ["1"]]
    rows = [{"idx": index, "gpt_result": word} for index, word in enumerate(words)]
    found = read_pairwise_verdicts(write(tmp_path / "v.jsonl", *rows))
    assert [verdict.preferred for verdict in found] == [1, 2, 0, 0, None, None, None, None, None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"idx": 1}, r"v\.jsonl:2: field '_result'"),
        ({"gpt_result": 1}, r"v\.jsonl:2: field 'idx': missing"),
        ({"idx": 0, "gpt_result": 1}, r"v\.jsonl:2: field 'idx': a second row of item 0"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairwise_verdicts(write(tmp_path / "v.jsonl", {"idx": 0, "gpt_result": 1}, row))


def test_labels_need_three_votes(tmp_path: Path) -> None:
    votes = [(1, 1, 2), (0, 1, 2), (0, 0, 1), (2, 2, 2)]
    rows = [{"idx": i, **{f"annotator{n}": vote for n, vote in enumerate(row, 1)}} for i, row in enumerate(votes)]
    assert read_human_labels(write(tmp_path / "l.jsonl", *rows)) == {"0": 1, "1": 0, "2": 0, "3": 2}
    with pytest.raises(DataError, match=r"l\.jsonl:1: field 'annotator3'"):
        read_human_labels(write(tmp_path / "l.jsonl", {"idx": 0, "annotator1": 1, "annotator2": 1}))


def test_a_label_without_verdict_is_unscored_and_a_verdict_without_label_an_error() -> None:
    found = compare([PairwiseVerdict(id="a", preferred=2)], {"a": 2, "b": 1, "c": 0})
    assert found.outcomes == {"a": Outcome.RIGHT, "b": Outcome.UNSCORED}
    assert found.counts == {(2, 2): 1, (1, None): 1, (0, None): 1}
    with pytest.raises(DataError, match="'z', which has no human label"):
        compare([PairwiseVerdict(id="z", preferred=2)], {"a": 2})
