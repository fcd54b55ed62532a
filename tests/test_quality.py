"""The quality gate: flags, counts, the gate itself, and pairs that contradict their label."""

import json
from dataclasses import replace

import pytest

from critrm.critique_files import read_critiques
from critrm.errors import ConfigError
from critrm.preferences import read_pairs
from critrm.quality import REASONS, check_critiques, command, find_contradictions, gate_critiques, place_of
from critrm.store import write_records
from critrm.types import SIDES, Critique


def critique(pair_id: str, side: str, text: str, **changes) -> Critique:
    made = Critique(key="k", pair_id=pair_id, side=side, text=text, critic="c", prompt_version="")
    return replace(made, **changes)


GRADES = {
    "pair-00": ("Right sum and plainly put. 9/10.", "Wrong sum, and the doubt is odd. 2/10."),
    "pair-01": ("Right sum, plainly put. 3/10.", "Wrong sum. I'd give it a 7 out of 10."),
    "pair-02": ("Right, in 6 words. 5/10.", "Wrong, in 9 words. 5/10."),
    "pair-03": ("Right sum. Rating: 9", "Wrong sum by exactly one unit."),
    "pair-04": ("rating: 9", "I cannot provide a critique of arithmetic."),
}
ROWS = [
    critique(pair_id, side, text) for pair_id, texts in GRADES.items() for side, text in zip(SIDES, texts, strict=True)
]


def test_flags_counts_and_what_leaked_grades_alone_would_give(pairs) -> None:
    failed = critique("pair-05", "chosen", "", failure="timeout")
    report = check_critiques(pairs, [*ROWS, failed])
    (found,) = report.critics
    assert (found.critic, found.n, found.n_failed, found.n_flagged) == ("c", 10, 1, 9)
    assert found.counts == {"score": 8, "refusal": 1}
    assert report.flags["c", "pair-04", "rejected", 0] == ("refusal",)
    assert place_of(failed) not in report.flags
    leaked = found.leaked
    assert (leaked.n_right, leaked.n_wrong, leaked.n_tie, leaked.n_unscored) == (1, 1, 1, 2)
    assert leaked.accuracy.value == pytest.approx(1 / 3)
    assert leaked.accuracy.low < 1 / 3 < leaked.accuracy.high


def test_every_flaw_has_a_flag(pairs) -> None:
    texts = {
        "refusal": "I'm sorry, but I cannot provide a critique.",
        "dialogue": "User: Are you sure about the sums?",
        "echo": pairs[0].rejected,
        "loop": "I'm sure you're right about the sums you made. " * 6,
        "truncated": "It adds the numbers but then it",
        "boilerplate": "Not helpful.",
        "language": "Die Summe ist nicht falsch, aber der Satz ist zu kurz und das Ende ist auch nicht gut.",
        "score": "Right sum. 8/10.",
    }
    assert list(texts) == list(REASONS)
    rows = [
        critique("pair-00", "rejected", text, sample=i, finish_reason="length") for i, text in enumerate(texts.values())
    ]
    fine = [
        critique(pair.id, "chosen", f"It says that {pair.chosen} The sum is right and the reply to the point.")
        for pair in pairs
    ]
    report = check_critiques(pairs, rows + fine)
    for row, reason in zip(rows, texts, strict=True):
        assert reason in report.flags[place_of(row)]
    assert not any(place_of(row) in report.flags for row in fine)


def test_copies_of_a_completion_do_not_make_boilerplate(pairs) -> None:
    texts = ("It names the sum without any working.",) * 4
    copies = [replace(pair, chosen=pairs[0].chosen) for pair in pairs[:4]]
    rows = [critique(pair.id, "chosen", text) for pair, text in zip(copies, texts, strict=True)]
    assert check_critiques(copies, rows).flags == {}
    assert set(check_critiques(pairs[:4], rows).flags.values()) == {("boilerplate",)}


