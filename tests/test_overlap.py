"""Exact and near duplicates of prompts, and the known overlaps of real data sets."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.errors import ConfigError, DataError
from critrm.overlap import command, find_overlap, normalised, overlap_warning, read_prompts
from critrm.preferences import read_pairs
from critrm.store import read_rows, write_records
from critrm.types import Message, PreferencePair

LONG = "Write a short story about a lighthouse keeper who finds a message in a bottle and decides to answer it"


def test_case_punctuation_and_spaces_do_not_hide_a_prompt():
    found = find_overlap(["What is  2+2?\n", "x"], ["what is 2 2", "WHAT IS 2+2!", "Why?"], threshold=None)
    assert (found.n_train, found.n_test, len(found.exact), found.near) == (2, 2, 1, ())
    assert (found.exact[0].train, found.exact[0].similarity) == ("What is  2+2?\n", 1.0)
    assert normalised("Ｆｕｌｌ—ＷＩＤＴＨ  straße") == "full width strasse"


def test_near_duplicates_are_found_with_their_similarity():
    pytest.importorskip("datasketch")
    changed = LONG.replace("bottle", "box")
    found = find_overlap(
        [LONG, "Something else entirely, which shares nothing."], [changed, "Unrelated question?"], threshold=0.5
    )
    assert found.exact == ()
    (match,) = found.near
    assert (match.test, match.train) == (changed, LONG)
    assert match.similarity == pytest.approx(15 / 21)
    assert find_overlap([LONG], [changed], threshold=0.9).near == ()


def test_the_most_similar_training_prompt_is_named():
    pytest.importorskip("datasketch")
    trains = [LONG + " in one page", LONG + " today in one page and then send it"]
    (match,) = find_overlap(trains, [LONG + " in two pages"], threshold=0.5).near
    assert match.train == trains[0]


@pytest.mark.parametrize(
    ("train", "end"),
    [
        ("请写一个关于灯塔看守人的短故事，他发现了一封瓶中信并决定回信", "写信"),
        ("灯台守が瓶の中の手紙を見つけて返事を書く短い物語を書いて", "うよ"),
        ("เขียนเรื่องสั้นเกี่ยวกับผู้เฝ้าประภาคารที่พบข้อความในขวด", "ถุง"),
    ],
)
def test_near_duplicates_without_spaces_are_found(train, end):
    pytest.importorskip("datasketch")
    (match,) = find_overlap([train, "今天天气怎么样"], [train[: -len(end)] + end, "1加1等于几"]).near
    assert match.train == train


@pytest.mark.parametrize("texts", [[], ["", "?!", " \x00"]])
def test_prompts_without_words_match_nothing(texts):
    found = find_overlap(texts, ["", "?!", "real"], threshold=None)
    assert (found.n_train, found.n_test, found.exact) == (0, 1, ())
    assert find_overlap(["real"], texts, threshold=None).exact == ()


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_a_threshold_that_makes_no_sense_is_refused(threshold):
    with pytest.raises(ConfigError, match="threshold"):
        find_overlap(["a"], ["a"], threshold=threshold)


@given(st.lists(st.text(), max_size=8), st.lists(st.text(), max_size=8))
@settings(max_examples=50, deadline=None)
def test_every_test_prompt_that_is_in_training_is_found(train, test):
    found = find_overlap(train + test, test, threshold=None)
    assert len(found.exact) == found.n_test <= found.n_train


# Reading prompts


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Q", "completions": []}, "Q"),
        ({"prompt": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "Q\n\nA"),
        ({"prompt": "Human: Q\n\nAssistant: A\n\nHuman: R"}, "Q A R"),
        ({"instruction": "Do", "input": "this", "response1": "x"}, "Do\n\nthis"),
        ({"instruction": "Do", "input": ""}, "Do"),
        ({"conversation_input": [{"role": "user", "content": "Q"}]}, "Q"),
        ({"question": "Q", "response_A": "x"}, "Q"),
        ({"input": "Q", "output_1": "a", "output_2": "b", "label": 1}, "Q"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}, "Q"),
    ],
)
def test_prompts_of_many_forms(tmp_path, row, prompt):
    write_records(tmp_path / "p.jsonl", [row])
    assert normalised(read_prompts(tmp_path / "p.jsonl")[0]) == normalised(prompt)


@pytest.mark.parametrize("row", [{"text": "Q"}, {"prompt": 3}, {"prompt": [{"role": "user"}]}, {"prompt": ""}])
def test_a_row_without_a_prompt_is_named(tmp_path, row):
    write_records(tmp_path / "p.jsonl", [{"prompt": "Q"}, row])
    with pytest.raises(DataError, match=r"p\.jsonl:2: no prompt"):
        read_prompts(tmp_path / "p.jsonl")


def test_known_overlaps_of_real_data(data_dir):
    pytest.importorskip("datasketch")
    pandalm = read_prompts(data_dir / "pandalm" / "testset-v1.json.gz")
    tulu = find_overlap(read_prompts(data_dir / "tulu-human-eval" / "annotations.jsonl.gz"), pandalm)
    assert (tulu.n_test, len(tulu.exact)) == (170, 169)
    rmb = read_prompts(data_dir / "rmb" / "pairwise.jsonl.gz")
    study = read_prompts(data_dir / "hh-pairs" / "pairs.jsonl")
    for test in (pandalm, study):
        found = find_overlap(rmb, test)
        assert (len(found.exact), len(found.near)) == (0, 0)


# The warning and the verb


def _pair(name, prompt):
    return PreferencePair(id=name, prompt=(Message("user", prompt),), chosen="a", rejected="b")


def test_the_warning_is_one_sentence_or_none():
    train, test = [_pair("a", "What now?"), _pair("b", "x")], [_pair("c", "what NOW"), _pair("d", "y")]
    assert overlap_warning(train, [_pair("d", "y")]) == ""
    assert overlap_warning(train, test, name="hh").startswith("1 of the 2 prompts of hh are in the training pairs")


def test_the_verb_counts_shows_and_writes(tmp_path, capsys):
    pytest.importorskip("datasketch")
    write_records(tmp_path / "train.jsonl", [{"prompt": LONG}, {"prompt": "[/red] markup?"}])
    write_records(tmp_path / "test.jsonl", [{"prompt": LONG + "."}, {"prompt": LONG + " now"}, {"prompt": "Else?"}])
    command(tmp_path / "train.jsonl", tmp_path / "test.jsonl", out=tmp_path / "out.jsonl")
    shown = capsys.readouterr().out
    assert "3 distinct test prompts, 2 distinct training prompts" in shown
    assert "33.3%" in shown
    rows = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    assert [row["similarity"] == 1.0 for row in rows] == [True, False]
    write_records(tmp_path / "other.jsonl", [{"prompt": "[/red] MARKUP"}])
    command(tmp_path / "train.jsonl", tmp_path / "other.jsonl")
    assert "[/red] MARKUP" in capsys.readouterr().out


def test_pairs_that_were_written_are_read_as_they_are(tmp_path, pairs):
    write_records(tmp_path / "pairs.jsonl", pairs)
    assert [json.loads(json.dumps(text)) for text in read_prompts(tmp_path / "pairs.jsonl")][2].startswith(
        "Are you good"
    )
    assert overlap_warning(read_pairs(tmp_path / "pairs.jsonl").pairs, pairs, name="itself")