def test_critics_are_judged_apart(pairs) -> None:
    german = "Die Summe ist nicht falsch, aber der Satz ist zu kurz und das Ende ist auch nicht gut."
    rows = [critique("pair-00", side, f"{german} {side}", critic="german") for side in SIDES]
    rows += [replace(row, critic="english") for row in ROWS]
    report = check_critiques(pairs, rows)
    assert [found.critic for found in report.critics] == ["german", "english"]
    assert report.critics[0].counts == {}


def test_the_gate_fails_what_is_dropped_and_loses_nothing(pairs) -> None:
    report = check_critiques(pairs, ROWS)
    gated = gate_critiques(ROWS, report, drop=("refusal",), strip_scores=True)
    assert [place_of(row) for row in gated] == [place_of(row) for row in ROWS]
    assert [row.text for row in gated[:4]] == [
        "Right sum and plainly put.",
        "Wrong sum, and the doubt is odd.",
        "Right sum, plainly put.",
        "Wrong sum.",
    ]
    assert [(row.text, row.failure) for row in gated[-2:]] == [("", "quality: score"), ("", "quality: refusal")]
    assert gate_critiques(ROWS, report) == ROWS
    assert sum(bool(row.failure) for row in gate_critiques(ROWS, report, drop=("score",))) == 8
    with pytest.raises(ConfigError, match=r"'?sarcasm'?.*refusal"):
        gate_critiques(ROWS, report, drop=("sarcasm",))


def test_contradictions_are_told_by_leaked_grades_else_by_the_critics_own(pairs) -> None:
    train = [pair for pair in pairs if pair.split == "train"]
    own = [critique("pair-05", "chosen", "Right.", score=3), critique("pair-05", "rejected", "Wrong.", score=8)]
    mixed = [critique("pair-06", "chosen", "Right. 2/10.", score=9), critique("pair-06", "rejected", "Wrong.", score=1)]
    assert find_contradictions(train, [*ROWS, *own, *mixed], split="train") == {"pair-01", "pair-05"}
    failed = [replace(row, failure="timeout") for row in ROWS]
    assert find_contradictions(train, failed, split="train") == frozenset()


def test_test_pairs_are_never_chosen_by_their_label(pairs) -> None:
    train = [pair for pair in pairs if pair.split == "train"]
    for given, split in ((train, "test"), (train, ""), (pairs, "train")):
        with pytest.raises(ConfigError, match="only training pairs"):
            find_contradictions(given, ROWS, split=split)
    unnamed = [replace(pair, split="") for pair in pairs]
    assert find_contradictions(unnamed, ROWS, split="train") == {"pair-01"}


def test_the_command_counts_reasons_and_writes_the_report(tmp_path, pairs, capsys) -> None:
    write_records(tmp_path / "pairs.jsonl", pairs)
    markup = critique("pair-05", "chosen", "User: [/bold] [red]no", sample=1)
    write_records(tmp_path / "rows.jsonl", [*ROWS, markup])
    command(tmp_path / "pairs.jsonl", critiques=tmp_path / "rows.jsonl", out=tmp_path / "report.json", examples=2)
    shown = " ".join(capsys.readouterr().out.split())
    assert "c: 10 of 11 critiques have a flaw" in shown
    assert "Leaked grades alone: 33.3% right of 3 pairs" in shown
    assert "[/bold]" in shown
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["critics"][0]["counts"]["score"] == 8
    assert written["critics"][0]["leaked"]["n_wrong"] == 1
    assert {"critic": "c", "pair_id": "pair-04", "side": "rejected", "sample": 0, "reasons": ["refusal"]} in written[
        "flags"
    ]
    command(tmp_path / "pairs.jsonl", critiques=tmp_path / "rows.jsonl", examples=0)
    assert "for example" not in capsys.readouterr().out


def test_a_strong_critic_passes(data_dir) -> None:
    pairs = read_pairs(data_dir / "hh-pairs" / "pairs.jsonl").pairs
    report = check_critiques(pairs, read_critiques(data_dir / "critiques" / "frontier-llm.jsonl"))
    assert report.flags == {}
    assert report.critics[0].n == 2758
    assert report.critics[0].leaked.accuracy is None
    assert report.critics[0].leaked.n_unscored == len(pairs)
